"""From hidden states to log-probabilities: the output layer without its logits, and with a backward of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.native.language import Kernels

# Logits that exist at once, in the dtype of the products: 32 MiB in bfloat16. With fewer the product is slow.
LOGITS_AT_ONCE = 2**24
# Their gradients, where the layer learns: one product with the states for so many (64 MiB in bfloat16).
SLOPES_AT_ONCE = 2**25
# Of those, so many are made probabilities at a time (2 MiB in float32), in the cache.
WIDE_AT_ONCE = 2**19
# How many of the most probable tokens are given where somebody asks for them.
TOP = 50


def read(
    x: Tensor, weight: Tensor, bias: Tensor | None, token: Tensor, scale: Tensor | None, narrow: torch.dtype
) -> tuple[Tensor, Tensor]:
    """logp and entropy `[M]` of `M` tokens from states `[M, H]`: `log softmax(scale (W x + b))`, differentiable.

    Products are taken in `narrow`, the rest in float32 at least.
    """
    every = _logits(x.to(narrow), weight.to(narrow), _to(bias, narrow), scale).log_softmax(-1)
    return every.gather(1, token[:, None]).squeeze(1), -(every.exp() * every).sum(-1)


@torch.no_grad()
def top(head: Callable[[Tensor], Tensor], x: Tensor, scale: Tensor | None, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """The largest log-probabilities of `M` tokens and which they are, `[M, K]` each, descending; K = min(50, V).

    Some tokens at a time, so that no more than these outlives the look at their logits.
    """
    size = head(x[:1]).shape[-1]
    found = []
    for i in _parts(len(x), LOGITS_AT_ONCE // size):
        logits = head(x[i]).to(wide)
        every = (logits if scale is None else logits * scale[i, None]).log_softmax(-1)
        found.append(every.topk(min(TOP, size), -1))
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def _to(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    logits = F.linear(x, weight, bias).to(torch.promote_types(x.dtype, torch.float32))
    return logits if scale is None else logits * scale[:, None]


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """`W x + b` into `out`: a fresh tensor of this size costs as much as the product, for its memory."""
    return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)


def _widened(products: Tensor, scale: Tensor | None) -> Tensor:
    """Logits in float32 at least, to be worked on in place; of wide products these are the products themselves."""
    z = products.to(torch.promote_types(products.dtype, torch.float32))
    return z if scale is None else z.mul_(scale[:, None])


class Readout(torch.autograd.Function):
    """`read`, some tokens at a time, keeping nothing of the size of the vocabulary for the backward.

    With p = softmax(z), z = scale (W x + b), l = log p, h the entropy, the gradient towards z is
    `g_l (1[token] - p) - g_h p (l + h)`. A frozen layer's logits are not made again in the backward: `dl/dx` and
    `dh/dx` are known before their upstream gradients. A gradient that is differentiated again is that of `read`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, token: Tensor, scale: Tensor | None,
        narrow: torch.dtype, entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        y, w, b = x.to(narrow), weight.to(narrow), _to(bias, narrow)
        wide = torch.promote_types(narrow, torch.float32)
        logp = y.new_empty(len(x), dtype=wide)
        h = torch.empty_like(logp) if entropy else None
        frozen = not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2])
        slopes = [torch.empty_like(y) for _ in range(1 + entropy)] if frozen and ctx.needs_input_grad[0] else []
        parts = _parts(len(x), LOGITS_AT_ONCE // len(w))
        kernels = Kernels.suited(wide, narrow, y.device)
        held = [y.new_empty(_longest(parts), len(w)) for _ in range(max(1, len(slopes)))]
        for outer in parts:
            n = len(range(len(x))[outer])
            products = [buffer[:n] for buffer in held]
            _product(y[outer], w, b, products[0])
            if kernels:
                some = None if scale is None else scale[outer].float()
                into = None if h is None else h[outer], products[1] if len(products) > 1 else None
                kernels.read_out(products[0], token[outer], some, logp[outer], *into, bool(slopes))
            for inner in () if kernels else _parts(n, WIDE_AT_ONCE // len(w)):
                i = slice(outer.start + inner.start, outer.start + inner.stop)
                z = _widened(products[0][inner], None if scale is None else scale[i])
                z = z.sub_(z.amax(1, keepdim=True))
                at = z.gather(1, token[i][:, None])
                p = z.exp() if entropy else z.exp_()
                total = p.sum(1, keepdim=True)
                logp[i] = (at - total.log()).squeeze(1)
                if h is not None:
                    h[i] = (total.log() - (p * z).sum(1, keepdim=True) / total).squeeze(1)
                if slopes:
                    p = p.div_(total)
                    if h is not None:
                        products[1][inner] = z.sub_(total.log() - h[i][:, None]).mul_(p).neg_()
                    products[0][inner] = p
            for slope, d in zip(slopes, products):
                torch.mm(d, w, out=slope[outer])
        if slopes:
            factor = 1 if scale is None else scale[:, None]
            slopes = [((w[token] - slopes[0]) * factor).to(narrow), *((s * factor).to(narrow) for s in slopes[1:])]
        ctx.save_for_backward(x, weight, bias, token, scale, *slopes)
        ctx.narrow = narrow
        ctx.set_materialize_grads(False)
        return logp, h

    @staticmethod
    def backward(ctx: Any, g_logp: Tensor | None, g_h: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bias, token, scale, *slopes = ctx.saved_tensors
        given = [g for g in (g_logp, g_h) if g is not None]
        need = ctx.needs_input_grad[:3]
        made: list[Tensor | None]
        if not given:
            made = [None] * 3
        elif torch.is_grad_enabled():
            both = zip(read(x, weight, bias, token, scale, ctx.narrow), (g_logp, g_h))
            into = [t for t, wanted in zip((x, weight, bias), need) if wanted]
            flow = iter(torch.autograd.grad([v for v, g in both if g is not None], into, given, create_graph=True))
            made = [next(flow) if wanted else None for wanted in need]
        elif slopes:
            parts = [slope * g[:, None] for slope, g in zip(slopes, (g_logp, g_h)) if g is not None]
            made = [sum(parts[1:], parts[0]).to(x.dtype), None, None]
        else:
            made = _gradients(ctx, x, weight, bias, token, scale, g_logp, g_h)
        return (*made, None, None, None, None)


def _gradients(
    ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, token: Tensor, scale: Tensor | None,
    g_logp: Tensor | None, g_h: Tensor | None,
) -> list[Tensor | None]:  # fmt: skip
    """Gradients towards x, weight and bias: the logits once more. Sums over parts are of the parameter's dtype."""
    y, w, b = x.to(ctx.narrow), weight.to(ctx.narrow), _to(bias, ctx.narrow)
    dx = torch.empty_like(y) if ctx.needs_input_grad[0] else None
    dw = db = None
    parts = _parts(len(x), SLOPES_AT_ONCE // len(w))
    buffer = y.new_empty(_longest(parts), len(w))
    for outer in parts:
        n = len(range(len(x))[outer])
        d = _product(y[outer], w, b, buffer[:n])
        for inner in _parts(n, WIDE_AT_ONCE // len(w)):
            i = slice(outer.start + inner.start, outer.start + inner.stop)
            s = None if scale is None else scale[i]
            z = _slopes(_widened(d[inner], s), token[i], None if g_logp is None else g_logp[i],
                        None if g_h is None else g_h[i])  # fmt: skip
            d[inner] = z if s is None else z.mul_(s[:, None])
        if dx is not None:
            torch.mm(d, w, out=dx[outer])
        if ctx.needs_input_grad[1]:
            part = d.t() @ y[outer]
            dw = part.to(weight.dtype) if dw is None else dw.add_(part)
        if bias is not None and ctx.needs_input_grad[2]:
            part = d.sum(0)
            db = part.to(bias.dtype) if db is None else db.add_(part)
    return [None if dx is None else dx.to(x.dtype), dw, db]


def _slopes(z: Tensor, token: Tensor, g_logp: Tensor | None, g_h: Tensor | None) -> Tensor:
    """The gradient towards the logits `z`, in their place."""
    if g_h is None:
        assert g_logp is not None
        d = torch.softmax(z, 1).mul_(-g_logp[:, None])
    else:
        log_p = z.log_softmax(1)
        p = log_p.exp()
        d = log_p.sub_((p * log_p).sum(1, keepdim=True)).mul_(p).mul_(-g_h[:, None])
        if g_logp is not None:
            d.addcmul_(p, g_logp[:, None], value=-1)
    return d if g_logp is None else d.scatter_add_(1, token[:, None], g_logp[:, None])


def _parts(count: int, most: int) -> list[slice]:
    """As few parts as there can be of at most so many, all of about one size: a product with few rows is slow."""
    step = math.ceil(count / max(1, math.ceil(count / max(1, most))))
    return [slice(i, min(i + step, count)) for i in range(0, count, max(1, step))]


def _longest(parts: list[slice]) -> int:
    return max((part.stop - part.start for part in parts), default=0)
