"""How do sequences of different lengths attend, side by side in one row, without padding?

Where flash attention is installed, its kernels take such a row as it is. Elsewhere `sdpa` does here: all else in a
model works on single tokens and has no padding, and attention takes the row apart, into blocks of sequences of about
the same length. Only for models all of whose layers are plainly causal attention; others train on padded rows, and
so does one that was taken for such, when its log-probs are not those of the sampler (`train_dapo.check_weight_sync`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BLOCK_SDPA = "sdpa_in_blocks"  # what this attention is called among those of transformers
SHORTEST = 0.75  # of a block's sequences, as a part of the longest


class Block(NamedTuple):
    """Sequences that are neighbours in a packed row, `size` tokens in all, `longest` in the longest.

    As rows padded to that: `into` (rows * longest,) are their tokens' places within the block, `back` (size,) the
    tokens' places among them. None where all are of one length.
    """
    size: int
    longest: int
    into: Tensor | None
    back: Tensor | None


def enable_packing(model: PreTrainedModel) -> None:
    """Have the model attend in blocks when it is asked to, where it can; else as before, with torch's attention."""
    config = model.config.get_text_config(decoder=True)
    plain = (set(getattr(config, "layer_types", None) or ()) <= {"full_attention"} and not model._is_stateful
             and not getattr(config, "sliding_window", None))
    if model.config._attn_implementation == "sdpa" and model._supports_attention_backend and plain:
        model.set_attn_implementation(BLOCK_SDPA)


def disable_packing(model: PreTrainedModel) -> None:
    """Have it train on padded rows after all."""
    model.set_attn_implementation("sdpa")


def packing(model: torch.nn.Module) -> str:
    """What kind of a packed row the model takes: `blocks`, `flash`, or none ("")."""
    model = getattr(model, "module", model)
    attention = model.config._attn_implementation
    return "blocks" if attention == BLOCK_SDPA else "flash" if "flash" in attention and not model._is_stateful else ""


def pack_arguments(lengths: Sequence[int], packing: str, device: torch.device | str = "cpu") -> dict:
    """What a model is told of a row of sequences that have these lengths."""
    arguments = {"position_ids": torch.cat([torch.arange(length) for length in lengths])[None].to(device)}
    if packing == "blocks":  # transformers makes no mask where it gets one of four dimensions; `block_sdpa` uses neither
        arguments |= {"attention_mask": torch.ones(1, 1, 1, 1, device=device), "blocks": make_blocks(lengths, device)}
    return arguments


def make_blocks(lengths: Sequence[int], device: torch.device | str = "cpu") -> list[Block]:
    """The blocks of a row of sequences that have these lengths: few and full where the longest come first."""
    rows, blocks = [], []
    for i, length in enumerate(lengths):
        rows.append(length)
        if i + 1 == len(lengths) or lengths[i + 1] < SHORTEST * rows[0]:
            blocks.append(_block(rows, device))
            rows = []
    return blocks


def _block(lengths: list[int], device) -> Block:
    size, longest = sum(lengths), max(lengths)
    if size == len(lengths) * longest:
        return Block(size, longest, None, None)
    into = pad_sequence(torch.arange(size).split(lengths), batch_first=True, padding_value=0)  # (rows, longest)
    real = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return Block(size, longest, into.flatten().to(device), real.flatten().nonzero().squeeze(1).to(device))


def block_sdpa(module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
           blocks: list[Block] | None = None, **kwargs) -> tuple[Tensor, None]:
    """Attention as transformers calls it: (1, heads, N, d) -> (1, N, heads, d) for a packed row; without `blocks`
    that of transformers."""
    if blocks is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    sizes = [block.size for block in blocks]
    parts = zip(*(x[0].transpose(0, 1).split(sizes) for x in (query, key, value)), strict=True)  # (size, heads, d)
    outputs = []
    for block, rows in zip(blocks, parts, strict=True):
        if block.into is not None:
            rows = (x.index_select(0, block.into) for x in rows)
        rows = (x.unflatten(0, (-1, block.longest)).transpose(1, 2) for x in rows)  # (rows, heads, longest, d)
        output = sdpa_attention_forward(module, *rows, None, **kwargs)[0].flatten(0, 1)
        outputs.append(output if block.back is None else output.index_select(0, block.back))
    return torch.cat(outputs)[None], None


AttentionInterface.register(BLOCK_SDPA, block_sdpa)
AttentionMaskInterface.register(BLOCK_SDPA, sdpa_mask)
