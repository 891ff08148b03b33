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
_LINEAR: Any = torch.ops.mkldnn._linear_pointwise.default if _ONEDNN else None


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


def held_by(stack: Iterable[Any]) -> list[Tensor]:
    """Weight and bias of each layer, in order."""
    return [p for layer in stack for p in layer._parameters.values()]  # quicker than `layer.weight` and `layer.bias`


def layers(x: Tensor, held: Sequence[Tensor], activation: Callable[[Tensor], Tensor], matmul: str) -> Tensor:
    """Through every layer of `held`, the activation after all but the last: `[..., I] -> [..., O]`.

    held: weight and bias of each layer, `[O, I]` and `[O]`; or `[E, O, I]` and `[E, O]`, and then x is `[R, I]` and the
    result `[E, R, O]`. matmul: "bfloat16" rounds the factors of the products between hidden layers, which are nearly
    all the work; the first layer reads observations and the last one gives numbers that are compared: both stay in
    float32. A few rows alone (an actor's decisions) are not rounded: there is nothing to gain.
    """
    rows = x.numel() // x.shape[-1]
    half = matmul == "bfloat16" and rows >= SMALLEST
    if activation is torch.relu and _suits(x, rows, held[::2]):
        flat = (x if x.dim() == 2 else x.reshape(rows, -1)).contiguous()  # see `_product`
        made: Tensor = _Relu.apply(flat, half, *held) if torch.is_grad_enabled() else _forward(flat, half, held)[0]
        return made if x.dim() == 2 else made.unflatten(-2, x.shape[:-1])
    return _plain(x, half, held, activation)


def pullback(
    x: Tensor, held: Sequence[Tensor], activation: Callable[[Tensor], Tensor], matmul: str
) -> tuple[Tensor, Callable[[Tensor], list[Tensor]]] | None:
    """`layers` of `[R, I]`, and what turns the gradient of its result into that of `held`: autograd's, without a graph.

    None where these layers are not worth oneDNN, or trained only in part.
    """
    if activation is not torch.relu or not _suits(x, len(x), held[::2]) or not all(p.requires_grad for p in held):
        return None
    with torch.no_grad():
        x = x.contiguous()
        made, hidden, factors = _forward(x, matmul == "bfloat16" and len(x) >= SMALLEST, held)
    return made, lambda grad: _into_held(x, held, *_backward(grad.contiguous(), hidden, factors, True))


def _suits(x: Tensor, rows: int, weights: Sequence[Tensor]) -> bool:
    """Whether one of these layers is worth oneDNN."""
    if rows < SMALLEST or not _ONEDNN or x.dtype != torch.float32 or x.device.type != "cpu":
        return False
    return any(_worth(rows, w.shape[-1], w.shape[-2]) for w in weights)


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
# One layer's numbers are `[R, ...]`, or `[E, R, ...]` where layers are stacked; the first layer of all members is one
# product, for they read the same.


class _Relu(torch.autograd.Function):
    """`_plain` with ReLU. Arguments: x `[R, I]`, half, and weight and bias of each layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, half: bool, *held: Tensor) -> Tensor:
        made, hidden, factors = _forward(x, half, held)
        ctx.half, ctx.cuts = half, (len(held), len(held) + len(hidden))
        ctx.save_for_backward(x, *held, *hidden, *factors)
        return made

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        count, end = ctx.cuts
        held, hidden, factors = saved[:count], saved[count:end], saved[end:]
        into_x, into_held = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        if torch.is_grad_enabled():  # it will be differentiated again: by torch's own products
            of = [x] * into_x + held * into_held
            found = list(torch.autograd.grad(_plain(x, ctx.half, held, torch.relu), of, grads, create_graph=True))
            dx = found.pop(0) if into_x else None
            return dx, None, *(found or [None] * count)
        down, made = _backward(grads[0].contiguous(), hidden, factors, into_held)
        dx = _product(down, _side_by_side(held)[0].t()) if into_x else None
        return dx, None, *(_into_held(x, held, down, made) if into_held else [None] * count)


def _into_held(x: Tensor, held: Sequence[Tensor], down: Tensor, made: list[Tensor]) -> list[Tensor]:
    """The gradients of all weights and biases, from what `_backward` gives."""
    weight = _product(x.t(), down.t()).t().contiguous()  # in this order oneDNN takes half the time
    return [m.view(p.shape) for m, p in zip([weight, down.sum(0), *made], held)]


def _side_by_side(held: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Weight and bias of the first layer of all members as one: `[E O, I]` and `[E O]`."""
    return held[0].flatten(0, -2), held[1].flatten()


def _forward(x: Tensor, half: bool, held: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The result; what each layer after the first read, and the weights of those layers, as factors of the products."""
    last, hidden, factors = len(held) // 2 - 1, [], []
    y = _product(x, *_side_by_side(held), last > 0)
    if held[0].dim() == 3:
        y = y.unflatten(1, (len(held[0]), -1)).transpose(0, 1)
    for i in range(1, last + 1):
        weight, bias = held[2 * i : 2 * i + 2]
        if half and i < last:
            weight, bias = weight.to(torch.bfloat16), bias.to(torch.bfloat16)
        y = _in_order(y, weight.dtype)
        hidden.append(y)
        factors.append(weight)
        y = _products(y, weight, bias, i < last)
    return y.contiguous(), hidden, factors


def _backward(
    grad: Tensor, hidden: list[Tensor], factors: list[Tensor], into_held: bool
) -> tuple[Tensor, list[Tensor]]:
    """The gradient of what the first layer gives, of all members `[R, E O]`, and of all later weights and biases."""
    made: list[Tensor] = []
    for read, weight in zip(reversed(hidden), reversed(factors)):
        bias = grad.sum(-2, dtype=torch.float32) if into_held else None  # of numbers that are not rounded yet, if any
        grad = grad.to(weight.dtype)
        if bias is not None:
            made = [_products(grad.mT, read.mT).float(), bias, *made]
        grad = torch.ops.aten.threshold_backward(_products(grad, weight.mT), read, 0)
    return _in_order(grad.movedim(-2, 0), torch.float32).flatten(1), made


def _in_order(x: Tensor, kind: torch.dtype) -> Tensor:
    """`x` of this type and without gaps or turned axes (see `_product`), in one pass."""
    return x.contiguous() if x.dtype == kind else x.to(kind, memory_format=torch.contiguous_format)


def _products(a: Tensor, b: Tensor, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """`_product`, of each member where there are some: `[E, R, K]`, `[E, C, K]` and `[E, C]` give `[E, R, C]`."""
    if bias is None and a.shape[-1] == 1:
        return a * b.mT
    if a.dim() == 2:
        return _product(a, b, bias, relu)
    if a.dtype == torch.bfloat16 or not _worth(a.shape[1], a.shape[2], b.shape[1]):
        made = torch.bmm(a, b.mT) if bias is None else torch.baddbmm(bias[:, None], a, b.mT)
        return made.relu_() if relu else made
    biases = [None] * len(a) if bias is None else bias.unbind()
    return torch.stack([_product(*one, relu) for one in zip(a.unbind(), b.unbind(), biases)])


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """`a b^T + bias` of matrices `[R, K]` and `[C, K]`, with ReLU or without, by the faster library.

    Factors of bfloat16 give a result of bfloat16; the products are summed in float32. The rows of a matrix, or its
    columns, must follow each other in memory: of a view with gaps oneDNN makes products a hundred times slower.
    """
    if a.dtype == torch.bfloat16 and bias is None:
        return a @ b.t()
    if a.dtype == torch.bfloat16 or _worth(a.shape[0], a.shape[1], b.shape[0]):
        made: Tensor = _LINEAR(a, b, bias, "relu" if relu else "none", [], "")
        return made
    made = F.linear(a, b, bias)
    return made.relu_() if relu else made
