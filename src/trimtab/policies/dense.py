"""Fully connected layers on a CPU: the same products by the faster library, in float32 or with bfloat16 factors.

MKL, which torch uses for float32 products, leaves the 512-bit units of AMD's processors idle; oneDNN, which torch has
too, does not. A product of 256 x 256 by 256 x 256 takes half the time and has the same error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MATMULS = ("float32", "bfloat16")  # what the factors of the products between hidden layers are
SMALLEST, WORK = 9, 2**19  # below, MKL is faster: the smallest of the three sizes, and their product
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


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


def layers(x: Tensor, stack: Iterable[Any], activation: Callable[[Tensor], Tensor], matmul: str) -> Tensor:
    """Through every layer of `stack`, the activation after all but the last: `[..., I] -> [..., O]`.

    A layer has a `weight` `[O, I]` and a `bias` `[O]`; or `[E, O, I]` and `[E, O]`, and then x is `[R, I]` and the
    result `[E, R, O]`. matmul: "bfloat16" rounds the factors of the products between hidden layers, which are nearly
    all the work; the first layer reads observations and the last one gives numbers that are compared: both stay in
    float32. A few rows alone (an actor's decisions) are not rounded: there is nothing to gain.
    """
    held = [p for layer in stack for p in (layer.weight, layer.bias)]
    rows = x.numel() // x.shape[-1]
    half = matmul == "bfloat16" and rows >= SMALLEST
    if activation is torch.relu and _suits(x, rows, held[::2]):
        flat = (x if x.dim() == 2 else x.reshape(rows, -1)).contiguous()  # see `_product`
        made: Tensor = _Relu.apply(flat, half, *held) if torch.is_grad_enabled() else _forward(flat, half, held)[0]
        return made if x.dim() == 2 else made.unflatten(-2, x.shape[:-1])
    return _plain(x, half, held, activation)


def _suits(x: Tensor, rows: int, weights: list[Tensor]) -> bool:
    """Whether one of these layers is worth oneDNN."""
    if not _ONEDNN or x.dtype != torch.float32 or x.device.type != "cpu":
        return False
    return any(_worth(rows, *w.shape[-2:]) for w in weights)


def _worth(rows: int, inputs: int, outputs: int) -> bool:
    return min(rows, inputs, outputs) >= SMALLEST and rows * inputs * outputs >= WORK


def _plain(x: Tensor, half: bool, held: Sequence[Tensor], activation: Callable[[Tensor], Tensor]) -> Tensor:
    """The layers by torch's own products."""
    last = len(held) // 2 - 1
    for i in range(last + 1):
        weight, bias = held[2 * i], held[2 * i + 1]
        kind = torch.bfloat16 if half and 0 < i < last else weight.dtype
        x, weight, bias = x.to(kind), weight.to(kind), bias.to(kind)
        if weight.dim() == 2:
            x = F.linear(x, weight, bias)
        else:
            x = torch.baddbmm(bias[:, None], x if x.dim() == 3 else x.expand(len(weight), *x.shape), weight.mT)
        x = x if i == last else activation(x)
    return x


# -- layers with ReLU between them, as one step of the gradient --------------------------------------------------


class _Relu(torch.autograd.Function):
    """`_plain` with ReLU. Arguments: x `[R, I]`, half, and weight and bias of each layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, half: bool, *held: Tensor) -> Tensor:
        made, hidden = _forward(x, half, held)
        ctx.half, ctx.count = half, len(held)
        ctx.save_for_backward(x, *held, *hidden)
        return made

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        held, hidden = saved[: ctx.count], saved[ctx.count :]
        into_x, into_held = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        if torch.is_grad_enabled():  # it will be differentiated again: by torch's own products
            of = [x] * into_x + held * into_held
            found = list(torch.autograd.grad(_plain(x, ctx.half, held, torch.relu), of, grads, create_graph=True))
            dx = found.pop(0) if into_x else None
            return dx, None, *(found or [None] * len(held))
        stacked, (grad,) = held[0].dim() == 3, grads
        count = len(held[0]) if stacked else 1
        each = list(zip(*(p.unbind() for p in held))) if stacked else [tuple(held)]
        depth = len(held) // 2 - 1
        made = []
        for e in range(count):
            past = [x, *hidden[e * depth : (e + 1) * depth]]
            made.append(_backward(grad[e] if stacked else grad, past, each[e], ctx.half, into_x, into_held))
        dx = torch.stack([dx for dx, _ in made if dx is not None]).sum(0) if into_x else None
        if not into_held:
            return dx, None, *[None] * len(held)
        return dx, None, *(torch.stack(p) if stacked else p[0] for p in zip(*(found for _, found in made)))


def _forward(x: Tensor, half: bool, held: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The result, and what the hidden layers gave, member by member."""
    stacked, last = held[0].dim() == 3, len(held) // 2 - 1
    members = list(zip(*(p.unbind() for p in held))) if stacked else [tuple(held)]
    made, hidden = [], []
    for member in members:
        y = x
        for i in range(last + 1):
            factors = y, member[2 * i], member[2 * i + 1]
            if half and i > 0:
                kind = torch.bfloat16 if i < last else torch.float32
                factors = y.to(kind), factors[1].to(kind), factors[2].to(kind)
            y = _product(*factors, i < last)
            if i < last:
                hidden.append(y)
        made.append(y)
    return (torch.stack(made) if stacked else made[0]), hidden


def _backward(
    grad: Tensor, past: list[Tensor], held: Sequence[Tensor], half: bool, into_x: bool, into_held: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """The gradient of one member's input, and of its weights and biases; past: what each layer read."""
    found: list[Tensor] = []
    last, grad = len(past) - 1, grad.contiguous()
    for i in range(last, -1, -1):
        read, weight = past[i], held[2 * i]
        if half:
            kind = torch.bfloat16 if 0 < i < last else torch.float32
            grad, read, weight = grad.to(kind), read.to(kind), weight.to(kind)
        if into_held:
            found = [_product(grad.t(), read.t()).float(), grad.sum(0, dtype=torch.float32), *found]
        if i or into_x:
            grad = _product(grad, weight.t())
        if i:
            grad = torch.ops.aten.threshold_backward(grad, read, 0)
    return (grad if into_x else None), found


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """`a b^T + bias` of matrices `[R, K]` and `[C, K]`, with ReLU or without, by the faster library.

    Factors of bfloat16 give a result of bfloat16; the products are summed in float32. The rows of a matrix, or its
    columns, must follow each other in memory: of a view with gaps oneDNN makes products a hundred times slower.
    """
    if a.dtype == torch.bfloat16 and bias is None:
        return a @ b.t()
    if a.dtype == torch.bfloat16 or _worth(a.shape[0], a.shape[1], b.shape[0]):
        made: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "relu" if relu else "none", [], "")
        return made
    made = F.linear(a, b, bias)
    return made.relu_() if relu else made
