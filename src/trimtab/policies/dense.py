"""Fully connected layers: one definition, and the fastest of three ways to compute it.

On a CPU in float32 that is a kernel of ours for all layers at once (`native.dense`). Without it, wide layers with ReLU
go to oneDNN: MKL, which torch uses for float32 products, leaves the 512-bit units of some processors idle. The rest is
torch's own products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.native.dense import Activation, DenseKernels

MATMULS = ("float32", "bfloat16")  # what the factors of the products between hidden layers are
SMALLEST, WORK = 9, 2**19  # below, MKL is faster than oneDNN: the smallest of the three sizes, and their product
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_LINEAR: Any = torch.ops.mkldnn._linear_pointwise.default if _ONEDNN else None
IN_PLACE: dict[Activation, Activation] = {torch.tanh: torch.tanh_, torch.relu: torch.relu_}
# What the gradient becomes on its way back through an activation, from what the activation gave.
BACK: dict[Activation, Callable[[Tensor, Tensor], Tensor]] = {
    torch.tanh: torch.ops.aten.tanh_backward,
    torch.relu: lambda grad, made: torch.ops.aten.threshold_backward(grad, made, 0),
}


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


def layers(x: Tensor, held: Sequence[Tensor], activation: Activation, matmul: str) -> Tensor:
    """Through every layer of `held`, the activation after all but the last: `[..., I] -> [..., O]`.

    held: weight and bias of each layer, `[O, I]` and `[O]`; or `[E, O, I]` and `[E, O]`, and then x is `[R, I]` and the
    result `[E, R, O]`. matmul: "bfloat16" rounds the factors of the products between hidden layers, which are nearly
    all the work; the first layer reads observations and the last one gives numbers that are compared: both stay in
    float32. A few rows alone (an actor's decisions) are not rounded: there is nothing to gain.
    """
    x = x.to(held[0].dtype)
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    half = matmul == "bfloat16" and flat.shape[0] >= SMALLEST
    way = DenseKernels.suited(flat, held, activation, half) or _wide(flat, held, activation)
    if way is None:
        return _plain(x, half, held, activation)
    if torch.is_grad_enabled():
        made: Tensor = _Layers.apply(way, activation, half, flat, *held)
    else:
        made = way.forward(flat, held, activation, half, keep=False)[0]
    return made if x.dim() == 2 else made.unflatten(-2, x.shape[:-1])


def pullback(
    x: Tensor, held: Sequence[Tensor], activation: Activation, matmul: str
) -> tuple[Tensor, Callable[[Tensor], list[Tensor]]] | None:
    """`layers` of `[R, I]`, and what turns the gradient of its result into that of `held`: autograd's, without a graph.

    None where these layers are trained only in part, or have an activation whose slope is not known from its result.
    """
    if activation not in BACK or not all(p.requires_grad for p in held):
        return None
    x, half = x.to(held[0].dtype), matmul == "bfloat16" and x.shape[0] >= SMALLEST
    way = DenseKernels.suited(x, held, activation, half) or _Torch
    with torch.no_grad():
        made, kept = way.forward(x, held, activation, half)
    return made, lambda grad: way.backward(grad, x, held, kept, activation, half, False, True)[1] or []


def _plain(x: Tensor, half: bool, held: Sequence[Tensor], activation: Activation) -> Tensor:
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


class _Layers(torch.autograd.Function):
    """`_plain` as one step of the gradient, by a way; after x `[R, I]` come weight and bias of each layer."""

    @staticmethod
    def forward(ctx: Any, way: Any, activation: Activation, half: bool, x: Tensor, *held: Tensor) -> Tensor:
        made, kept = way.forward(x, held, activation, half)
        ctx.way, ctx.activation, ctx.half, ctx.count = way, activation, half, len(held)
        ctx.save_for_backward(x, *held, *kept)
        return made

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        held, kept = saved[: ctx.count], saved[ctx.count :]
        into_x, into_held = ctx.needs_input_grad[3], any(ctx.needs_input_grad[4:])
        if torch.is_grad_enabled():  # it will be differentiated again: by torch's own products
            of = [t for t, needed in zip((x, *held), ctx.needs_input_grad[3:]) if needed]
            made = _plain(x, ctx.half, held, ctx.activation)
            found = iter(torch.autograd.grad(made, of, grads, create_graph=True))
            return None, None, None, *(next(found) if needed else None for needed in ctx.needs_input_grad[3:])
        dx, made = ctx.way.backward(grads[0], x, held, kept, ctx.activation, ctx.half, into_x, into_held)
        return None, None, None, dx, *(made or [None] * ctx.count)


# -- by torch's products ---------------------------------------------------------------------------------------------
# One layer's numbers are `[R, ...]`, or `[E, R, ...]` where layers are stacked; the first layer of all members is one
# product, for they read the same.


class _Torch:
    """The way by torch's calls; keeps what each layer after the first read, and the weights it multiplied by."""

    @staticmethod
    def forward(
        x: Tensor, held: Sequence[Tensor], activation: Activation, half: bool, keep: bool = True
    ) -> tuple[Tensor, list[Tensor]]:
        x = x.contiguous()  # see `_product`
        last, hidden, factors = len(held) // 2 - 1, [], []
        y = _product(x, *_side_by_side(held), activation if last else None)
        if held[0].dim() == 3:
            y = y.unflatten(1, (len(held[0]), -1)).transpose(0, 1)
        for i in range(1, last + 1):
            weight, bias = held[2 * i : 2 * i + 2]
            if half and i < last:
                weight, bias = weight.to(torch.bfloat16), bias.to(torch.bfloat16)
            y = _in_order(y, weight.dtype)
            if keep:
                hidden.append(y)
                factors.append(weight)
            y = _products(y, weight, bias, activation if i < last else None)
        return y.contiguous(), [*hidden, *factors]

    @staticmethod
    def backward(
        grad: Tensor, x: Tensor, held: Sequence[Tensor], kept: Sequence[Tensor], activation: Activation, half: bool,
        into_x: bool, into_held: bool,
    ) -> tuple[Tensor | None, list[Tensor] | None]:  # fmt: skip
        x, grad, wide = x.contiguous(), grad.contiguous(), grad.dtype
        made: list[Tensor] = []
        hidden, factors = kept[: len(kept) // 2], kept[len(kept) // 2 :]
        for read, weight in zip(reversed(hidden), reversed(factors)):
            bias = grad.sum(-2, dtype=wide) if into_held else None  # of numbers that are not rounded yet, if any
            grad = grad.to(weight.dtype)
            if bias is not None:
                made = [_products(grad.mT, read.mT).to(wide), bias, *made]
            grad = BACK[activation](_products(grad, weight.mT), read)
        down = _in_order(grad.movedim(-2, 0), wide).flatten(1)  # of what the first layer gives, of all members
        dx = _product(down, _side_by_side(held)[0].t()) if into_x else None
        if not into_held:
            return dx, None
        weight = _product(x.t(), down.t()).t().contiguous()  # in this order oneDNN takes half the time
        return dx, [m.view(p.shape) for m, p in zip([weight, down.sum(0), *made], held)]


def _wide(x: Tensor, held: Sequence[Tensor], activation: Activation) -> type[_Torch] | None:
    """That way, where one of its products is worth oneDNN."""
    if activation is not torch.relu or len(x) < SMALLEST or not _fast(x):
        return None
    return _Torch if any(_worth(len(x), w.shape[-1], w.shape[-2]) for w in held[::2]) else None


def _side_by_side(held: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Weight and bias of the first layer of all members as one: `[E O, I]` and `[E O]`."""
    return held[0].flatten(0, -2), held[1].flatten()


def _in_order(x: Tensor, kind: torch.dtype) -> Tensor:
    """`x` of this type and without gaps or turned axes (see `_product`), in one pass."""
    return x.contiguous() if x.dtype == kind else x.to(kind, memory_format=torch.contiguous_format)


def _fast(x: Tensor) -> bool:
    """Whether oneDNN may be called with these numbers."""
    return _ONEDNN and x.is_cpu and x.dtype == torch.float32


def _worth(rows: int, inputs: int, outputs: int) -> bool:
    return min(rows, inputs, outputs) >= SMALLEST and rows * inputs * outputs >= WORK


def _products(a: Tensor, b: Tensor, bias: Tensor | None = None, activation: Activation | None = None) -> Tensor:
    """`_product`, of each member where there are some: `[E, R, K]`, `[E, C, K]` and `[E, C]` give `[E, R, C]`."""
    if bias is None and a.shape[-1] == 1:
        return a * b.mT
    if a.dim() == 2:
        return _product(a, b, bias, activation)
    if not (_fast(a) and _worth(a.shape[1], a.shape[2], b.shape[1])):
        made = torch.bmm(a, b.mT) if bias is None else torch.baddbmm(bias[:, None], a, b.mT)
        return made if activation is None else IN_PLACE[activation](made)
    biases = [None] * len(a) if bias is None else bias.unbind()
    return torch.stack([_product(*one, activation) for one in zip(a.unbind(), b.unbind(), biases)])


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None, activation: Activation | None = None) -> Tensor:
    """`a b^T + bias` of matrices `[R, K]` and `[C, K]`, with an activation or without, by the faster library.

    Factors of bfloat16 give a result of bfloat16; the products are summed in float32. The rows of a matrix, or its
    columns, must follow each other in memory: of a view with gaps oneDNN makes products a hundred times slower.
    """
    if (bias is not None and a.dtype == torch.bfloat16 and a.is_cpu and _ONEDNN) or (
        _fast(a) and _worth(a.shape[0], a.shape[1], len(b))
    ):
        own = "relu" if activation is torch.relu else "none"
        made: Tensor = _LINEAR(a, b, bias, own, [], "")
        return made if activation is None or own == "relu" else IN_PLACE[activation](made)
    made = F.linear(a, b, bias)
    return made if activation is None else IN_PLACE[activation](made)
