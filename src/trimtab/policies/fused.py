"""Linear layers that read the same input as one product, with weights laid out for the machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.policies.decoders import is_frozen, weight_of


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
        self.packed = packs(dtype, weight_of(layers[0]).device)
        self.frozen = is_frozen(*layers)
        self.refresh()

    @torch.no_grad()
    def refresh(self, everything: bool = True) -> None:
        """Take over weights that changed: of everything, or of what can learn."""
        if self.frozen and not everything:
            return
        weights = [weight_of(layer).detach().to(self.dtype) for layer in self.layers]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        biases = [getattr(layer, "base_layer", layer).bias for layer in self.layers]
        self.bias: Tensor | None = None
        if any(b is not None for b in biases):
            each = [w.new_zeros(len(w)) if b is None else b.detach().to(self.dtype) for w, b in zip(weights, biases)]
            self.bias = torch.cat(each)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None) if self.packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed:
            out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return out
        return F.linear(x, self.weight, self.bias)
