"""The equations: advantages, clipped-ratio loss, aggregation, KL, importance weights.

DAPO's objective (arXiv 2503.14476, equations 8 and 9), over the responses o_i to a prompt q:

    J = E[ 1 / sum_i |o_i| * sum_i sum_t min(r_it A_i, clip(r_it, 1 - eps_low, 1 + eps_high) A_i) ]
    r_it = pi(o_it | q, o_i<t) / pi_old(o_it | q, o_i<t),     A_i = (R_i - mean(R)) / std(R)

Departures from the paper:
  1. std is the sample standard deviation (n - 1), and 1e-6 is added to it.
  2. The mean over tokens is that of the whole mini-batch of an optimizer step, on all ranks
     (`num_tokens`), as in the released code; equation 8 as printed is that of one prompt's group.
  3. `norm_by_std=False`, `clip_ratio_c` (dual clip), the other aggregations, the KL terms and
     `importance_weights` are for ablations, and off by default.

Shapes: B responses, T response tokens (padded on the right), G groups, n responses per group
(the paper's G).
Masks are 1 on the tokens that are trained and 0 elsewhere; a value with the mask 0 has no effect.
"""

import torch
from torch import Tensor

from data_types import Stat

LOG_RATIO_LIMIT = 20.0  # exp(20) is far outside every clip range; float32 overflows at exp(89)


def group_advantages(rewards: Tensor, norm_by_std: bool = True, eps: float = 1e-6) -> Tensor:
    """Rewards relative to their group (equation 9): (G, n) -> (G, n), one value per response.

    `norm_by_std=False` leaves out the division (Dr. GRPO, arXiv 2503.20783).
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return centred / (rewards.std(dim=1, keepdim=True) + eps) if norm_by_std else centred


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor,
                clip_ratio_low: float | Tensor, clip_ratio_high: float | Tensor,
                clip_ratio_c: float | None = None,
                weights: Tensor | None = None) -> tuple[Tensor, dict[str, Stat]]:
    """Clipped-ratio loss of every token (equation 8, negated), and statistics of the clipping.

    Args:
        logprobs, old_logprobs, mask: (B, T); gradients flow through `logprobs` only, not through
            what the bounds of the clip are made of.
        advantages: (B, 1) or (B, T).
        clip_ratio_low, clip_ratio_high: the ratio is clipped to [1 - low, 1 + high]; numbers, or
            tensors (B, 1) or (B, T), one of each kind too.
        clip_ratio_c: dual clip (arXiv 1912.09729): if the advantage is negative, the loss is at
            most -A * c. None or 0: off.
        weights: (B, T) or (B, 1), factors of the loss, see `importance_weights`.
    Returns:
        The loss (B, T), neither masked nor aggregated, and its statistics by name.
    """
    clip_ratio_low, clip_ratio_high = (bound.detach() if isinstance(bound, Tensor) else bound
                                       for bound in (clip_ratio_low, clip_ratio_high))
    old_logprobs, mask = old_logprobs.detach().where(mask.bool(), 0.0), mask.bool()
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)  # (B, T)
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    clipped_ratio = ratio.clamp(min=1 - clip_ratio_low).clamp(max=1 + clip_ratio_high)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped_ratio)
    clipped_high = (advantages > 0) & (ratio > 1 + clip_ratio_high)
    clipped_low = (advantages < 0) & (ratio < 1 - clip_ratio_low)
    token_prob = torch.where(mask, logprobs.detach(), -torch.inf).exp()
    stats = {
        "ratio": Stat(ratio),
        "approx_kl": Stat(-log_ratio),  # k1 estimate of KL(old || current)
        "token_prob": Stat(token_prob),
        "clip_frac_high": Stat(clipped_high),
        "clip_frac_low": Stat(clipped_low),
        "clip_high_prob": Stat(token_prob, mask=clipped_high),  # mean over the tokens clipped high
    }
    if clip_ratio_c:
        clipped_dual = (advantages < 0) & (ratio > clip_ratio_c)
        loss = torch.where(clipped_dual, -advantages * clip_ratio_c, loss)
        stats["clip_frac_dual"] = Stat(clipped_dual)
    return loss if weights is None else loss * weights, stats


def importance_weights(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor,
                       level: str = "token", cap: float = 2.0) -> Tensor:
    """Truncated importance weights for the mismatch of the trainer's and the sampler's log-probs.

    `token`: min(pi_old / pi_rollout, cap) of each token, (B, T). `sequence`: of whole responses,
    (B, 1): unbiased but for the cap, with a high variance if responses are long. Detached; 1 where
    the mask is 0.
    """
    difference = torch.where(mask.bool(), old_logprobs - rollout_logprobs, 0.0).detach()
    if level == "sequence":
        difference = difference.sum(dim=1, keepdim=True)
    elif level != "token":
        raise ValueError(f"importance weights' level {level!r} is none of token, sequence")
    return difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp().clamp(max=cap)


def aggregate(loss: Tensor, mask: Tensor, mode: str, num_tokens: int | None = None,
              num_seqs: int | None = None) -> Tensor:
    """Token losses (B, T) to the scalar that is minimised.

    `token-mean` (DAPO): every token of the mini-batch has the same weight.
    `seq-mean-token-sum`: the mean over responses of the sum over their tokens.
    `seq-mean-token-mean` (GRPO): the mean over responses of the mean over their tokens.

    `num_tokens` and `num_seqs` count the trained tokens and the responses with at least one such
    token in the whole optimizer step, over all micro-batches of all ranks: then the results of the
    parts add up to that of the whole, however it is split. Without them, `mask` is counted.
    Returns 0 (not NaN) if there is nothing to train on.
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
    raise ValueError(f"loss_agg_mode {mode!r} is none of token-mean, seq-mean-token-sum, "
                     "seq-mean-token-mean")


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """Estimate of KL(policy || reference) per token, (B, T).

    See http://joschu.net/blog/kl-approx.html.
    `k1`: unbiased, may be negative. `k2`: biased, low variance. `k3`: unbiased, never negative.
    As a loss on tokens sampled from the policy, k1's gradient is zero on average, k2's is that of
    the KL.
    """
    difference = logprobs - ref_logprobs
    if kind == "k1":
        return difference
    if kind == "k2":
        return difference.square() / 2
    if kind == "k3":
        return (-difference).clamp(max=LOG_RATIO_LIMIT).exp() - 1 + difference
    raise ValueError(f"kl kind {kind!r} is none of k1, k2, k3")
