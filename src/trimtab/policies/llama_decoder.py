"""Incremental decoding for models of the Llama family: the same numbers as transformers' forward, several times faster.

What it saves: one product for query, key and value and one for gate and up, over weights laid out for the machine; the
keys and values of a prompt are held and read once for all rows that share it; a step copies nothing that stays. Where
they could be compiled, kernels do in one pass each what lies between the products (`trimtab.native`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.native.language import Kernels
from trimtab.policies.cache import SharedCache
from trimtab.policies.decoders import is_linear
from trimtab.policies.fused import Fused
from trimtab.policies.lean import FAMILY

# Rotary tables that depend on the length seen so far cannot be read one place at a time.
_ROPES = frozenset({"default", "linear", "llama3", "yarn"})
# Prompts are read so many tokens at a time: with more, intermediate results leave the cache and take a tenth longer.
TOKENS_AT_ONCE = 1024


@dataclass(frozen=True)
class _Layer:
    """One block of the model; norms are its own modules, so their weights are always fresh."""

    qkv: Fused
    out: Fused
    gate_up: Fused
    down: Fused
    before_attention: Any
    before_mlp: Any
    query_norm: Any
    key_norm: Any

    @property
    def head_norms(self) -> tuple[Tensor | None, Tensor | None]:
        """The weights of what queries and keys are normalised with, if they are."""
        return (
            None if self.query_norm is None else self.query_norm.weight,
            None if self.key_norm is None else self.key_norm.weight,
        )


class LlamaDecoder:
    """A `Decoder` with fused copies of the weights.

    model: one that `fits`. autocast: products in bfloat16, residual stream, norms and attention in the parameters'
    dtype, as bfloat16 autocast computes them (attention is a little more exact).
    """

    joins = True

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether this is a plain Llama, Mistral, Qwen2 or Qwen3: silu, a static rotary table, full attention, linear
        layers (or adapters)."""
        if type(model) not in FAMILY:
            return False
        c: Any = model.config
        linear = [m for name, m in model.named_modules() if name.rsplit(".", 1)[-1].endswith(("_proj", "lm_head"))]
        return (
            c.hidden_act == "silu"
            and getattr(c, "sliding_window", None) is None
            and all(kind == "full_attention" for kind in getattr(c, "layer_types", None) or ())
            and c.rope_parameters["rope_type"] in _ROPES
            and all(is_linear(m) for m in linear)
        )

    def __init__(self, model: Any, autocast: bool = False) -> None:
        self.model = model
        c, attention = model.config, model.model.layers[0].self_attn
        self.heads: int = c.num_key_value_heads
        self.groups: int = c.num_attention_heads // self.heads
        self.width: int = attention.head_dim
        self.scale: float = attention.scaling
        self.eps: float = c.rms_norm_eps
        self.wide: torch.dtype = model.model.norm.weight.dtype
        self.dtype = torch.bfloat16 if autocast else self.wide
        self.kernels = Kernels.suited(self.wide, self.dtype, model.model.embed_tokens.weight.device)
        self.layers = [self._layer(layer) for layer in model.model.layers]
        self.head = Fused([model.lm_head], self.dtype)

    def _layer(self, layer: Any) -> _Layer:
        a, m = layer.self_attn, layer.mlp
        return _Layer(
            Fused([a.q_proj, a.k_proj, a.v_proj], self.dtype),
            Fused([a.o_proj], self.dtype),
            Fused([m.gate_proj, m.up_proj], self.dtype),
            Fused([m.down_proj], self.dtype),
            layer.input_layernorm,
            layer.post_attention_layernorm,
            getattr(a, "q_norm", None),
            getattr(a, "k_norm", None),
        )

    @property
    def _products(self) -> Iterator[Fused]:
        yield self.head
        for layer in self.layers:
            yield from (layer.qkv, layer.out, layer.gate_up, layer.down)

    def refresh(self, everything: bool = True) -> None:
        """Take over weights that changed: of everything, or of what can learn.

        Norms and the embedding are the model's own tensors, so always fresh.
        """
        for part in self._products:
            part.refresh(everything)

    def let_go(self) -> None:
        """Drop the cache and the copies of what can learn, until the next `refresh` and `open`."""
        vars(self).pop("cache", None)
        for part in self._products:
            part.let_go()

    def open(self, prompts: int, rows: int, length: int, room: int) -> None:
        shape, device = (len(self.layers), self.heads, self.width), self.model.model.embed_tokens.weight.device
        self.cache = SharedCache(shape, prompts, rows, length, room, self.dtype, self.wide, device)

    def admit(self, prompts: list[list[int]]) -> Tensor:
        at_once = max(1, TOKENS_AT_ONCE // max(map(len, prompts)))
        return torch.cat([self._read(prompts[i : i + at_once]) for i in range(0, len(prompts), at_once)])

    def _read(self, prompts: list[list[int]]) -> Tensor:
        """Next-token logits after new prompts. Padded on the right, where a causal model does not look."""
        device = self.model.model.embed_tokens.weight.device
        m, width = len(prompts), max(map(len, prompts))
        ids = torch.tensor([p + [0] * (width - len(p)) for p in prompts], device=device)
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        slots = self.cache.add(lengths, width)
        x: Tensor = self.model.model.embed_tokens(ids)
        delta: Tensor | None = None
        turn = self._rotary(x, torch.arange(width, device=device)[None])
        last = torch.arange(m, device=device), lengths - 1
        for i, layer in enumerate(self.layers):
            seen = self._norm(x, delta, layer.before_attention)
            q, k, v = self._split(layer, layer.qkv(seen), *turn)
            self.cache.read(i, slots, k, v)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=self.groups > 1)
            out = out.transpose(1, 2).reshape(m, width, -1)
            if i == len(self.layers) - 1:  # behind the last keys and values only the last place is asked for
                x, out = x[last], out[last]
            delta = self._rest(layer, x, out)
        return self._logits(x, delta)

    def step(self, tokens: Tensor) -> Tensor:
        x, cache = self.model.model.embed_tokens(tokens), self.cache
        delta: Tensor | None = None
        cos, sin = (part[0] for part in self._rotary(x, cache.place[None]))
        cache.begin()
        for i, layer in enumerate(self.layers):
            out = self._attend(i, layer, layer.qkv(self._norm(x, delta, layer.before_attention)), cos, sin)
            delta = self._rest(layer, x, out)
        cache.end()
        return self._logits(x, delta)

    def keep(self, rows: Tensor) -> None:
        self.cache.keep(rows)

    # -- the layer ----------------------------------------------------------------------------------------------
    def _rotary(self, x: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines, and sines with the sign of the half they are added to, `[..., 1, w]`."""
        cos, sin = self.model.model.rotary_emb(x, place)
        first, second = sin.chunk(2, -1)
        return cos.unsqueeze(-2), torch.cat([-first, second], -1).unsqueeze(-2)

    def _norm(self, x: Tensor, delta: Tensor | None, norm: Any) -> Tensor:
        """Add what a part of a block gave to the states, in place, and normalise them for the next."""
        if self.kernels:
            return self.kernels.add_norm(x, delta, norm.weight, self.eps)
        if delta is not None:
            x += delta
        return F.rms_norm(x, (x.shape[-1],), norm.weight, self.eps).to(self.dtype)

    def _attend(self, i: int, layer: _Layer, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """One token a row: remember its key and value, and what it reads, `[n, heads w]`."""
        if self.kernels:
            return self.kernels.attend(self.cache, i, qkv, cos, sin, *layer.head_norms, self.scale, self.eps)
        q, k, v = self._heads(layer, qkv, cos, sin)
        q = q.unflatten(1, (self.heads, self.groups)) * self.scale
        return self.cache.attend(i, q, k, v).reshape(len(qkv), -1).to(self.dtype)

    def _split(self, layer: _Layer, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value of prompts, `[m, heads, t, w]`."""
        if self.kernels:
            return self.kernels.split(qkv, cos, sin, *layer.head_norms, self.heads, self.width, self.eps)
        return tuple(part.transpose(1, 2).to(self.dtype) for part in self._heads(layer, qkv, cos, sin))

    def _heads(self, layer: _Layer, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query and key (not rounded yet) and value, `[..., heads, w]`, of `[..., (heads + 2 key heads) w]`."""
        qkv = qkv.unflatten(-1, (-1, self.width))
        turned, value = qkv[..., : -self.heads, :].to(cos.dtype), qkv[..., -self.heads :, :]
        if layer.query_norm is not None:
            q, k = turned[..., : -self.heads, :], turned[..., -self.heads :, :]
            turned = torch.cat([self._head_norm(q, layer.query_norm), self._head_norm(k, layer.key_norm)], -2)
        turned = (turned * cos).addcmul_(turned.roll(self.width // 2, -1), sin)
        return turned[..., : -self.heads, :], turned[..., -self.heads :, :], value

    def _head_norm(self, x: Tensor, norm: Any) -> Tensor:
        return F.rms_norm(x, (self.width,), norm.weight, self.eps)

    def _rest(self, layer: _Layer, x: Tensor, out: Tensor) -> Tensor:
        """The block after attention; what it adds to the states `x`, which have taken attention's part."""
        both = layer.gate_up(self._norm(x, layer.out(out), layer.before_mlp))
        if self.kernels:
            return layer.down(self.kernels.gated(both))
        gate, up = both.chunk(2, -1)
        return layer.down(F.silu(gate) * up)

    def _logits(self, x: Tensor, delta: Tensor | None) -> Tensor:
        return self.head(self._norm(x, delta, self.model.model.norm))
