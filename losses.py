"""What is minimised? Log-probs, advantages, clipped ratio, aggregation, KL: pure tensor functions.

DAPO's objective (arXiv 2503.14476, equations 8 and 9), over the responses o_i to a prompt q:

    J = E[ 1 / sum_i |o_i| * sum_i sum_t min(r_it A_i, clip(r_it, 1 - eps_low, 1 + eps_high) A_i) ]
    r_it = pi(o_it | q, o_i<t) / pi_old(o_it | q, o_i<t),     A_i = (R_i - mean(R)) / std(R)

Departures from the paper, each optional or harmless:
  1. std is the sample standard deviation (n - 1), and 1e-6 is added to it.
  2. The sum over tokens runs over an optimizer step's whole mini-batch, on all ranks (`num_tokens`).
  3. `norm_by_std`, `clip_ratio_c` (dual clip), the other aggregations, the KL terms, the entropy and
     `rollout_weights` are for ablations; none of them is on by default.

Shapes: B responses, T response tokens (padded on the right), V vocabulary, G groups, n responses a group.
Masks are 1 on the tokens that train and 0 elsewhere; whatever stands where the mask is 0 has no effect.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOG_RATIO_LIMIT = 20.0  # exp(20) is far outside every clip range; beyond it float32 would overflow
CHUNK_ELEMENTS = 2**24  # logits that are in float32 at a time: 64 MB


def response_logprobs(model, batch: dict[str, Tensor], temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the response tokens, both (B, T), in float32 or wider.

    `batch` holds input_ids, attention_mask and position_ids, each (B, P + T), prompts padded on the
    left and responses on the right, and `responses` (B, T). This is the one place that shifts: the
    logits at position P + t - 1 predict response token t.
    """
    tokens = F.pad(batch["responses"], (0, 1))  # (B, T + 1): the logits' last column predicts nothing, and goes
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                   position_ids=batch["position_ids"], use_cache=False,
                   logits_to_keep=tokens.shape[1])  # no prompt position but the last reaches the output head
    logprobs, entropy = token_logprobs(output.logits, tokens, temperature)
    return logprobs[:, :-1], entropy[:, :-1]


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-prob of each token and entropy of its distribution: (B, T, V), (B, T) -> (B, T), (B, T).

    Works in chunks of tokens that the backward pass computes again, since the entropy of a large
    vocabulary in one piece takes tens of GB.
    """
    flat_logits, flat_tokens = logits.flatten(0, 1), tokens.flatten()
    chunk = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    parts = [checkpoint(_logprobs_and_entropy, x, y, temperature, use_reentrant=False)
             for x, y in zip(flat_logits.split(chunk), flat_tokens.split(chunk), strict=True)]
    logprobs, entropy = (torch.cat(part).view(tokens.shape) for part in zip(*parts, strict=True))
    return logprobs, entropy


def _logprobs_and_entropy(logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logprobs = torch.log_softmax(logits / temperature, dim=-1)  # (chunk, V)
    return logprobs.gather(-1, tokens[:, None]).squeeze(-1), -(logprobs.exp() * logprobs).sum(-1)


def group_advantages(rewards: Tensor, norm_by_std: bool = True, eps: float = 1e-6) -> Tensor:
    """Rewards relative to their group (equation 9): (G, n) -> (G, n), one value a response.

    `norm_by_std=False` leaves out the division (Dr. GRPO, arXiv 2503.20783).
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return centred / (rewards.std(dim=1, keepdim=True) + eps) if norm_by_std else centred


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor,
                clip_ratio_low: float, clip_ratio_high: float,
                clip_ratio_c: float | None = None,
                rollout_weights: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped-ratio loss of every token (equation 8, negated), and what the clipping did.

    Args:
        logprobs, old_logprobs, mask: (B, T); gradients flow through `logprobs` only.
        advantages: (B, 1) or (B, T).
        clip_ratio_low, clip_ratio_high: the ratio counts between 1 - low and 1 + high.
        clip_ratio_c: dual clip (arXiv 1912.09729): where the advantage is negative, the loss is at
            most -A * c. None or 0: off.
        rollout_weights: (B, T) or (B, 1), factors of the loss: see `rollout_weights`.
    Returns:
        The loss (B, T), not yet masked or aggregated, and sums over the masked tokens (0-d, detached):
        ratio, clip_up, clip_down, clip_dual (token counts), clip_up_prob (probability of the tokens
        clipped up), kl (k1 estimate of KL(old || current)), token_prob (of all tokens).
    """
    old_logprobs, mask = old_logprobs.detach(), mask.bool()
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    clipped_ratio = ratio.clamp(1 - clip_ratio_low, 1 + clip_ratio_high)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped_ratio)
    clip_up = (advantages > 0) & (ratio > 1 + clip_ratio_high) & mask
    clip_down = (advantages < 0) & (ratio < 1 - clip_ratio_low) & mask
    clip_dual = torch.zeros_like(mask)
    if clip_ratio_c:
        clip_dual = (advantages < 0) & (ratio > clip_ratio_c) & mask
        loss = torch.where(clip_dual, -advantages * clip_ratio_c, loss)
    if rollout_weights is not None:
        loss = loss * rollout_weights
    prob = torch.where(mask, logprobs.detach(), -torch.inf).exp()
    stats = {"ratio": ratio * mask, "clip_up": clip_up, "clip_down": clip_down, "clip_dual": clip_dual,
             "clip_up_prob": prob * clip_up, "kl": -log_ratio, "token_prob": prob}
    return loss, {name: value.detach().sum(dtype=torch.float64) for name, value in stats.items()}


def rollout_weights(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, level: str = "token",
                    cap: float = 2.0) -> Tensor:
    """Truncated importance weights for responses whose sampler computes a little differently than the trainer.

    `token`: min(pi_old / pi_rollout, cap) of each token, (B, T). `sequence`: of whole responses, (B, 1): unbiased
    but for the cap, and of high variance where responses are long. Detached; 1 where the mask is 0.
    """
    difference = torch.where(mask.bool(), old_logprobs - rollout_logprobs, 0.0).detach()
    if level == "sequence":
        difference = difference.sum(dim=1, keepdim=True)
    elif level != "token":
        raise ValueError(f"rollout weights' level {level!r} is none of token, sequence")
    return difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp().clamp(max=cap)


def aggregate(loss: Tensor, mask: Tensor, mode: str, num_tokens: int | None = None,
              num_seqs: int | None = None) -> Tensor:
    """Token losses (B, T) to the scalar that is minimised.

    `token-mean` (DAPO): every token of the mini-batch weighs the same.
    `seq-mean-token-sum`: the mean over responses of the sum over their tokens.
    `seq-mean-token-mean` (GRPO): the mean over responses of the mean over their tokens.

    `num_tokens` and `num_seqs` count what trains (responses with at least one such token) in the whole
    optimizer step, over all micro-batches of all ranks: then the parts' results add up to the whole's,
    however it was split. Left out, they are counted in `mask`. Nothing to train on gives 0, not NaN.
    """
    mask = mask.bool()
    loss = torch.where(mask, loss, 0.0)
    lengths = mask.sum(dim=1)  # (B,)
    if mode == "token-mean":
        return loss.sum() / max(1, int(lengths.sum()) if num_tokens is None else num_tokens)
    num_seqs = max(1, int((lengths > 0).sum()) if num_seqs is None else num_seqs)
    if mode == "seq-mean-token-sum":
        return loss.sum() / num_seqs
    if mode == "seq-mean-token-mean":
        return (loss.sum(dim=1) / lengths.clamp(min=1)).sum() / num_seqs
    raise ValueError(f"loss_agg_mode {mode!r} is none of token-mean, seq-mean-token-sum, seq-mean-token-mean")


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """Per-token estimate of KL(policy || reference), (B, T), by http://joschu.net/blog/kl-approx.html.

    `k1`: unbiased, may be negative. `k2`: biased, low variance. `k3`: unbiased, never negative.
    In a loss, where tokens come from the policy itself, the gradient of k1 is zero on average; k2's is right.
    """
    difference = logprobs - ref_logprobs
    if kind == "k1":
        return difference
    if kind == "k2":
        return difference.square() / 2
    if kind == "k3":
        return (-difference).clamp(max=LOG_RATIO_LIMIT).exp() - 1 + difference
    raise ValueError(f"kl kind {kind!r} is none of k1, k2, k3")
