"""What is minimised? Log-probs, advantages, clipped ratio, aggregation, KL: pure tensor functions.

DAPO's objective (arXiv 2503.14476, equations 8 and 9), over the responses o_i to a prompt q:

    J = E[ 1 / sum_i |o_i| * sum_i sum_t min(r_it A_i, clip(r_it, 1 - eps_low, 1 + eps_high) A_i) ]
    r_it = pi(o_it | q, o_i<t) / pi_old(o_it | q, o_i<t),     A_i = (R_i - mean(R)) / std(R)

Departures from the paper, each optional or harmless:
  1. std is the sample standard deviation (n - 1), and 1e-6 is added to it.
  2. The sum over tokens runs over an optimizer step's whole mini-batch, on all ranks (`num_tokens`).
  3. `norm_by_std`, `clip_ratio_c` (dual clip), the other aggregations, the KL terms, the entropy and
     `importance_weights` are for ablations; none of them is on by default.

Shapes: B responses, T response tokens (padded on the right), V vocabulary, G groups, n responses a group.
Masks are 1 on the tokens that train and 0 elsewhere; whatever stands where the mask is 0 has no effect.
"""

from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOG_RATIO_LIMIT = 20.0  # exp(20) is far outside every clip range; beyond it float32 would overflow
CHUNK_ELEMENTS = 2**27 if torch.cuda.is_available() else 2**25  # logits that exist at a time: 512 or 128 MB in float32


def response_logprobs(model, batch: dict, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the response tokens, both (B, T), in float32 or wider; 0 on padding.

    `batch` is what `sampling.collate` makes. This is the one place that shifts: `batch["before"]` (N,) are the
    positions, among all of input_ids (R, L), whose logits predict the N tokens. No other position reaches the
    output head, and the head's logits are never whole; but where a model changes them (soft-capping, scaling),
    its own code makes them, for those N.
    """
    head, tokens = getattr(model, "module", model).get_output_embeddings(), batch["tokens"]
    fused = type(head) is torch.nn.Linear and head.bias is None and head not in _CHANGED_AFTERWARDS
    made = None

    def project(hidden: Tensor) -> Tensor:  # in the head's place, within the forward pass: there FSDP has it whole
        nonlocal made
        hidden = hidden.flatten(0, 1).index_select(0, batch["before"])  # (N, H)
        if not fused:
            return type(head).forward(head, hidden[None])  # (1, N, V)
        made = fused_linear_logprobs(hidden, head.weight, tokens, temperature)
        return made[0]

    head.forward = project
    try:
        output = model(input_ids=batch["input_ids"], use_cache=False, **batch["packed"])
    finally:
        del head.forward
    if fused and output.logits is not made[0]:
        _CHANGED_AFTERWARDS.add(head)
        return response_logprobs(model, batch, temperature)
    values = made or [value.squeeze(0) for value in token_logprobs(output.logits, tokens[None], temperature)]
    zeros = values[0].new_zeros(batch["mask"].numel())
    logprobs, entropy = (zeros.index_copy(0, batch["places"], value).view(batch["mask"].shape) for value in values)
    return logprobs, entropy


_CHANGED_AFTERWARDS = WeakSet()  # output heads whose models do something to the logits


def fused_linear_logprobs(hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """`token_logprobs(hidden @ weight.T, tokens)` without the logits: (N, H), (V, H), (N,) -> (N,), (N,)."""
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        return FusedLinearLogprobs.apply(hidden, weight, tokens, temperature)


class FusedLinearLogprobs(torch.autograd.Function):
    """The logits z exist a chunk of tokens at a time, and once more in the backward pass: with p = softmax(z),

        log-prob of token y: z_y - logsumexp(z)     its gradient by z: onehot(y) - p
        entropy H: -sum p log p                     its gradient by z: -p (log p + H)
    """
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        parts = []
        for x, y in _chunks(weight, hidden, tokens):
            logprobs = matmul_fp32(x, weight.T).div_(temperature)  # (chunk, V)
            logsumexp = logprobs.logsumexp(-1)
            logprobs -= logsumexp[:, None]
            parts.append((logsumexp, logprobs.gather(1, y[:, None]).squeeze(1),
                          -torch.linalg.vecdot(logprobs.exp(), logprobs)))
        logsumexp, logprobs, entropy = map(torch.cat, zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, tokens, logsumexp, entropy)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)  # None where the entropy does not train
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad_logprobs: Tensor | None, grad_entropy: Tensor | None):
        hidden, weight, tokens, logsumexp, entropy = ctx.saved_tensors
        grad_logprobs = torch.zeros_like(entropy) if grad_logprobs is None else grad_logprobs
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=entropy.dtype) if ctx.needs_input_grad[1] else None
        start = 0
        for x, y, g, norm, h in _chunks(weight, hidden, tokens, grad_logprobs, logsumexp, entropy):
            z = matmul_fp32(x, weight.T).div_(ctx.temperature).sub_(norm[:, None])  # log p, (chunk, V)
            if grad_entropy is None:
                z.exp_().mul_(-g[:, None])
            else:
                p, by_h = z.exp(), grad_entropy[start:start + len(x), None]
                z.add_(h[:, None]).mul_(-by_h).sub_(g[:, None]).mul_(p)
            z.scatter_add_(1, y[:, None], g[:, None]).div_(ctx.temperature)
            z = z.to(weight.dtype)
            grad_hidden[start:start + len(x)] = z @ weight
            if grad_weight is not None and grad_weight.dtype == z.dtype:
                grad_weight.addmm_(z.T, x)
            elif grad_weight is not None:
                grad_weight += matmul_fp32(z.T, x)
            start += len(x)
        return grad_hidden, grad_weight if grad_weight is None else grad_weight.to(weight.dtype), None, None


def _chunks(weight: Tensor, *tensors: Tensor):
    size = max(1, CHUNK_ELEMENTS // len(weight))
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32 or wider, of bfloat16 too."""
    if a.is_cuda and a.dtype == torch.bfloat16:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b if a.dtype in (torch.float32, torch.float64) else (a @ b).float()


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
                importance_weights: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped-ratio loss of every token (equation 8, negated), and what the clipping did.

    Args:
        logprobs, old_logprobs, mask: (B, T); gradients flow through `logprobs` only.
        advantages: (B, 1) or (B, T).
        clip_ratio_low, clip_ratio_high: the ratio counts between 1 - low and 1 + high.
        clip_ratio_c: dual clip (arXiv 1912.09729): where the advantage is negative, the loss is at
            most -A * c. None or 0: off.
        importance_weights: (B, T) or (B, 1), factors of the loss: see `importance_weights`.
    Returns:
        The loss (B, T), not yet masked or aggregated, and sums over the masked tokens (0-d, detached):
        ratio, clip_frac_high, clip_frac_low, clip_frac_dual (token counts), clip_up_prob (probability of the tokens
        clipped up), kl (k1 estimate of KL(old || current)), token_prob (of all tokens).
    """
    old_logprobs, mask = old_logprobs.detach(), mask.bool()
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    clipped_ratio = ratio.clamp(1 - clip_ratio_low, 1 + clip_ratio_high)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped_ratio)
    clip_frac_high = (advantages > 0) & (ratio > 1 + clip_ratio_high) & mask
    clip_frac_low = (advantages < 0) & (ratio < 1 - clip_ratio_low) & mask
    clip_frac_dual = torch.zeros_like(mask)
    if clip_ratio_c:
        clip_frac_dual = (advantages < 0) & (ratio > clip_ratio_c) & mask
        loss = torch.where(clip_frac_dual, -advantages * clip_ratio_c, loss)
    if importance_weights is not None:
        loss = loss * importance_weights
    prob = torch.where(mask, logprobs.detach(), -torch.inf).exp()
    stats = {"ratio": ratio * mask, "clip_frac_high": clip_frac_high, "clip_frac_low": clip_frac_low, "clip_frac_dual": clip_frac_dual,
             "clip_up_prob": prob * clip_frac_high, "kl": -log_ratio, "token_prob": prob}
    return loss, {name: value.detach().sum(dtype=torch.float64) for name, value in stats.items()}


def importance_weights(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, level: str = "token",
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
