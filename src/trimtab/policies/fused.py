"""Linear layers that read the same input as one product, with weights laid out for the machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.policies.decoders import is_frozen, write_weight


def packs(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this machine has bfloat16 products that read a weight in an order of their own.

    Reading the rows of an ordinary matrix in that order is half of the time of a product with few rows.
    """
    if dtype != torch.bfloat16 or device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    known = torch.ops.mkldnn
    return hasattr(known, "_reorder_linear_weight") and bool(known._is_mkldnn_bf16_supported())


class Fused:
    """`x W' + b` of several linear layers side by side, in `dtype`; low-rank adapters are added in.

    layers: of one input. Holds a copy of their weights, unless a lone layer has them in this dtype already.
    """

    def __init__(self, layers: Sequence[Any], dtype: torch.dtype) -> None:
        self.layers, self.dtype = layers, dtype
        self.packed = packs(dtype, getattr(layers[0], "base_layer", layers[0]).weight.device)
        self.refresh()

    @property
    def frozen(self) -> bool:
        """Whether nothing here can learn at present: a network may be thawed later."""
        return is_frozen(*self.layers)

    @torch.no_grad()
    def refresh(self, everything: bool = True) -> None:
        """Take over weights that changed: of everything, or of what can learn."""
        if self.frozen and not everything:
            return
        bases = [getattr(layer, "base_layer", layer) for layer in self.layers]
        if bases == list(self.layers) and len(bases) == 1:
            weight = bases[0].weight.detach().to(self.dtype)
        else:
            sizes = [len(base.weight) for base in bases]
            weight = bases[0].weight.new_empty(sum(sizes), bases[0].weight.shape[1], dtype=self.dtype)
            for layer, part in zip(self.layers, weight.split(sizes)):
                write_weight(layer, part)
        biases = [base.bias for base in bases]
        self.bias: Tensor | None = None
        if any(b is not None for b in biases):
            each = [
                weight.new_zeros(len(m.weight)) if b is None else b.detach().to(self.dtype)
                for m, b in zip(bases, biases)
            ]
            self.bias = torch.cat(each)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None) if self.packed else weight

    def let_go(self) -> None:
        """Hold no copy of weights that can learn until the next `refresh`."""
        if not self.frozen:
            self.weight = self.bias = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed:
            out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return out
        return F.linear(x, self.weight, self.bias)
