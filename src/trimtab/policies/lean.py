"""The training pass of a plain Llama-like model: what its own layers compute, with less memory and in fewer steps.

Norms, gated layers and low-rank adapters keep their inputs alone for the backward, in the dtype products are taken in;
kernels do in one pass what lies between products, where they are compiled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM

from trimtab.native.language import Kernels
from trimtab.policies.packing import attend

# Architectures whose layers are a norm, attention, a norm and a gated layer, and nothing else.
FAMILY = frozenset({LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM})


class Adapted(torch.autograd.Function):
    """`y = x W' + b + s (x A') B'` with a frozen base, products in the dtype `narrow`.

    x `[..., in]`, W `[out, in]`, A `[r, in]`, B `[out, r]`, s the scaling. Nothing of the size of y is kept or made
    twice; `x A'` is computed again in the backward, which can itself be differentiated.
    Hu et al. 2021 (LoRA), arXiv 2106.09685, eq. 3.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float,
        narrow: torch.dtype,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, a, b)
        ctx.scaling, ctx.narrow = scaling, narrow
        return _product(x, weight, bias, a, b, scaling, narrow)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        grad_x, grad_a, grad_b = _pulled(upstream[0], x, weight, a, b, ctx.scaling, ctx.narrow, ctx.needs_input_grad[0])
        return grad_x, None, None, grad_a, grad_b, None, None


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float, narrow: torch.dtype
) -> Tensor:
    """`x W' + b + s (x A') B'` in `narrow`."""
    flat, base, narrow_a, narrow_b = (t.to(narrow) for t in (x.flatten(0, -2), weight, a, b))
    y = F.linear(flat, base, None if bias is None else bias.to(narrow))
    return y.addmm_(flat @ narrow_a.T, narrow_b.T, alpha=scaling).unflatten(0, x.shape[:-1])


def _pulled(
    g: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float, narrow: torch.dtype, wanted: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of `_product` towards x (if wanted), A and B."""
    g, flat, narrow_a, narrow_b = (t.to(narrow) for t in (g.flatten(0, -2), x.flatten(0, -2), a, b))
    inner = g @ narrow_b  # [tokens, r]
    grad_x = None
    if wanted:
        grad_x = torch.addmm(g @ weight.to(narrow), inner, narrow_a, alpha=scaling).view(x.shape).to(x.dtype)
    grad_a = (inner.T @ flat).to(a.dtype) * scaling
    grad_b = (g.T @ (flat @ narrow_a.T)).to(b.dtype) * scaling
    return grad_x, grad_a, grad_b


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
        return _ungated(upstream[0], *ctx.saved_tensors)


def _gate_up(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, without a graph."""
    kernels = Kernels.suited(torch.float32, gate.dtype, gate.device)
    return kernels.gate_up(gate, up) if kernels else F.silu(gate).mul_(up)


def _ungated(g: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `silu(gate) * up` towards both."""
    if torch.is_grad_enabled():
        s = gate.sigmoid()
        return g * up * s * (1 + gate * (1 - s)), g * gate * s
    kernels = Kernels.suited(torch.float32, gate.dtype, gate.device)
    if kernels:
        return kernels.gate_up_back(g, gate, up)
    return torch.ops.aten.silu_backward(g * up, gate), F.silu(gate).mul_(g)


class GatedAdapted(torch.autograd.Function):
    """`Adapted` of `Gated`: the gated values, the widest of a layer, are made again in the backward."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float,
        narrow: torch.dtype,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(gate, up, weight, a, b)
        ctx.scaling, ctx.narrow = scaling, narrow
        return _product(_gate_up(gate, up), weight, bias, a, b, scaling, narrow)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight, a, b = ctx.saved_tensors
        read = F.silu(gate) * up if torch.is_grad_enabled() else _gate_up(gate, up)
        g, grad_a, grad_b = _pulled(upstream[0], read, weight, a, b, ctx.scaling, ctx.narrow, True)
        assert g is not None
        return *_ungated(g, gate, up), None, None, grad_a, grad_b, None, None


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
    return Adapted.apply(x, *parts(layer), _narrow(x, layer.base_layer.weight.dtype))


def parts(layer: Any) -> tuple[Tensor, Tensor | None, Tensor, Tensor, float]:
    """W, b, A, B and the scaling of a layer that `is_adapted`."""
    (name,) = (n for n in layer.active_adapters if n in layer.lora_A)
    base, a, b = layer.base_layer, layer.lora_A[name].weight, layer.lora_B[name].weight
    return base.weight, base.bias, a, b, layer.scaling[name]


def _norm(norm: Any, x: Tensor) -> Tensor:
    return Norm.apply(x, norm.weight, norm.variance_epsilon, _narrow(x, x.dtype))


def _attended(attention: Any, hidden_states: Tensor, position_embeddings: Any = None, **more: Any) -> Any:
    """Attention of a packed row; of any other the layer's own."""
    a, packed = attention, more.get("packed")
    if packed is None or getattr(a, "sliding_window", None) is not None:
        return type(a).forward(a, hidden_states, position_embeddings=position_embeddings, **more)
    q, k, v = (layer(hidden_states).unflatten(-1, (-1, a.head_dim)) for layer in (a.q_proj, a.k_proj, a.v_proj))
    if hasattr(a, "q_norm"):
        q, k = a.q_norm(q).to(v.dtype), a.k_norm(k).to(v.dtype)
    q, k = Turned.apply(q, *position_embeddings, a.scaling), Turned.apply(k, *position_embeddings, 1.0)
    return a.o_proj(attend(q[0], k[0], v[0], packed).flatten(1)[None]), None


def _gated(mlp: Any, x: Tensor) -> Tensor:
    gate, up, down = mlp.gate_proj(x), mlp.up_proj(x), mlp.down_proj
    if not is_adapted(down):
        return down(Gated.apply(gate, up))
    return GatedAdapted.apply(gate, up, *parts(down), _narrow(gate, down.base_layer.weight.dtype))


def _narrow(x: Tensor, otherwise: torch.dtype) -> torch.dtype:
    """The dtype products are taken in here."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else otherwise
