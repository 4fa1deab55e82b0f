"""Attention over sequences of different lengths in one row, without padding.

If flash attention is installed, its kernels take such a packed row. Otherwise `block_sdpa` does:
everything else in a model works on single tokens and has no padding, and attention splits the row
into blocks of sequences of similar length. This holds for models all of whose layers are plain
causal attention; others are trained on padded rows, and so is a model whose log-probs on packed
rows are not the sampler's (`logprobs.check_weight_sync`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BLOCK_SDPA = "block_sdpa"  # the name of this attention among those of transformers
SHORTEST = 0.75  # the shortest sequence of a block, as a part of its longest


class Block(NamedTuple):
    """Neighbouring sequences of a packed row, `size` tokens in all, the longest with `longest`.

    `gather_index` (rows * longest,) makes rows of equal length of them (padded with any token),
    `scatter_index` (size,) finds their tokens among those. None if all have the same length.
    """
    size: int
    longest: int
    gather_index: Tensor | None
    scatter_index: Tensor | None


def enable_packing(model: PreTrainedModel) -> None:
    """Use `block_sdpa` for packed rows if the model allows it; other input attends as before."""
    config = model.config.get_text_config(decoder=True)
    plain = (set(getattr(config, "layer_types", None) or ()) <= {"full_attention"}
             and not model._is_stateful and not getattr(config, "sliding_window", None))
    sdpa = model.config._attn_implementation == "sdpa"
    if sdpa and model._supports_attention_backend and plain:
        model.set_attn_implementation(BLOCK_SDPA)


def disable_packing(model: PreTrainedModel) -> None:
    """Train on padded rows."""
    getattr(model, "module", model).set_attn_implementation("sdpa")


def packing_kind(model: torch.nn.Module) -> str:
    """The kind of packed row that the model takes: `blocks`, `flash`, or "" for none."""
    model = getattr(model, "module", model)
    attention = model.config._attn_implementation
    if attention == BLOCK_SDPA:
        return "blocks"
    return "flash" if "flash" in attention and not model._is_stateful else ""


def packing_kwargs(lengths: Sequence[int], packing: str, device: torch.device | str) -> dict:
    """The model's keyword arguments for a packed row of sequences with these lengths."""
    positions = torch.cat([torch.arange(length) for length in lengths])
    kwargs = {"position_ids": positions[None].to(device)}
    if packing == "blocks":  # a mask of four dimensions keeps transformers from making one
        kwargs |= {"attention_mask": torch.ones(1, 1, 1, 1, device=device),
                   "blocks": make_blocks(lengths, device)}
    return kwargs


def make_blocks(lengths: Sequence[int], device: torch.device | str = "cpu") -> list[Block]:
    """The blocks of a packed row: fewest if the sequences are sorted by length."""
    rows, blocks = [], []
    for i, length in enumerate(lengths):
        rows.append(length)
        if i + 1 == len(lengths) or lengths[i + 1] < SHORTEST * rows[0]:
            blocks.append(_make_block(rows, device))
            rows = []
    return blocks


def _make_block(lengths: list[int], device) -> Block:
    size, longest = sum(lengths), max(lengths)
    if size == len(lengths) * longest:
        return Block(size, longest, None, None)
    gather_index = pad_sequence(torch.arange(size).split(lengths), batch_first=True)
    real = torch.arange(longest) < torch.tensor(lengths)[:, None]  # (rows, longest)
    scatter_index = real.flatten().nonzero().squeeze(1)
    return Block(size, longest, gather_index.flatten().to(device), scatter_index.to(device))


def block_sdpa(module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
               blocks: list[Block] | None = None, **kwargs) -> tuple[Tensor, None]:
    """An attention function of transformers: (1, heads, N, d) -> (1, N, heads, d) for a packed row;
    without `blocks`, transformers' own sdpa."""
    if blocks is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    sizes = [block.size for block in blocks]
    split = [x[0].transpose(0, 1).split(sizes) for x in (query, key, value)]  # (size, heads, d)
    outputs = []
    for block, rows in zip(blocks, zip(*split, strict=True), strict=True):
        if block.gather_index is not None:
            rows = (x.index_select(0, block.gather_index) for x in rows)
        rows = (x.unflatten(0, (-1, block.longest)).transpose(1, 2) for x in rows)
        output = sdpa_attention_forward(module, *rows, None, **kwargs)[0].flatten(0, 1)
        if block.scatter_index is not None:
            output = output.index_select(0, block.scatter_index)
        outputs.append(output)
    return torch.cat(outputs)[None], None


AttentionInterface.register(BLOCK_SDPA, block_sdpa)
AttentionMaskInterface.register(BLOCK_SDPA, sdpa_mask)
