"""Log-probs and entropies of responses under a model, without ever holding all of its logits.

`response_logprobs` is the one function that aligns logits with tokens; from there on every tensor
is (B, T). Shapes: B responses, T response tokens, N all response tokens of a batch, V vocabulary,
H hidden size.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from types import SimpleNamespace
from weakref import WeakSet

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from data_types import Prompt, Sample, SamplingParams, Stat, TrainState
from infra.batching import make_batch, micro_batches
from infra.config import compute_dtype
from infra.distributed import show_progress
from infra.memory import CHUNK_ELEMENTS, kept_elements
from infra.packing import disable_packing, packing_kind
from infra.precision import is_plain_linear, linear_fp32, matmul_fp32, round_like_autocast
from losses import importance_weights, kl_penalty

MODIFIED_LOGITS = WeakSet()  # output heads whose model changes their logits (soft-capping, scaling)


@torch.no_grad()
def compute_logprobs(state: TrainState, model: torch.nn.Module,
                     batches: Sequence[Sequence[Sample]]) -> dict[tuple[int, int], Tensor]:
    """The log-probs (T,) of every sample in the mini-batches under `model`, on the CPU of every
    rank, by the sample's key. A rank computes those of its share of each mini-batch."""
    config, accelerator = state.config, state.accelerator
    state.engine.sleep()  # frees its memory; whatever generates next wakes it
    max_tokens, packing = config.actor.max_tokens_per_micro_batch, packing_kind(state.policy)
    own = []
    for batch in batches:
        own += chain(*micro_batches(batch, max_tokens, accelerator.process_index,
                                    accelerator.num_processes, packing))
    micros = micro_batches(sorted(own, key=lambda sample: sample.key), max_tokens, packing=packing)
    count, found = max(gather_object([len(micros)])), {}
    micros += [[]] * (count - len(micros))  # every rank runs the model equally often
    for micro in show_progress(accelerator, micros, "log-probs"):
        with accelerator.autocast():
            logprobs, _ = response_logprobs(model, make_batch(state, micro),
                                            config.rollout.temperature)
        for sample, row in zip(micro, logprobs.cpu(), strict=False):  # empty: a row of no sample
            found[sample.key] = row[:len(sample.response_ids)].clone()
    return dict(chain.from_iterable(share.items() for share in gather_object([found])))


def response_logprobs(model: torch.nn.Module, batch: dict,
                      temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the response tokens, both (B, T), float32 or wider; 0 on padding.

    `batch` is from `batching.collate`. `batch["logit_positions"]` (N,) are the positions, among
    all of input_ids (R, L), whose logits predict the N tokens. No other position reaches the output
    head, and its logits exist in chunks only. If the model changes the head's logits (soft-capping,
    scaling), its own code makes those of the N positions.
    """
    head, tokens = getattr(model, "module", model).get_output_embeddings(), batch["tokens"]
    plain, result = is_plain_linear(head), None
    fused = plain and head.bias is None and head not in MODIFIED_LOGITS

    def project(hidden: Tensor) -> Tensor:  # replaces the head's forward, when FSDP has it whole
        nonlocal result
        hidden = hidden.flatten(0, 1).index_select(0, batch["logit_positions"])  # (N, H)
        if not fused:
            forward = linear_fp32 if plain else type(head).forward
            return forward(head, hidden[None])  # (1, N, V)
        result = fused_linear_logprobs(hidden, head.weight, tokens, temperature)
        return result[0]

    head.forward = project
    try:
        output = model(input_ids=batch["input_ids"], use_cache=False, **batch["packing_kwargs"])
    finally:
        del head.forward
    if fused and output.logits is not result[0]:
        MODIFIED_LOGITS.add(head)
        return response_logprobs(model, batch, temperature)
    if not fused:
        result = (value.squeeze(0) for value in
                token_logprobs(output.logits, tokens[None], temperature))
    shape, positions = batch["mask"].shape, batch["flat_positions"]
    logprobs, entropy = (value.new_zeros(batch["mask"].numel()).index_copy(0, positions, value)
                         for value in result)
    return logprobs.view(shape), entropy.view(shape)


# ---- the output head -----------------------------------------------------------------------------

def fused_linear_logprobs(hidden: Tensor, weight: Tensor, tokens: Tensor,
                          temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """`token_logprobs(hidden @ weight.T, tokens)` in chunks: (N, H), (V, H), (N,) -> (N,), (N,)."""
    hidden, weight = round_like_autocast(hidden, weight)
    device = hidden.device
    gpu_memory = torch.cuda.get_device_properties(device).total_memory if hidden.is_cuda else 0
    budget = kept_elements(gpu_memory) if torch.is_grad_enabled() else 0
    with torch.autocast(device.type, enabled=False):
        return FusedLinearLogprobs.apply(hidden, weight, tokens, temperature, budget)


class FusedLinearLogprobs(torch.autograd.Function):
    """A chunk of logits z exists at a time. Chunks of log-probs, `budget` elements
    at most, stay for the backward pass; the others are computed again. With p = softmax(z):

        log-prob of token y: z_y - logsumexp(z)     its gradient by z: onehot(y) - p
        entropy H: -sum p log p                     its gradient by z: -p (log p + H)
    """
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float,
                budget: int) -> tuple[Tensor, Tensor]:
        parts, kept = [], []
        for x, y in _chunks(weight, hidden, tokens):
            logp = _log_softmax(x, weight, temperature)  # (chunk, V)
            parts.append((logp.gather(1, y[:, None]).squeeze(1),
                          -torch.linalg.vecdot(logp.exp(), logp)))
            budget -= logp.numel()
            kept += [logp] * (budget >= 0)
        logprobs, entropy = map(torch.cat, zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, tokens, entropy, *kept)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)  # None if the entropy is not trained
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad_logprobs: Tensor | None, grad_entropy: Tensor | None):
        hidden, weight, tokens, entropy, *kept = ctx.saved_tensors
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(entropy)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight, dtype=entropy.dtype)
        start = 0
        for x, y, g, h in _chunks(weight, hidden, tokens, grad_logprobs, entropy):
            reused = bool(kept)  # by another backward pass: not to be overwritten
            z = kept.pop(0) if kept else _log_softmax(x, weight, ctx.temperature)  # log p
            if grad_entropy is None:
                z = (z.exp() if reused else z.exp_()).mul_(-g[:, None])
            else:
                p, g_entropy = z.exp(), grad_entropy[start:start + len(x), None]
                z = z + h[:, None] if reused else z.add_(h[:, None])
                z.mul_(-g_entropy).sub_(g[:, None]).mul_(p)
            z.scatter_add_(1, y[:, None], g[:, None])
            if ctx.temperature != 1:
                z.div_(ctx.temperature)
            z = z.to(weight.dtype)
            grad_hidden[start:start + len(x)] = z @ weight
            if grad_weight is not None and grad_weight.dtype == z.dtype:
                grad_weight.addmm_(z.T, x)
            elif grad_weight is not None:
                grad_weight += matmul_fp32(z.T, x)
            start += len(x)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None


def _chunks(weight: Tensor, *tensors: Tensor):
    size = max(1, (4 if weight.is_cuda else 1) * CHUNK_ELEMENTS // len(weight))
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def _log_softmax(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    logits = matmul_fp32(hidden, weight.T)
    if temperature != 1:
        logits.div_(temperature)
    in_place = logits.device.type == "cpu"  # where new memory costs more than the computation
    return torch.log_softmax(logits, dim=-1, out=logits if in_place else None)


def token_logprobs(logits: Tensor, tokens: Tensor,
                   temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-prob of each token and entropy of its distribution: (B, T, V), (B, T) -> (B, T), (B, T).

    Works in chunks of tokens that the backward pass computes again: the entropy of a large
    vocabulary in one piece takes tens of GB.
    """
    flat_logits, flat_tokens = logits.flatten(0, 1), tokens.flatten()
    chunk = max(1, (4 if logits.is_cuda else 1) * CHUNK_ELEMENTS // logits.shape[-1])
    parts = [checkpoint(_logprobs_and_entropy, x, y, temperature, use_reentrant=False)
             for x, y in zip(flat_logits.split(chunk), flat_tokens.split(chunk), strict=True)]
    logprobs, entropy = map(torch.cat, zip(*parts, strict=True))
    return logprobs.view(tokens.shape), entropy.view(tokens.shape)


def _logprobs_and_entropy(logits: Tensor, tokens: Tensor,
                          temperature: float) -> tuple[Tensor, Tensor]:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logprobs = torch.log_softmax(logits / temperature, dim=-1)  # (chunk, V)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, tokens[:, None]).squeeze(-1), entropy


# ---- do sampler and trainer agree? ---------------------------------------------------------------

def mismatch_stats(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor,
                   cap: float) -> dict[str, Stat]:
    """How far the trainer's log-probs and the sampler's (NaN: unknown) differ, (B, T) each."""
    ratio = importance_weights(old_logprobs, rollout_logprobs, mask, cap=math.inf)
    known = ~rollout_logprobs.isnan()
    return {"mismatch_abs": Stat((old_logprobs - rollout_logprobs).abs(), mask=known),
            "mismatch_kl": Stat(kl_penalty(rollout_logprobs, old_logprobs, "k3"), mask=known),
            "importance_ratio_max": Stat(ratio, "max", known),
            "importance_ratio_clip_frac": Stat(ratio > cap, mask=known)}


def uses_rollout_logprobs(state: TrainState) -> bool:
    """Whether the sampler's log-probs are the old ones. `actor.old_logprobs=auto`: if it is the
    trainer's own model in float32, so that a pass would only compute them again."""
    rollout, chosen = state.config.rollout, state.config.actor.old_logprobs
    same = (not state.engine.has_own_weights and compute_dtype(state.config) == "float32"
            and rollout.top_p == 1 and rollout.correction == "off")
    return same if chosen == "auto" else chosen == "rollout"


def logprob_tolerance(config: SimpleNamespace) -> float:
    """The largest mean difference between two ways to compute log-probs that rounding explains."""
    return {"float32": 1e-3, "float16": 0.02}.get(compute_dtype(config), 0.1)


def check_logprob_mismatch(state: TrainState, step: int, difference: float) -> None:
    """Raise ValueError if sampler and trainer differ beyond rounding: a failed weight sync; or,
    before the first step, a model that computes something else with its cache than without."""
    limit, own_weights = logprob_tolerance(state.config), state.engine.has_own_weights
    if (own_weights or step == 0) and state.config.rollout.top_p == 1 and difference > limit:
        model = type(state.accelerator.unwrap_model(state.policy)).__name__
        cause = ("the rollout engine does not have the policy's weights" if own_weights else
                 f"{model} is not causal, or its cache does not keep all that it needs")
        raise ValueError(f"step {step}: the log-probs of sampler and trainer differ by "
                         f"{difference:.4f} on average, more than rounding explains ({limit}): "
                         f"{cause}")


def check_weight_sync(state: TrainState, prompts: list[Prompt], generate: Callable) -> None:
    """Before the first step: compare log-probs of sampler and trainer on a few responses.

    `generate` is that of rollout.py. If they differ on packed rows, the model is trained on padded
    rows instead. Raises ValueError if they differ on those too.
    """
    config, accelerator = state.config, state.accelerator
    some = [replace(prompts[i % len(prompts)], position=i)
            for i in range(4 * accelerator.num_processes)]  # some for every engine
    params = SamplingParams(2, min(16, config.data.max_response_length), config.rollout.temperature)
    groups, samples = generate(state, some, params, "weight sync", "weight sync"), []
    for prompt, group in zip(some, groups, strict=True):
        samples += [Sample(prompt.token_ids, response.token_ids, 0.0,
                           rollout_logprobs=torch.from_numpy(response.logprobs),
                           key=(prompt.position, i)) for i, response in enumerate(group)]

    def mean_difference() -> float:
        logprobs = compute_logprobs(state, state.policy, [samples])
        return torch.cat([logprobs[sample.key] - sample.rollout_logprobs
                          for sample in samples]).abs().mean().item()

    difference = mean_difference()
    if packing_kind(state.policy) == "varlen" and difference > logprob_tolerance(config):
        for model in filter(None, (state.policy, state.reference)):
            disable_packing(model)
        difference = mean_difference()
        accelerator.print("packed rows change this model's log-probs: it is trained on padded rows")
    check_logprob_mismatch(state, 0, difference)
