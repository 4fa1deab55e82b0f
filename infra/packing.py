"""Attention over sequences of different lengths in one row, without padding, each prompt once.

A packed row consists of families: a prompt of P tokens, followed by its responses, each of which
attends to the prompt and to itself, at positions from P on: P + n T tokens instead of n (P + T). A
family (P, (T1, T2, ...)) is written by its lengths; (L, ()) is a single sequence.

Everything else in a model works on single tokens and has no padding. `packed_attention` calls
torch's own kernel for such rows where it works (on GPUs, in half precision), or splits the row into
blocks of sequences of similar length. This holds for models all of whose layers are plain causal
attention. Of others, flash attention, if installed, takes packed rows too, of single sequences; the
rest are trained on padded rows, and so is a model whose log-probs on packed rows are not the
sampler's (`logprobs.check_weight_sync`).
"""

from collections.abc import Sequence
from functools import lru_cache
from inspect import signature
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from infra.precision import round_like_autocast

PACKED_ATTENTION = "packed_attention"  # its name among those of transformers
SHARES_PROMPTS = "varlen"  # the kind of packed row in which responses share a prompt
MIN_LENGTH_RATIO = 0.75  # of the shortest sequence of a block to its longest


def enable_packing(model: PreTrainedModel) -> None:
    """Use `packed_attention` if the model allows it; rows that are not packed attend as before."""
    config = model.config.get_text_config(decoder=True)
    plain = (set(getattr(config, "layer_types", None) or ()) <= {"full_attention"}
             and not model._is_stateful and not getattr(config, "sliding_window", None))
    sdpa = model.config._attn_implementation == "sdpa"
    if sdpa and model._supports_attention_backend and plain:
        model.set_attn_implementation(PACKED_ATTENTION)


def disable_packing(model: PreTrainedModel) -> None:
    """Train on padded rows."""
    getattr(model, "module", model).set_attn_implementation("sdpa")


def packing_kind(model: torch.nn.Module) -> str:
    """The kind of packed row that the model takes: `varlen`, `flash`, or "" for none."""
    model = getattr(model, "module", model)
    attention = model.config._attn_implementation
    if attention == PACKED_ATTENTION:
        return SHARES_PROMPTS
    return "flash" if "flash" in attention and not model._is_stateful else ""


def packing_kwargs(families: Sequence[tuple[int, tuple[int, ...]]], packing: str,
                   device: torch.device | str) -> dict:
    """The model's keyword arguments for a packed row of these families."""
    positions = [np.arange(len(context), len(context) + len(own))
                 for context, own in split_row(families)]
    kwargs = {"position_ids": torch.from_numpy(np.concatenate(positions))[None].to(device)}
    if packing == SHARES_PROMPTS:  # a mask of four dimensions keeps transformers from making one
        kwargs |= {"attention_mask": torch.ones(1, 1, 1, 1, device=device),
                   "packed_families": tuple(families)}
    return kwargs


def split_row(families: Sequence[tuple[int, tuple[int, ...]]]) -> list[tuple[range, range]]:
    """The sequences of a packed row: the tokens of the row that each attends to besides its own
    (its prompt; none, for prompts), and its own."""
    sequences, end = [], 0
    for prompt, responses in families:
        context = range(end, end + prompt)
        sequences.append((range(0), context))
        for length in responses:
            start = sequences[-1][1].stop
            sequences.append((context, range(start, start + length)))
        end = sequences[-1][1].stop
    return sequences


@lru_cache(maxsize=1)  # all layers of a model ask for the same
def make_cu_seqlens(families: tuple, device: torch.device) -> tuple:
    """Of a packed row: where the queries of each sequence begin, and the last one's end, and the
    same of its keys, (sequences + 1,) int32; the most of each; which token of the row each key is,
    or None if they are the row."""
    sequences = split_row(families)
    queries = [len(own) for _, own in sequences]
    keys = [len(context) + len(own) for context, own in sequences]
    starts = [torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
              for lengths in (queries, keys)]
    index = None
    if keys != queries:
        parts = [np.arange(part.start, part.stop) for sequence in sequences for part in sequence]
        index = torch.from_numpy(np.concatenate(parts)).to(device)
    return *starts, max(queries), max(keys), index


@lru_cache(maxsize=1)
def make_blocks(families: tuple, device: torch.device) -> tuple:
    """Blocks of a packed row's sequences, padded to their longest: those with as long a context and
    similar lengths. Returns rows, queries and keys of each block, and its mask (queries, keys),
    None if causal; which token of the row each query, and each key, of all blocks is, any if
    padding; and where among the queries each token of the row is."""
    sequences, blocks, queries, keys = split_row(families), [], [], []
    count = sequences[-1][1].stop
    sequences.sort(key=lambda one: (len(one[0]), len(one[1])), reverse=True)
    for context, own in sequences:
        first_context, first = blocks[-1][0] if blocks else (None, range(0))
        if (len(own) < MIN_LENGTH_RATIO * len(first) or first_context is None
                or len(context) != len(first_context)):
            blocks.append([])
        blocks[-1].append((context, own))
    shapes, masks = [], []
    for block in blocks:
        before, length = len(block[0][0]), len(block[0][1])
        column, starts = np.arange(length), np.array([own.start for _, own in block])[:, None]
        lengths = np.array([len(own) for _, own in block])[:, None]
        padded = np.where(column < lengths, starts + column, -1)  # (rows, queries)
        contexts = np.array([context.start for context, _ in block])[:, None] + np.arange(before)
        shapes.append((len(block), length, before + length))
        mask = torch.ones(length, before + length, dtype=torch.bool, device=device).tril(before)
        masks.append(mask if before else None)
        queries.append(padded.ravel())
        keys.append(np.concatenate([contexts, padded], axis=1).ravel())
    queries, keys = (torch.from_numpy(np.concatenate(index)) for index in (queries, keys))
    places = queries.argsort()[-count:]  # the padding, -1, comes first
    return (shapes, masks, queries.clamp(min=0).to(device), keys.clamp(min=0).to(device),
            places.to(device))


def packed_attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask,
                     packed_families: tuple = (), **kwargs) -> tuple[Tensor, None]:
    """An attention function of transformers: (1, heads, N, d) -> (1, N, heads, d) for a packed row
    of `packed_families`; without them, transformers' own sdpa."""
    if not packed_families:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    inputs = round_like_autocast(query, key, value)  # autocast does so for sdpa, but not for varlen
    shapes = tuple((x.shape[1], x.shape[3]) for x in inputs)
    kernel = varlen_sdpa if varlen_works(query.device, inputs[0].dtype, shapes) else block_sdpa
    return kernel(module, *inputs, packed_families, **kwargs), None


def varlen_sdpa(module, query: Tensor, key: Tensor, value: Tensor, families: tuple,
                scaling: float | None = None, **kwargs) -> Tensor:
    """Attention within each family, by torch's kernel for packed rows. If a sequence has more keys
    than queries, its causal mask is aligned at the end."""
    cu_queries, cu_keys, most_queries, most_keys, index = make_cu_seqlens(families, query.device)
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, heads, d)
    if index is not None:
        key, value = key.index_select(0, index), value.index_select(0, index)
    # torch 2.11 has no such option, and computes it all the same
    gqa = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
    return varlen_attn(query, key, value, cu_queries, cu_keys, most_queries, most_keys,
                       scale=scaling, window_size=(-1, 0), **gqa)[None]


def block_sdpa(module, query: Tensor, key: Tensor, value: Tensor, families: tuple,
               **kwargs) -> Tensor:
    """The same by sdpa, block by block."""
    shapes, masks, query_index, key_index, places = make_blocks(families, query.device)
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, heads, d)
    queries = query.index_select(0, query_index).split([rows * q for rows, q, _ in shapes])
    keys, values = (x.index_select(0, key_index).split([rows * k for rows, _, k in shapes])
                    for x in (key, value))
    outputs = []
    for (rows, _, _), mask, *block in zip(shapes, masks, queries, keys, values, strict=True):
        block = (x.unflatten(0, (rows, -1)).transpose(1, 2) for x in block)
        outputs.append(sdpa_attention_forward(module, *block, mask, **kwargs)[0].flatten(0, 1))
    return torch.cat(outputs).index_select(0, places)[None]


@lru_cache
def varlen_works(device: torch.device, dtype: torch.dtype, shapes: tuple) -> bool:
    """Whether `varlen_sdpa` runs, and gives the output and gradients of `block_sdpa` for a small
    row. `shapes`: heads and head size of query, key and value."""
    families, generator, found = ((70, ()), (65, (9, 30, 1))), torch.Generator().manual_seed(0), []
    module = SimpleNamespace(num_key_value_groups=shapes[0][0] // shapes[1][0])
    inputs = [torch.randn(1, heads, 175, size, generator=generator)
              for heads, size in shapes]
    try:  # in the middle of a model's pass, of which gradient checkpointing sees nothing
        with (torch.enable_grad(), torch.autocast(device.type, enabled=False),
              torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)):
            for kernel in (varlen_sdpa, block_sdpa):
                qkv = [x.to(device, dtype).requires_grad_() for x in inputs]
                output = kernel(module, *qkv, families, scaling=0.1)
                found.append([output.detach(), *torch.autograd.grad(output.square().sum(), qkv)])
    except (RuntimeError, ValueError):  # no such kernel for this device, type or head size
        return False
    return all((a - b).abs().max() < 0.05 * b.abs().max()  # bfloat16 rounds to 0.01 of it
               for a, b in zip(*found, strict=True))


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
