"""Rollouts: prompts in, responses with their log-probs out.

An `Engine` (data_types.py) generates them: a transformers model (here), vLLM in this process
(infra/vllm_engine.py) or vLLM servers (infra/vllm_server.py). Each response has its own random
stream, so what is sampled does not depend on how prompts are batched. The log-probs are those of
the distribution that was sampled from, after temperature and top_p.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from inspect import signature

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from data_types import Engine, Prompt, Response, SamplingParams, TrainState
from infra.distributed import map_over_ranks
from infra.memory import out_of_memory
from infra.rng import make_rng
from infra.tokens import make_responses, stop_token_ids


def generate(state: TrainState, prompts: Sequence[Prompt], params: SamplingParams, stream: str,
             description: str) -> list[list[Response]]:
    """`params.n` responses to each prompt, in order, on every rank; all ranks share the work.

    What is sampled for a prompt is a function of the seed, the name of the random `stream` and the
    prompt's position. `description` is for the progress bar and errors. Raises ValueError if the
    engine fails on any rank.
    """
    config = state.config

    def generate_share(share: Sequence[Prompt]) -> list[list[Response]]:
        rngs = [make_rng(config.seed, stream, prompt.position) for prompt in share]
        seeds = [tuple(rng.integers(2**32, size=4).tolist()) for rng in rngs]
        with out_of_memory("generate"):
            return state.engine.generate(
                [prompt.token_ids for prompt in share], seeds, params,
                progress=description if state.accelerator.is_main_process else "")

    # The ranks of one tensor-parallel engine get the same prompts.
    return map_over_ranks(state.accelerator, generate_share, prompts, description,
                          config.rollout.tensor_parallel_size)


# ---- decoding with transformers ------------------------------------------------------------------

def transformers_engine(model, tokenizer, autocast: Callable, max_num_seqs: int,
                        has_own_weights: bool) -> Engine:
    """An `Engine` over a model of transformers, the policy itself or a copy (`has_own_weights`)."""
    @torch.no_grad()
    def sync(weights):
        if has_own_weights:
            copies = model.state_dict()
            for name, weight in weights:
                copies[name].copy_(weight)

    return Engine(partial(transformers_generate, model, tokenizer, max_num_seqs=max_num_seqs,
                          autocast=autocast),
                  sync, sleep=lambda: None, close=lambda: None, has_own_weights=has_own_weights)


def transformers_generate(model, tokenizer, prompts: Sequence[list[int]],
                          seeds: Sequence[tuple[int, ...]], params: SamplingParams,
                          progress: str = "", max_num_seqs: int = 512,
                          autocast: Callable = nullcontext) -> list[list[Response]]:
    """`Engine.generate` with a model of transformers.

    Each prompt is run through the model once for its n responses, of which at most `max_num_seqs`
    are decoded at a time; `autocast` makes the context that the model computes in.
    """
    n, checkpointing = params.n, [module for module in model.modules() if module.training]
    model.eval()  # layers with gradient checkpointing would drop the cache
    stop_ids = torch.tensor(stop_token_ids(model, tokenizer), device=model.device)
    has_stop_string = partial(ends_response, tokenizer, params.stop) if params.stop else None
    chunk = max(1, max_num_seqs // n)
    groups = []
    for start in tqdm(range(0, len(prompts), chunk), desc=progress, disable=not progress,
                      leave=False, delay=10):
        rngs = [np.random.default_rng([*seed, i])
                for seed in seeds[start:start + chunk] for i in range(n)]
        uniforms = [rng.random(params.max_tokens, dtype=np.float32) for rng in rngs]
        with autocast():
            rows = decode(model, prompts[start:start + chunk],
                          torch.from_numpy(np.stack(uniforms)).to(model.device), params, stop_ids,
                          has_stop_string)
        groups += make_responses(tokenizer, rows, n)
    for module in checkpointing:
        module.training = True
    return groups


def ends_response(tokenizer, strings: Sequence[str], tokens: Tensor) -> Tensor:
    """Whether the last of the tokens (B, T) of each row has completed one of the strings: (B,)."""
    last = max(len(string.encode()) for string in strings) + 1  # a token has a byte or more
    return torch.tensor([any(string in text for string in strings)
                         for text in tokenizer.batch_decode(tokens[:, -last:])],
                        device=tokens.device)


class GrowingLayer(DynamicLayer):
    """Keys and values of a layer, of `most_tokens` at most, written into buffers with room for more
    tokens: the library's own layer copies all that it has for each token."""
    def __init__(self, most_tokens: int):
        super().__init__()
        self.most_tokens, self.last = most_tokens, None

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.keys, self.values = keys, values
            return keys, values
        old, length = self.keys.shape[-2], self.keys.shape[-2] + keys.shape[-2]
        if self.keys is not self.last or length > self.buffers[0].shape[-2]:  # reordered, or full
            room = min(length + max(64, length // 4), self.most_tokens)
            self.buffers = [x.new_empty(*x.shape[:-2], room, x.shape[-1])
                            for x in (self.keys, self.values)]
            for buffer, x in zip(self.buffers, (self.keys, self.values), strict=True):
                buffer[..., :old, :] = x
        for buffer, x in zip(self.buffers, (keys, values), strict=True):
            buffer[..., old:length, :] = x
        self.keys, self.values = (buffer[..., :length, :] for buffer in self.buffers)
        self.last = self.keys
        return self.keys, self.values


def prefill(model, prompts: Sequence[list[int]], cache: DynamicCache,
            caching: dict) -> tuple[Tensor, Tensor]:
    """Fill the cache with the prompts: the logits (prompts, V) of what comes next, and which of the
    cache's positions are those of a prompt (prompts, P), padded on the left or behind what they
    share."""
    device, shared = model.device, 0
    first, last = min(prompts), max(prompts)
    while shared < min(len(first), len(last)) - 1 and first[shared] == last[shared]:
        shared += 1
    plain = all(type(layer) is GrowingLayer for layer in cache.layers)
    if plain and shared >= 16 and len(prompts) > 1:
        # A system prompt or worked examples, which all prompts begin with, are computed once.
        model(input_ids=torch.tensor([first[:shared]], device=device), logits_to_keep=1, **caching)
        cache.reorder_cache(torch.zeros(len(prompts), dtype=torch.long, device=device))
    else:
        shared = 0
    ids = pad_sequence([torch.tensor(prompt[shared:]) for prompt in prompts], batch_first=True,
                       padding_side="left").to(device)
    lengths = torch.tensor([len(prompt) - shared for prompt in prompts], device=device)
    mask = torch.arange(ids.shape[1], device=device) >= ids.shape[1] - lengths[:, None]
    mask = torch.cat([mask.new_ones(len(prompts), shared), mask], dim=1)
    logits = model(input_ids=ids, attention_mask=mask.long(), logits_to_keep=1,
                   position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, shared:], **caching).logits
    return logits[:, -1], mask


@torch.no_grad()
def decode(model, prompts: Sequence[list[int]], uniforms: Tensor, params: SamplingParams,
           stop_ids: Tensor, has_stop_string: Callable | None = None,
           ) -> list[tuple[np.ndarray, np.ndarray, bool | str]]:
    """The decoding loop over B = len(prompts) * n responses, from `uniforms` (B, max_tokens).

    `has_stop_string`: whether each row of tokens has come to a stop string. Returns, for each
    response, its token ids, their log-probs, and what ended it, as `make_responses` takes it.
    """
    device, n, (size, max_tokens) = model.device, params.n, uniforms.shape
    cache = DynamicCache(config=model.config)
    most_tokens = max(map(len, prompts)) + max_tokens
    cache.layers = [GrowingLayer(most_tokens) if type(layer) is DynamicLayer else layer
                    for layer in cache.layers]
    is_mamba = "cache_params" in signature(model.forward).parameters  # its name for the cache
    caching = {"cache_params" if is_mamba else "past_key_values": cache, "use_cache": True}
    logits, mask = prefill(model, prompts, cache, caching)
    lengths = mask.sum(1)
    repeated = torch.arange(size, device=device) // n
    cache.reorder_cache(repeated)  # every layer has it: states are selected like keys and values
    logits = logits[repeated]  # (B, V)
    mask = torch.cat([mask.repeat_interleave(n, dim=0), mask.new_ones(size, max_tokens)], dim=1)
    mask, lengths = mask.long(), lengths.repeat_interleave(n)  # (B, P + max_tokens), (B,)

    tokens = torch.zeros(size, max_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(size, max_tokens, device=device)
    num_tokens = torch.zeros(size, dtype=torch.long, device=device)
    rows = torch.arange(size, device=device)  # the response of each row of the running batch
    running = torch.ones(size, dtype=torch.bool, device=device)  # the rows that have not ended
    at_string = torch.zeros_like(running)
    for t in range(max_tokens):
        token, logprob = sample_tokens(logits, uniforms[:, t], params.temperature, params.top_p)
        tokens[rows, t], logprobs[rows, t] = token, logprob
        num_tokens[rows] += running
        running = running & ~torch.isin(token, stop_ids)
        if has_stop_string:
            found = running & has_stop_string(tokens[rows, :t + 1])
            at_string[rows] |= found
            running = running & ~found
        remaining = int(running.sum())
        if not remaining or t == max_tokens - 1:
            break
        if remaining < 0.9 * len(rows):  # not at each that ends: removing rows copies the cache
            cache.reorder_cache(running.nonzero().squeeze(1))
            rows, token, uniforms, lengths, mask, running = (
                x[running] for x in (rows, token, uniforms, lengths, mask, running))
        logits = model(input_ids=token[:, None], position_ids=(lengths + t)[:, None],
                       attention_mask=None if is_mamba else mask[:, :t + 1 - max_tokens],
                       **caching).logits[:, -1]
    stopped = torch.isin(tokens.gather(1, num_tokens[:, None] - 1).squeeze(1), stop_ids)
    all_ids, all_logprobs = tokens.int().cpu().numpy(), logprobs.cpu().numpy()
    ended = ["stop string" if string else bool(stop) for string, stop in
             zip(at_string.tolist(), stopped.tolist(), strict=True)]
    return [(all_ids[i, :count].copy(), all_logprobs[i, :count].copy(), ended[i])
            for i, count in enumerate(num_tokens.tolist())]


def sample_tokens(logits: Tensor, uniforms: Tensor, temperature: float,
                  top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """One token for each row of logits (B, V) from a uniform number in [0, 1) each, and its
    log-prob: (B,), (B,). Temperature 0 is greedy, with the log-prob at temperature 1.
    """
    logprobs = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        token = logprobs.argmax(-1)
    else:
        if top_p < 1:
            logprobs = top_p_filter(logprobs, top_p)
        cumulative = logprobs.exp().cumsum(-1)  # (B, V); its end is 1 only up to rounding
        target = uniforms[:, None] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, target, right=True).squeeze(1)
        token = token.clamp(max=logits.shape[-1] - 1)
    return token, logprobs.gather(-1, token[:, None]).squeeze(1)


def top_p_filter(logprobs: Tensor, top_p: float) -> Tensor:
    """Log-probs (B, V), renormalised over the fewest most probable tokens whose probabilities sum
    to at least `top_p`; -inf elsewhere."""
    ordered, order = logprobs.sort(dim=-1, descending=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()  # the sum of all more probable tokens
    ordered = ordered.masked_fill(before >= top_p, -torch.inf)
    return torch.log_softmax(torch.empty_like(logprobs).scatter_(-1, order, ordered), dim=-1)
