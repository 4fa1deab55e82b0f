"""The output head in float32 while the model computes in half precision.

Most of the difference between a sampler's and a trainer's log-probs is rounding of logits. Operands
stay in half precision, which costs nothing; their products are summed and kept in float32.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32 or wider, also if they are in half precision."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


class LinearFp32(torch.autograd.Function):
    """x (N, H) @ weight.T (H, V) by `matmul_fp32`; gradients are in the type of the operands."""
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return matmul_fp32(x, weight.T)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        grad = grad.to(x.dtype)
        return grad @ weight, grad.T @ x if ctx.needs_input_grad[1] else None


def round_like_autocast(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the type that autocast computes in; as they are if it is off."""
    device = tensors[0].device.type
    on, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return [tensor.to(dtype) if on else tensor for tensor in tensors]


def is_plain_linear(layer: torch.nn.Module) -> bool:
    """Whether it computes as torch's Linear does; FSDP2 gives its layers a class of their own."""
    return isinstance(layer, torch.nn.Linear) and type(layer).forward is torch.nn.Linear.forward


def linear_fp32(head: torch.nn.Linear, hidden: Tensor) -> Tensor:
    """The head's logits in float32 or wider: (..., H) -> (..., V)."""
    x, weight = round_like_autocast(hidden, head.weight)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = LinearFp32.apply(x.flatten(0, -2), weight).unflatten(0, hidden.shape[:-1])
        return logits if head.bias is None else logits + head.bias


@contextmanager
def fp32_head(model: torch.nn.Module, autocast: Callable) -> Iterator[None]:
    """`autocast()`, and inside the model's head computes by `linear_fp32` if it is a plain one."""
    head = model.get_output_embeddings()
    plain = is_plain_linear(head)
    if plain:
        head.forward = partial(linear_fp32, head)
    try:
        with autocast():
            yield
    finally:
        if plain:
            del head.forward
