"""Fully connected layers on a CPU: the same product by the faster library, in float32 or with bfloat16 factors.

MKL, which torch uses for float32 products, leaves the 512-bit units of AMD's processors idle; oneDNN, which torch has
too, does not. A product of 256 x 256 by 256 x 256 takes half the time and has the same error.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MATMULS = ("float32", "bfloat16")  # what the factors of the products between hidden layers are
SMALLEST, WORK = 9, 2**19  # below, MKL is faster: the smallest of the three sizes, and their product
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _worth(rows: int, inputs: int, outputs: int) -> bool:
    return min(rows, inputs, outputs) >= SMALLEST and rows * inputs * outputs >= WORK


def _suits(x: Tensor, weight: Tensor) -> bool:
    """Whether this layer is one that oneDNN does faster."""
    outputs, inputs = weight.shape[-2:]
    return (
        _ONEDNN
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and _worth(x.shape[-2] if weight.dim() == 3 else x.numel() // inputs, inputs, outputs)
    )


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """`a b^T + bias` of float32 matrices `[R, K]` and `[C, K]`, by the faster library; not differentiable."""
    if _worth(a.shape[0], a.shape[1], b.shape[0]):
        made: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
        return made
    return F.linear(a, b, bias)


class _Dense(torch.autograd.Function):
    """`x W^T + b` for one layer, x `[R, I]`, or for E at once, W `[E, O, I]`, b `[E, O]`, x `[E, R, I]` or `[R, I]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        (grad,) = grads
        into_x, into_weight, into_bias = ctx.needs_input_grad
        by = torch.matmul if torch.is_grad_enabled() else _by  # differentiated twice: torch's own products
        dx = by(grad, weight) if into_x else None
        if dx is not None and dx.dim() > x.dim():  # every layer read the same input
            dx = dx.sum(0)
        dw = by(grad.mT, x) if into_weight else None
        return dx, dw, grad.sum(-2) if into_bias else None


def _forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if weight.dim() == 2:
        return product(x, weight, bias)
    inputs = x.unbind() if x.dim() == 3 else [x] * len(weight)
    return torch.stack([product(*one) for one in zip(inputs, weight.unbind(), bias.unbind())])


def _by(a: Tensor, b: Tensor) -> Tensor:
    """`a b`, of matrices or of stacks of them."""
    if a.dim() == 2:
        return product(a, b.t())
    factors = b.unbind() if b.dim() == 3 else [b] * len(a)
    return torch.stack([product(one, other.t()) for one, other in zip(a.unbind(), factors)])


def dense(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`x W^T + b`: `[..., I] -> [..., O]`; with W `[E, O, I]` and b `[E, O]`, `[R, I]` or `[E, R, I] -> [E, R, O]`."""
    stacked = weight.dim() == 3
    if not _suits(x, weight):
        if not stacked:
            return F.linear(x, weight, bias)
        wide = x if x.dim() == 3 else x.expand(len(weight), *x.shape)
        return torch.baddbmm(bias[:, None], wide, weight.mT)
    rows = x if stacked or x.dim() == 2 else x.reshape(-1, x.shape[-1])
    made: Tensor = _Dense.apply(rows, weight, bias) if torch.is_grad_enabled() else _forward(rows, weight, bias)
    return made if rows is x else made.unflatten(0, x.shape[:-1])


def half_dense(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`dense` with all factors rounded to bfloat16, whose result it is; sums are made in float32 by the library."""
    x, weight, bias = (t.to(torch.bfloat16) for t in (x, weight, bias))
    return F.linear(x, weight, bias) if weight.dim() == 2 else torch.baddbmm(bias[:, None], x, weight.mT)


def layers(x: Tensor, stack: Any, activation: Any, matmul: str) -> Tensor:
    """Through every layer of `stack` (each has `weight` and `bias`), the activation after all but the last.

    matmul: "bfloat16" rounds the factors of the products between hidden layers, which are nearly all the work; the
    first layer reads observations and the last one gives numbers that are compared, so both stay in float32.
    """
    first, *between = stack
    x = dense(x, first.weight, first.bias)
    for layer in between:
        x = activation(x)
        inner = matmul == "bfloat16" and layer is not between[-1] and x.shape[-2] >= SMALLEST
        x = half_dense(x, layer.weight, layer.bias) if inner else dense(x.to(layer.weight.dtype), *_of(layer))
    return x


def _of(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.weight, layer.bias


class StackedLayer(nn.Module):
    """E linear layers of one shape, weight `[E, O, I]` and bias `[E, O]`, begun as torch begins each of them."""

    def __init__(self, count: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, outputs, inputs, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(count, outputs, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.weight.shape[-1])
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)
