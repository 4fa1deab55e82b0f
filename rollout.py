"""Rollouts: token ids of prompts in, responses with their log-probs out.

An `Engine` is a few functions over a transformers model (here), vLLM in this process
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

from data_types import Engine, Prompt, Response, SamplingParams
from infra.distributed import Remote, map_over_ranks
from infra.memory import out_of_memory
from infra.rng import make_rng


def generate(state, prompts: Sequence[Prompt], positions: Sequence[int], purpose: str,
             params: SamplingParams) -> list[list[Response]]:
    """`params.n` responses to each prompt, in order; all ranks share the work. A rank gets whole
    responses of its own prompts, and lengths and finish reasons of the others.

    What is sampled for a prompt is a function of the seed, `purpose` and its position. Raises
    ValueError if the engine fails on any rank. `state` is a TrainState.
    """
    config, accelerator, whole = state.config, state.accelerator, {}
    rank, per_engine = accelerator.process_index, config.rollout.tensor_parallel_size
    engines = accelerator.num_processes // per_engine
    # an engine's ranks, which are neighbours, generate for its prompts together, and divide them
    owners = [i % engines * per_engine + i // engines % per_engine for i in range(len(prompts))]

    def generate_share(own: list[int]) -> np.ndarray:
        """The number of tokens of each response, (prompts, n), negative if it is truncated."""
        indices = range(rank // per_engine, len(prompts), engines)
        rngs = [make_rng(config.seed, purpose, positions[i]) for i in indices]
        seeds = [tuple(rng.integers(2**32, size=4).tolist()) for rng in rngs]
        with out_of_memory("generate"):
            groups = state.engine.generate([prompts[i].token_ids for i in indices], seeds, params,
                                           progress=purpose if accelerator.is_main_process else "")
        whole.update(zip(indices, groups, strict=True))
        return np.array([[len(response.token_ids) * (1 if response.finish_reason == "stop" else -1)
                          for response in whole[i]] for i in own], np.int32)

    responses = []
    for i, lengths in enumerate(map_over_ranks(accelerator, generate_share, range(len(prompts)),
                                               owners, purpose)):
        responses.append(whole[i] if owners[i] == rank else [
            Response(Remote(abs(length), owners[i]), None, None, "stop" if length > 0 else "length")
            for length in lengths.tolist()])
    return responses


# ---- responses -----------------------------------------------------------------------------------

def make_responses(tokenizer, rows: Sequence[tuple[np.ndarray, np.ndarray | None, bool]],
                   n: int) -> list[list[Response]]:
    """Groups of `n` responses, from their token ids, log-probs (None: not asked for), and whether
    the last token ended them. Raises ValueError if a log-prob is not finite."""
    texts = tokenizer.batch_decode([ids for ids, _, _ in rows], skip_special_tokens=True)
    responses = []
    for (ids, logprobs, stopped), text in zip(rows, texts, strict=True):
        if logprobs is None:
            logprobs = np.full(len(ids), np.nan, dtype=np.float32)
        elif not np.isfinite(logprobs).all():
            raise ValueError("log-probs are not finite: the policy has diverged, or overflows")
        responses.append(Response(ids, logprobs, text, "stop" if stopped else "length"))
    return [responses[i:i + n] for i in range(0, len(responses), n)]


def stop_token_ids(model, tokenizer) -> list[int]:
    """Every token that ends a response: the model's generation config may name several."""
    configured = model.generation_config.eos_token_id
    ids = set(configured if isinstance(configured, list) else [configured])
    return sorted((ids | {tokenizer.eos_token_id}) - {None})


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
    training, n = model.training, params.n
    model.eval()  # gradient checkpointing, which needs training mode, would drop the cache
    stop_ids = torch.tensor(stop_token_ids(model, tokenizer), device=model.device)
    chunk = max(1, max_num_seqs // n)
    groups = []
    for start in tqdm(range(0, len(prompts), chunk), desc=progress, disable=not progress,
                      leave=False, delay=10):
        rngs = [np.random.default_rng([*seed, i])
                for seed in seeds[start:start + chunk] for i in range(n)]
        uniforms = [rng.random(params.max_tokens, dtype=np.float32) for rng in rngs]
        with autocast():
            rows = decode(model, prompts[start:start + chunk],
                          torch.from_numpy(np.stack(uniforms)).to(model.device), params, stop_ids)
        groups += make_responses(tokenizer, rows, n)
    model.train(training)
    return groups


@torch.no_grad()
def decode(model, prompts: Sequence[list[int]], uniforms: Tensor, params: SamplingParams,
           stop_ids: Tensor) -> list[tuple[np.ndarray, np.ndarray, bool]]:
    """The decoding loop over B = len(prompts) * n responses, from `uniforms` (B, max_tokens).

    Returns, for each response, its token ids, their log-probs, and whether an EOS ended it.
    """
    device, n, (size, max_tokens) = model.device, params.n, uniforms.shape
    ids = pad_sequence([torch.tensor(p) for p in prompts], batch_first=True,
                       padding_side="left").to(device)  # (prompts, P)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    mask = torch.arange(ids.shape[1], device=device) >= ids.shape[1] - lengths[:, None]
    cache = DynamicCache(config=model.config)
    is_mamba = "cache_params" in signature(model.forward).parameters  # its name for the cache
    caching = {"cache_params" if is_mamba else "past_key_values": cache, "use_cache": True}
    logits = model(input_ids=ids, attention_mask=mask.long(), logits_to_keep=1,
                   position_ids=(mask.cumsum(1) - 1).clamp(min=0), **caching).logits[:, -1]
    repeated = torch.arange(size, device=device) // n
    cache.reorder_cache(repeated)  # every layer has it: states are selected like keys and values
    logits = logits[repeated]  # (B, V)
    mask = torch.cat([mask.repeat_interleave(n, dim=0), mask.new_ones(size, max_tokens)], dim=1)
    mask, lengths = mask.long(), lengths.repeat_interleave(n)

    tokens = torch.zeros(size, max_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(size, max_tokens, device=device)
    num_tokens = torch.zeros(size, dtype=torch.long, device=device)
    rows = torch.arange(size, device=device)  # the response of each row of the running batch
    running = torch.ones(size, dtype=torch.bool, device=device)  # the rows that have not ended
    for t in range(max_tokens):
        token, logprob = sample_tokens(logits, uniforms[:, t], params.temperature, params.top_p)
        tokens[rows, t], logprobs[rows, t] = token, logprob
        num_tokens[rows] += running
        running = running & ~torch.isin(token, stop_ids)
        remaining = int(running.sum())
        if not remaining or t == max_tokens - 1:
            break
        if remaining < 0.9 * len(rows):  # ended rows leave, several at once: the cache is copied
            cache.reorder_cache(running.nonzero().squeeze(1))
            rows, token, uniforms, lengths, mask, running = (
                x[running] for x in (rows, token, uniforms, lengths, mask, running))
        logits = model(input_ids=token[:, None], position_ids=(lengths + t)[:, None],
                       attention_mask=None if is_mamba else mask[:, :ids.shape[1] + t + 1],
                       **caching).logits[:, -1]
    stopped = torch.isin(tokens.gather(1, num_tokens[:, None] - 1).squeeze(1), stop_ids)
    all_ids, all_logprobs = tokens.int().cpu().numpy(), logprobs.cpu().numpy()
    return [(all_ids[i, :count].copy(), all_logprobs[i, :count].copy(), ended) for i, (count, ended)
            in enumerate(zip(num_tokens.tolist(), stopped.tolist(), strict=True))]


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
        cumulative = logprobs.exp().cumsum(-1)  # (B, V); scaled, since it ends only near 1
        target = uniforms[:, None] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, target, right=True).squeeze(1)
        token = token.clamp(max=logits.shape[-1] - 1)
    return token, logprobs.gather(-1, token[:, None]).squeeze(1)


def top_p_filter(logprobs: Tensor, top_p: float) -> Tensor:
    """Renormalised to the fewest most probable tokens whose probabilities sum to `top_p`."""
    ordered, order = logprobs.sort(dim=-1, descending=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()  # the sum of all more probable tokens
    ordered = ordered.masked_fill(before >= top_p, -torch.inf)
    return torch.log_softmax(torch.empty_like(logprobs).scatter_(-1, order, ordered), dim=-1)
