"""How does the current policy write responses? Token ids in, responses with their log-probs out.

An `Engine` is a few functions, behind which is a transformers model (here), vLLM in this process (rollout_vllm.py)
or vLLM servers (rollout_server.py). In each case a response has a random stream of its own, so what is sampled does
not depend on how prompts are batched, and the log-probs that come with the tokens are those of the distribution
that was sampled from, after temperature and top_p.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import DynamicCache


@dataclass(frozen=True)
class Response:
    """What the policy wrote. `token_ids` (T,) int32 end with the EOS, where there was one: then
    `finish_reason` is `stop`, else `length`. `logprobs` (T,) float32. `text` has no special tokens."""
    token_ids: np.ndarray
    logprobs: np.ndarray
    text: str
    finish_reason: str


@dataclass(frozen=True)
class Engine:
    """`write(prompts, seeds, n, max_tokens, temperature, top_p, progress)`: n responses to each prompt, as `generate`
    has it. `sync(weights)`: take these (name, value) pairs as the policy's weights. `rest()`: until the next sync,
    nothing is to be written; give up memory. `close()`: the run is over. `apart`: whether its weights are a copy of
    the policy's."""
    write: Callable[..., list[list[Response]]]
    sync: Callable[[Iterable[tuple[str, Tensor]]], None]
    rest: Callable[[], None]
    close: Callable[[], None]
    apart: bool


def transformers_engine(model, tokenizer, autocast: Callable, max_num_seqs: int, apart: bool) -> Engine:
    """The model writes; `apart` says that it is a copy of the policy, not the policy itself."""
    @torch.no_grad()
    def sync(weights):
        if apart:
            copies = model.state_dict()
            for name, weight in weights:
                copies[name].copy_(weight)
    write = partial(generate, model, tokenizer, max_num_seqs=max_num_seqs, autocast=autocast)
    return Engine(write, sync, rest=lambda: None, close=lambda: None, apart=apart)


def pack(groups: Sequence[Sequence[Response]]) -> tuple:
    """Responses as few flat arrays, to travel between processes: 8 bytes a token, and the texts."""
    flat = [response for group in groups for response in group]
    lengths = np.array([len(response.token_ids) for response in flat], dtype=np.int32)
    return (lengths, np.array([response.finish_reason == "stop" for response in flat]),
            np.concatenate([np.empty(0, np.int32), *(response.token_ids for response in flat)]),
            np.concatenate([np.empty(0, np.float32), *(response.logprobs for response in flat)]),
            [response.text for response in flat])


def unpack(packed: tuple, n: int) -> list[list[Response]]:
    """The groups of `n` responses that `pack` was given."""
    lengths, stopped, token_ids, logprobs, texts = packed
    ends = lengths.cumsum()[:-1]
    flat = [Response(ids, values, text, "stop" if stop else "length") for ids, values, text, stop in
            zip(np.split(token_ids, ends), np.split(logprobs, ends), texts, stopped, strict=True)] if texts else []
    return [flat[i:i + n] for i in range(0, len(flat), n)]


def make_responses(tokenizer, rows: Sequence[tuple[np.ndarray, np.ndarray, bool]]) -> list[Response]:
    """Responses of token ids, their log-probs, and whether the last one is an EOS."""
    texts = tokenizer.batch_decode([ids for ids, _, _ in rows], skip_special_tokens=True)
    return [Response(ids, logprobs, text, "stop" if stopped else "length")
            for (ids, logprobs, stopped), text in zip(rows, texts, strict=True)]


def request_seed(seed: tuple[int, ...]) -> int:
    """The seed of a prompt's request to vLLM, which gives the i-th response this plus i."""
    return int(np.random.default_rng(seed).integers(2**62))


def stop_token_ids(model, tokenizer) -> list[int]:
    """Every token that ends a response: the model's generation config may name several."""
    configured = model.generation_config.eos_token_id
    ids = set(configured if isinstance(configured, list) else [configured]) | {tokenizer.eos_token_id}
    return sorted(ids - {None})


def generate(model, tokenizer, prompts: Sequence[list[int]], seeds: Sequence[tuple[int, ...]], n: int,
             max_tokens: int, temperature: float, top_p: float = 1.0, progress: str = "", max_num_seqs: int = 512,
             autocast: Callable = nullcontext) -> list[list[Response]]:
    """`n` responses to each prompt.

    Args:
        prompts: token ids; each is run through the model once for its n responses.
        seeds: for each prompt, integers that determine all that is sampled for it.
        temperature: 0 takes the most probable token.
        max_num_seqs: responses written at a time.
        autocast: makes the context that the model computes in.
        progress: what to call this on a progress bar, should it take more than seconds; "" shows none.
    """
    training = model.training
    model.eval()  # gradient checkpointing, which only works in training mode, would drop the cache
    stop_ids = torch.tensor(stop_token_ids(model, tokenizer), device=model.device)
    chunk = max(1, max_num_seqs // n)
    starts, groups = range(0, len(prompts), chunk), []
    for start in tqdm(starts, desc=progress, disable=not progress, leave=False, delay=10):
        uniforms = np.stack([np.random.default_rng([*seed, sample]).random(max_tokens, dtype=np.float32)
                             for seed in seeds[start:start + chunk] for sample in range(n)])
        with autocast():
            rows = _generate(model, prompts[start:start + chunk], torch.from_numpy(uniforms).to(model.device), n,
                             temperature, top_p, stop_ids)
        responses = make_responses(tokenizer, rows)
        groups += [responses[i:i + n] for i in range(0, len(responses), n)]
    model.train(training)
    return groups


@torch.no_grad()
def _generate(model, prompts, uniforms: Tensor, n: int, temperature: float, top_p: float,
              stop_ids: Tensor) -> list[tuple[np.ndarray, np.ndarray, bool]]:
    """The decoding loop over one batch of B = len(prompts) * n responses; `uniforms` (B, max_tokens)."""
    device, (size, max_tokens) = model.device, uniforms.shape
    ids = pad_sequence([torch.tensor(p) for p in prompts], batch_first=True, padding_side="left").to(device)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    mask = torch.arange(ids.shape[1], device=device) >= ids.shape[1] - lengths[:, None]
    output = model(input_ids=ids, attention_mask=mask.long(), past_key_values=DynamicCache(config=model.config),
                   position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=True, logits_to_keep=1)
    cache, logits = output.past_key_values, output.logits[:, -1].repeat_interleave(n, dim=0)  # (B, V)
    cache.batch_repeat_interleave(n)
    mask = torch.cat([mask.repeat_interleave(n, dim=0), mask.new_ones(size, max_tokens)], dim=1).long()
    lengths = lengths.repeat_interleave(n)

    tokens = torch.zeros(size, max_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(size, max_tokens, device=device)
    written = torch.zeros(size, dtype=torch.long, device=device)
    stopped = torch.zeros(size, dtype=torch.bool, device=device)
    rows = torch.arange(size, device=device)  # which response each row of the running batch is
    for t in range(max_tokens):
        token, logprob = sample_tokens(logits, uniforms[rows, t], temperature, top_p)
        running = ~stopped[rows]
        live = rows[running]
        tokens[live, t], logprobs[live, t] = token[running], logprob[running]
        written[live] += 1
        stopped[live] = torch.isin(token[running], stop_ids)
        keep = ~stopped[rows]
        remaining = int(keep.sum())
        if not remaining or t == max_tokens - 1:
            break
        if remaining < 0.9 * len(rows):  # finished rows leave; a copy of the cache for each would cost more
            rows, token = rows[keep], token[keep]
            cache.batch_select_indices(keep.nonzero().squeeze(1))
        logits = model(input_ids=token[:, None], attention_mask=mask[rows, :ids.shape[1] + t + 1],
                       position_ids=(lengths[rows] + t)[:, None], past_key_values=cache, use_cache=True).logits[:, -1]
    ids_out, logprobs_out = tokens.int().cpu().numpy(), logprobs.cpu().numpy()
    return [(ids_out[i, :w].copy(), logprobs_out[i, :w].copy(), s)
            for i, (w, s) in enumerate(zip(written.tolist(), stopped.tolist(), strict=True))]


def sample_tokens(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """One token for each row of logits (B, V) from one uniform number in [0, 1) each (B,), and its log-prob.

    Temperature 0 is greedy, with the log-prob at temperature 1.
    """
    logprobs = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        token = logprobs.argmax(-1)
    else:
        if top_p < 1:
            logprobs = top_p_filter(logprobs, top_p)
        cumulative = logprobs.exp().cumsum(-1)  # (B, V); scaled, since rounding leaves its end beside 1
        target = uniforms[:, None] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)
    return token, logprobs.gather(-1, token[:, None]).squeeze(1)


def top_p_filter(logprobs: Tensor, top_p: float) -> Tensor:
    """Renormalised to the fewest most probable tokens whose probabilities add up to at least `top_p`."""
    ordered, order = logprobs.sort(dim=-1, descending=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()  # the probability of all that is more probable
    ordered = ordered.masked_fill(before >= top_p, -torch.inf)
    return torch.log_softmax(torch.empty_like(logprobs).scatter_(-1, order, ordered), dim=-1)
