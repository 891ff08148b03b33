"""The training pass of a plain Llama-like model: what its own layers compute, with less memory and in fewer steps.

Norms, gated layers and low-rank adapters keep their inputs alone for the backward, in the dtype products are taken in;
kernels do in one pass what lies between products, where they are compiled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM

from trimtab.native.language import Kernels
from trimtab.policies.packing import attend

# Architectures whose layers are a norm, attention, a norm and a gated layer, and nothing else.
FAMILY = frozenset({LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM})


class Base(NamedTuple):
    """What a layer with an adapter `A`, `B` does not learn: `y = x W' + b + s (x A') B'`."""

    weight: Tensor
    bias: Tensor | None
    scaling: float


class Adapted(torch.autograd.Function):
    """`y = x W' + b + s (x A') B'` of layers that read the same x, products in the dtype `narrow`.

    x `[..., in]`; of each layer a base with W `[out, in]`, and A `[r, in]`, B `[out, r]` (adapters: A, B, A, B, ...).
    The products with all A are one. Nothing of the size of y is kept or made twice; `x A'` is computed again in the
    backward, which can itself be differentiated. Hu et al. 2021 (LoRA), arXiv 2106.09685, eq. 3.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bases: Sequence[Base], narrow: torch.dtype, *adapters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *adapters)
        ctx.bases, ctx.narrow = bases, narrow
        return _products(x, bases, adapters, narrow)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, *adapters = ctx.saved_tensors
        gs, (a, bs) = _flat(upstream, ctx.narrow), _narrowed(ctx.bases, adapters, ctx.narrow)
        inner = _inner(gs, bs)
        grad_x = _towards_x(gs, inner, ctx.bases, a).view(x.shape).to(x.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, *_towards_adapters(gs, inner, x, ctx.bases, adapters, a)


def _products(x: Tensor, bases: Sequence[Base], adapters: Sequence[Tensor], narrow: torch.dtype) -> tuple[Tensor, ...]:
    """`x W' + b + s (x A') B'` of each layer, in `narrow`."""
    (flat,), (a, bs) = _flat([x], narrow), _narrowed(bases, adapters, narrow)
    made = []
    for base, b, low in zip(bases, bs, (flat @ a.T).split([b.shape[1] for b in bs], 1)):
        y = F.linear(flat, base.weight.to(narrow), None if base.bias is None else base.bias.to(narrow))
        made.append(y.addmm_(low, b.T).unflatten(0, x.shape[:-1]))
    return tuple(made)


def _flat(xs: Sequence[Tensor], narrow: torch.dtype) -> list[Tensor]:
    return [x.flatten(0, -2).to(narrow) for x in xs]


def _narrowed(bases: Sequence[Base], adapters: Sequence[Tensor], narrow: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """All A on top of each other, `[R, in]`, and `s B` of each layer."""
    bs = [(b * base.scaling).to(narrow) for base, b in zip(bases, adapters[1::2])]
    return torch.cat([a.to(narrow) for a in adapters[::2]]), bs


def _inner(gs: Sequence[Tensor], bs: Sequence[Tensor]) -> Tensor:
    """Gradients towards `x A'`, side by side, `[tokens, R]`."""
    return torch.cat([g @ b for g, b in zip(gs, bs)], 1)


def _towards_x(gs: Sequence[Tensor], inner: Tensor, bases: Sequence[Base], a: Tensor) -> Tensor:
    """The gradient towards x, `[tokens, in]`: each product is added to the one before where that lies."""
    made: Tensor | None = None
    for g, base in zip(gs, bases):
        weight = base.weight.to(g.dtype)
        made = g @ weight if made is None else made.addmm_(g, weight)
    assert made is not None
    return made.addmm_(inner, a)


def _towards_adapters(
    gs: Sequence[Tensor], inner: Tensor, x: Tensor, bases: Sequence[Base], adapters: Sequence[Tensor], a: Tensor
) -> list[Tensor]:
    """Gradients towards A, B, A, B, ..."""
    (flat,) = _flat([x], a.dtype)
    ranks = [len(one) for one in adapters[::2]]
    made = []
    for grad_a, low, g, base, b in zip(
        (inner.T @ flat).split(ranks), (flat @ a.T).split(ranks, 1), gs, bases, adapters[1::2]
    ):
        made += [grad_a.to(b.dtype), (low.T @ g).T.to(b.dtype) * base.scaling]  # in this order it is faster
    return made


class Norm(torch.autograd.Function):
    """`y = w x / sqrt(mean(x^2) + eps)`, computed in the dtype of x `[..., H]`, given in `narrow`; keeps x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, narrow: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.narrow = eps, narrow
        kernels = Kernels.suited(x.dtype, narrow, x.device)
        if kernels and x.is_contiguous():
            return kernels.add_norm(x, None, weight, eps)
        return torch.mul(x * _inverse_size(x, eps), weight, out=torch.empty_like(x, dtype=narrow))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        g, grad_weight = upstream[0], None
        if ctx.needs_input_grad[1]:
            grad_weight = (g.to(x.dtype) * (x * _inverse_size(x, ctx.eps))).flatten(0, -2).sum(0)
        kernels = None if torch.is_grad_enabled() else Kernels.suited(x.dtype, ctx.narrow, x.device)
        if kernels and x.is_contiguous():
            return kernels.norm_back(g, x, weight, ctx.eps), grad_weight, None, None
        inverse, along = _inverse_size(x, ctx.eps), g.to(x.dtype) * weight
        pull = (along * x).mean(-1, keepdim=True) * inverse.pow(3)
        return along * inverse - x * pull, grad_weight, None, None


def _inverse_size(x: Tensor, eps: float) -> Tensor:
    mean = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]
    return (mean + eps).rsqrt()


class Gated(torch.autograd.Function):
    """`silu(gate) * up`, keeping gate and up alone."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _gate_up(gate, up)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor]:
        return _ungated(upstream[0], *ctx.saved_tensors)[1:]


def _gate_up(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, without a graph."""
    kernels = Kernels.suited(torch.float32, gate.dtype, gate.device)
    return kernels.gate_up(gate, up) if kernels else F.silu(gate).mul_(up)


def _ungated(g: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`silu(gate) * up` once more, and its gradients towards both."""
    if torch.is_grad_enabled():
        s = gate.sigmoid()
        return gate * s * up, g * up * s * (1 + gate * (1 - s)), g * gate * s
    kernels = Kernels.suited(torch.float32, gate.dtype, gate.device)
    if kernels:
        return kernels.gate_up_back(g, gate, up)
    opened = F.silu(gate)
    return opened * up, torch.ops.aten.silu_backward(g * up, gate), opened.mul_(g)


class GatedAdapted(torch.autograd.Function):
    """`Adapted` of `Gated`, one layer: the gated values, the widest of a layer, are made again in the backward."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, base: Base, narrow: torch.dtype, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, a, b)
        ctx.base, ctx.narrow = base, narrow
        return _products(_gate_up(gate, up), [base], [a, b], narrow)[0]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, *adapters = ctx.saved_tensors
        bases, gs = [ctx.base], _flat(upstream, ctx.narrow)
        a, bs = _narrowed(bases, adapters, ctx.narrow)
        inner = _inner(gs, bs)
        g = _towards_x(gs, inner, bases, a).view(gate.shape).to(gate.dtype)
        gated, into_gate, into_up = _ungated(g, gate, up)
        return into_gate, into_up, None, None, *_towards_adapters(gs, inner, gated, bases, adapters, a)


class Turned(torch.autograd.Function):
    """`s (x cos + rotate(x) sin)`: heads `[..., heads, w]` turned by their places, with cos and sin `[..., w]`.

    rotate: `[a, b] -> [-b, a]` of the halves. Su et al. 2021 (RoPE), arXiv 2104.09864, eq. 34.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.scale = scale
        return _turn(x, cos, sin, scale, back=False)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(upstream[0], cos, sin, ctx.scale, back=True), None, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, scale: float, back: bool) -> Tensor:
    kernels = None if torch.is_grad_enabled() else Kernels.suited(cos.dtype, x.dtype, x.device)
    if kernels:
        return kernels.turn(x, cos, sin, scale, back)
    first, second = x.chunk(2, -1)
    turned = torch.cat([second, -first] if back else [-second, first], -1)
    return ((x * cos.unsqueeze(-2) + turned * sin.unsqueeze(-2)) * scale).to(x.dtype)


@contextlib.contextmanager
def lean(model: Any) -> Iterator[None]:
    """Forwards in here compute plain low-rank adapters so and, under autocast, norms, gates and packed attention.

    Other layers, and other architectures, are left as they are.
    """
    changed: list[tuple[Any, Any]] = [(m, _adapted) for m in model.modules() if is_adapted(m)]
    autocast = torch.is_autocast_enabled(next(model.parameters()).device.type)
    if autocast and type(model) in FAMILY and model.config.hidden_act == "silu":
        for layer in model.base_model.layers:
            changed += [(layer.input_layernorm, _norm), (layer.post_attention_layernorm, _norm), (layer.mlp, _gated)]
            changed.append((layer.self_attn, _attended))
    changed = [(layer, forward) for layer, forward in changed if "forward" not in vars(layer)]
    for layer, forward in changed:
        layer.forward = partial(forward, layer)
    try:
        yield
    finally:
        for layer, _ in changed:
            vars(layer).pop("forward", None)


def is_adapted(layer: Any) -> bool:
    """Whether this is a linear layer, frozen, with one adapter of the plain kind, which is in use and not merged."""
    base = getattr(layer, "base_layer", None)
    if type(base) is not nn.Linear or base.weight.requires_grad:
        return False
    names = [n for n in getattr(layer, "active_adapters", ()) if n in layer.lora_A]
    biased = any(m.bias is not None for n in names for m in (layer.lora_A[n], layer.lora_B[n]))
    in_use = not (layer.disable_adapters or layer.merged or layer.training)
    return in_use and len(names) == 1 and names[0] not in layer.lora_variant and not biased


def _adapted(layer: Any, x: Tensor) -> Tensor:
    return _together([layer], x)[0]


def _together(layers: Sequence[Any], x: Tensor) -> Sequence[Tensor]:
    """What layers that read the same input make of it; as one where all of them are adapted."""
    if not all(map(is_adapted, layers)):
        return [layer(x) for layer in layers]
    bases, adapters = zip(*map(parts, layers))
    made: tuple[Tensor, ...] = Adapted.apply(x, bases, _narrow(x, bases[0].weight.dtype), *chain(*adapters))
    return made


def parts(layer: Any) -> tuple[Base, tuple[Tensor, Tensor]]:
    """The base, and A and B, of a layer that `is_adapted`."""
    (name,) = (n for n in layer.active_adapters if n in layer.lora_A)
    base = Base(layer.base_layer.weight, layer.base_layer.bias, layer.scaling[name])
    return base, (layer.lora_A[name].weight, layer.lora_B[name].weight)


def _norm(norm: Any, x: Tensor) -> Tensor:
    return Norm.apply(x, norm.weight, norm.variance_epsilon, _narrow(x, x.dtype))


def _attended(attention: Any, hidden_states: Tensor, position_embeddings: Any = None, **more: Any) -> Any:
    """Attention of a packed row; of any other the layer's own."""
    a, packed = attention, more.get("packed")
    if packed is None or getattr(a, "sliding_window", None) is not None:
        return type(a).forward(a, hidden_states, position_embeddings=position_embeddings, **more)
    q, k, v = (x.unflatten(-1, (-1, a.head_dim)) for x in _together([a.q_proj, a.k_proj, a.v_proj], hidden_states))
    if hasattr(a, "q_norm"):
        q, k = a.q_norm(q).to(v.dtype), a.k_norm(k).to(v.dtype)
    q, k = Turned.apply(q, *position_embeddings, a.scaling), Turned.apply(k, *position_embeddings, 1.0)
    return a.o_proj(attend(q[0], k[0], v[0], packed).flatten(1)[None]), None


def _gated(mlp: Any, x: Tensor) -> Tensor:
    (gate, up), down = _together([mlp.gate_proj, mlp.up_proj], x), mlp.down_proj
    if not is_adapted(down):
        return down(Gated.apply(gate, up))
    base, adapter = parts(down)
    return GatedAdapted.apply(gate, up, base, _narrow(gate, base.weight.dtype), *adapter)


def _narrow(x: Tensor, otherwise: torch.dtype) -> torch.dtype:
    """The dtype products are taken in here."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else otherwise
