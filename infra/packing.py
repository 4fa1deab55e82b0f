"""Attention over sequences of different lengths in one row, without padding.

Everything else in a model works on single tokens and has no padding. If flash attention is
installed, transformers calls its kernels. Otherwise `packed_attention` calls torch's own kernel for
such rows where it works (on GPUs, in half precision), or splits the row into blocks of sequences of
similar length. This holds for models all of whose layers are plain causal attention; others are
trained on padded rows, and so is a model whose log-probs on packed rows are not the sampler's
(`logprobs.check_weight_sync`).
"""

from collections.abc import Sequence
from functools import lru_cache
from inspect import signature
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from infra.precision import round_like_autocast

PACKED_ATTENTION = "packed_attention"  # its name among those of transformers
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
        return "varlen"
    return "flash" if "flash" in attention and not model._is_stateful else ""


def packing_kwargs(lengths: Sequence[int], packing: str, device: torch.device | str) -> dict:
    """The model's keyword arguments for a packed row of sequences with these lengths."""
    positions = torch.cat([torch.arange(length) for length in lengths])
    kwargs = {"position_ids": positions[None].to(device)}
    if packing == "varlen":  # a mask of four dimensions keeps transformers from making one
        kwargs |= {"attention_mask": torch.ones(1, 1, 1, 1, device=device),
                   "packed_lengths": tuple(lengths)}
    return kwargs


@lru_cache(maxsize=1)  # all layers of a model ask for the same
def make_cu_seqlens(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each sequence of a packed row begins, and the last one ends: (sequences + 1,) int32."""
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


@lru_cache(maxsize=1)
def make_blocks(lengths: tuple[int, ...], device: torch.device) -> tuple:
    """Blocks of neighbouring sequences of a packed row, padded to their longest; fewest if sorted.
    Returns rows and length of each block; which token of the row (N tokens) each of theirs is, any
    if padding; and where among theirs each of the row is (N,). None twice if nothing is padded."""
    rows, shapes, gather = [], [], []
    sequences = torch.arange(sum(lengths)).split(lengths)
    for positions, following in zip(sequences, [*lengths[1:], 0], strict=True):
        rows.append(positions)
        if following < MIN_LENGTH_RATIO * len(rows[0]):
            padded = pad_sequence(rows, batch_first=True, padding_value=-1)
            shapes.append(tuple(padded.shape))
            gather.append(padded.flatten())
            rows = []
    gather = torch.cat(gather)
    if len(gather) == sum(lengths):
        return shapes, None, None
    scatter = gather.argsort()[-sum(lengths):]  # the padding, -1, comes first
    return shapes, gather.clamp(min=0).to(device), scatter.to(device)


def packed_attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask,
                     packed_lengths: tuple[int, ...] = (), **kwargs) -> tuple[Tensor, None]:
    """An attention function of transformers: (1, heads, N, d) -> (1, N, heads, d) for a packed row
    of sequences with `packed_lengths`; without them, transformers' own sdpa."""
    if not packed_lengths:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    inputs = round_like_autocast(query, key, value)  # autocast does so for sdpa, but not for varlen
    shapes = tuple((x.shape[1], x.shape[3]) for x in inputs)
    kernel = varlen_sdpa if varlen_works(query.device, inputs[0].dtype, shapes) else block_sdpa
    return kernel(module, *inputs, packed_lengths, **kwargs), None


def varlen_sdpa(module, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...],
                scaling: float | None = None, **kwargs) -> Tensor:
    """Causal attention within each sequence, by torch's kernel for packed rows."""
    cu_seqlens, longest = make_cu_seqlens(lengths, query.device), max(lengths)
    rows = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, heads, d)
    # torch 2.11 has no such option, and computes it all the same
    gqa = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
    return varlen_attn(*rows, cu_seqlens, cu_seqlens, longest, longest, scale=scaling,
                       window_size=(-1, 0), **gqa)[None]


def block_sdpa(module, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...],
               **kwargs) -> Tensor:
    """The same by sdpa, block by block."""
    shapes, gather_index, scatter_index = make_blocks(lengths, query.device)
    inputs, outputs = [x[0].transpose(0, 1) for x in (query, key, value)], []  # (N, heads, d)
    if gather_index is not None:
        inputs = [x.index_select(0, gather_index) for x in inputs]
    blocks = [x.split([rows * length for rows, length in shapes]) for x in inputs]
    for shape, *qkv in zip(shapes, *blocks, strict=True):
        qkv = (x.unflatten(0, shape).transpose(1, 2) for x in qkv)
        outputs.append(sdpa_attention_forward(module, *qkv, None, **kwargs)[0].flatten(0, 1))
    output = torch.cat(outputs)
    return (output if scatter_index is None else output.index_select(0, scatter_index))[None]


@lru_cache
def varlen_works(device: torch.device, dtype: torch.dtype, shapes: tuple) -> bool:
    """Whether `varlen_sdpa` runs, and gives the output and gradients of `block_sdpa` for a small
    row. `shapes`: heads and head size of query, key and value."""
    lengths, generator, found = (70, 65, 9, 1), torch.Generator().manual_seed(0), []
    module = SimpleNamespace(num_key_value_groups=shapes[0][0] // shapes[1][0])
    inputs = [torch.randn(1, heads, sum(lengths), size, generator=generator)
              for heads, size in shapes]
    try:  # in the middle of a model's pass, of which gradient checkpointing sees nothing
        with (torch.enable_grad(), torch.autocast(device.type, enabled=False),
              torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)):
            for kernel in (varlen_sdpa, block_sdpa):
                qkv = [x.to(device, dtype).requires_grad_() for x in inputs]
                output = kernel(module, *qkv, lengths, scaling=0.1)
                found.append([output.detach(), *torch.autograd.grad(output.square().sum(), qkv)])
    except (RuntimeError, ValueError):  # no such kernel for this device, type or head size
        return False
    return all((a - b).abs().max() < 0.05 * b.abs().max()  # bfloat16 rounds to 0.01 of it
               for a, b in zip(*found, strict=True))


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
