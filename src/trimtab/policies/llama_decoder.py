"""Incremental decoding for Llama-architecture models: the same numbers as transformers' forward, about twice as fast.

What it saves: one product for query, key and value and one for gate and up; a preallocated cache instead of one that is
concatenated every step; grouped heads as query length, so that keys and values are never repeated.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from trimtab.policies.decoders import is_linear, weight_of

# Rotary tables that depend on the length seen so far cannot be read one place at a time.
_ROPES = frozenset({"default", "linear", "llama3", "yarn"})


class LlamaDecoder:
    """A `Decoder` with fused copies of the weights.

    model: one that `fits`. autocast: products in bfloat16, residual stream and norms in the parameters' dtype, as
    bfloat16 autocast computes them.
    """

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether this model is a plain Llama: silu, no biases, a static rotary table, linear layers (or adapters)."""
        if type(model) is not LlamaForCausalLM:
            return False
        c: Any = model.config
        linear = [m for name, m in model.named_modules() if name.rsplit(".", 1)[-1].endswith(("_proj", "lm_head"))]
        return (
            c.hidden_act == "silu"
            and not (c.attention_bias or c.mlp_bias)
            and c.rope_parameters["rope_type"] in _ROPES
            and all(is_linear(m) for m in linear)
        )

    def __init__(self, model: Any, autocast: bool = False) -> None:
        self.model = model
        c = self.model.config
        self.heads: int = c.num_key_value_heads
        self.groups: int = c.num_attention_heads // self.heads
        self.width: int = self.model.model.layers[0].self_attn.head_dim
        self.eps: float = c.rms_norm_eps
        weight = self.model.model.embed_tokens.weight
        self.wide = weight.dtype
        self.dtype = torch.bfloat16 if autocast else weight.dtype
        # One matrix per group of layers that read the same input; a lone one still, for its dtype.
        self.fused: list[tuple[Tensor, list[Any]]] = []
        self.layers = [self._layer(layer) for layer in self.model.model.layers]
        self.head = self._fuse(self.model.lm_head)
        self.refresh()

    def _layer(self, layer: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Any, Any]:
        a, m = layer.self_attn, layer.mlp
        return (
            self._fuse(a.q_proj, a.k_proj, a.v_proj),
            self._fuse(a.o_proj),
            self._fuse(m.gate_proj, m.up_proj),
            self._fuse(m.down_proj),
            layer.input_layernorm,
            layer.post_attention_layernorm,
        )

    def _fuse(self, *parts: Any) -> Tensor:
        shapes = [getattr(p, "base_layer", p).weight.shape for p in parts]
        device = self.model.model.embed_tokens.weight.device
        matrix = torch.empty(sum(s[0] for s in shapes), shapes[0][1], dtype=self.dtype, device=device)
        self.fused.append((matrix, list(parts)))
        return matrix

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over weights that changed. Norms and the embedding are the model's own tensors, so always fresh."""
        for matrix, parts in self.fused:
            at = 0
            for part in parts:
                weight = weight_of(part)
                matrix[at : at + len(weight)].copy_(weight)
                at += len(weight)

    def start(self, prompts: Tensor, mask: Tensor, room: int) -> Tensor:
        device = self.head.device
        prompts, mask = prompts.to(device), mask.to(device)
        n, p = prompts.shape
        shape = (len(self.layers), 2, n, self.heads, p + room, self.width)
        self.cache = torch.empty(shape, dtype=self.dtype, device=prompts.device)
        self.used = p
        place = (mask.long().cumsum(1) - 1).clamp_min(0)
        self.place = mask.sum(1)
        padded = not bool(mask.all())
        self.hidden = ~mask if padded else None  # prompt places that are padding
        see = None
        if padded:
            see = torch.ones(p, p, dtype=torch.bool, device=mask.device).tril() & mask[:, None, None, :]
            # A padding place must see something: a softmax over nothing is nan, and nan spreads through the values.
            see = see | torch.eye(p, dtype=torch.bool, device=mask.device)
        x = self.model.model.embed_tokens(prompts)
        cos, sin = self._rotary(x, place)
        for i, layer in enumerate(self.layers):
            q, k, v = self._qkv(layer, x, cos, sin)
            self.cache[i, 0, :, :, :p] = k
            self.cache[i, 1, :, :, :p] = v
            out = F.scaled_dot_product_attention(q, k, v, see, is_causal=see is None, enable_gqa=self.groups > 1)
            x = self._rest(layer, x, out.transpose(1, 2).reshape(n, p, -1))
        return self._logits(x[:, -1])

    def step(self, tokens: Tensor) -> Tensor:
        n = len(tokens)
        end = self.used + 1
        x = self.model.model.embed_tokens(tokens)[:, None]
        cos, sin = self._rotary(x, self.place[:, None])
        see = None
        if self.hidden is not None:
            see = F.pad(~self.hidden, (0, end - self.hidden.shape[1]), value=True)[:, None, None, :]
        for i, layer in enumerate(self.layers):
            q, k, v = self._qkv(layer, x, cos, sin)
            keys, values = self.cache[i, 0, :, :, :end], self.cache[i, 1, :, :, :end]
            keys[:, :, -1:], values[:, :, -1:] = k, v
            q = q.reshape(n, self.heads, self.groups, self.width)
            out = F.scaled_dot_product_attention(q, keys, values, see)
            x = self._rest(layer, x, out.reshape(n, 1, -1))
        self.used = end
        self.place = self.place + 1
        return self._logits(x[:, 0])

    def keep(self, rows: Tensor) -> None:
        self.cache = self.cache.index_select(2, rows)
        self.place = self.place[rows]
        self.hidden = None if self.hidden is None else self.hidden[rows]

    # -- the layer ----------------------------------------------------------------------------------------------
    def _rotary(self, x: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.model.model.rotary_emb(x, place)
        return cos[:, None], sin[:, None]

    def _norm(self, x: Tensor, norm: Any) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), norm.weight, self.eps).to(self.dtype)

    def _qkv(self, layer: Any, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, t, _ = x.shape
        qkv = F.linear(self._norm(x, layer[4]), layer[0]).view(n, t, -1, self.width).transpose(1, 2)
        turned = qkv[:, : -self.heads].to(cos.dtype)
        first, second = turned.chunk(2, -1)
        turned = (turned * cos + torch.cat((-second, first), -1) * sin).to(self.dtype)
        return turned[:, : -self.heads], turned[:, -self.heads :], qkv[:, -self.heads :]

    def _rest(self, layer: Any, x: Tensor, out: Tensor) -> Tensor:
        x = x + F.linear(out, layer[1])
        gate, up = F.linear(self._norm(x, layer[5]), layer[2]).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, layer[3])

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear(self._norm(x, self.model.model.norm), self.head)
