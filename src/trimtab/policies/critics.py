"""Action values, and the temperature of maximum-entropy methods."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.batch import Batch
from trimtab.core.contracts import Decision, Pullback
from trimtab.policies.dense import StackedLayer, held_by, layers, pullback
from trimtab.policies.layers import ACTIVATIONS, MLP, Inputs


def each(value: Tensor, batch: Batch) -> Tensor:
    """`value` `[N, T, K]` where our policy decided, 0 elsewhere."""
    return value if batch.same("mask") == 1 else torch.where(batch["mask"][..., None], value, torch.zeros_like(value))


class Ensemble(nn.Module):
    """`Q_1(s, a) ... Q_E(s, a)`: critics of one shape with every layer of theirs in one tensor.

    `evaluate` gives `value`, all of them `[N, T, E]`, or `first`, `Q_1` alone `[N, T]` at the price of one.
    """

    provides = frozenset({"value", "first"})

    def __init__(
        self, inputs: Inputs, width: int, hidden: tuple[int, ...], count: int, activation: str, matmul: str
    ) -> None:
        super().__init__()
        self.inputs, self.matmul, self.activation = inputs, matmul, ACTIVATIONS[activation]
        widths = (inputs.width + width, *hidden, 1)
        self.layers = nn.ModuleList(StackedLayer(count, a, b, inputs.dtype) for a, b in pairwise(widths))

    def evaluate(self, batch: Batch, want: frozenset[str]) -> dict[str, Tensor]:
        held = held_by(self.layers)
        if want == {"first"}:
            held = [p[:1] for p in held]
        made = layers(self._seen(batch), held, self.activation, self.matmul)
        value = each(made.view(-1, *batch["mask"].shape).movedim(0, -1), batch)
        return {k: value if k == "value" else value[..., 0] for k in want & self.provides}

    def pullback(self, batch: Batch, want: frozenset[str]) -> Pullback | None:
        """See `contracts.Policy.evaluate`; of `value` where every decision is our policy's."""
        if want != {"value"} or batch.same("mask") != 1:
            return None
        passed = pullback(self._seen(batch), held_by(self.layers), self.activation, self.matmul)
        if passed is None:
            return None
        made, into = passed
        value = made.view(-1, *batch["mask"].shape).movedim(0, -1)
        return {"value": value}, lambda grads: into(grads["value"].movedim(-1, 0).reshape(made.shape))

    def _seen(self, batch: Batch) -> Tensor:
        """Observation and action side by side, a row each decision."""
        return torch.cat([self.inputs(batch["obs"]), batch["action"].flatten(2)], -1).flatten(0, 1)


class QValues(nn.Module):
    """`Q(s, a)` for every numbered action a; acts greedily, the smallest number where several are best.

    `evaluate` gives `values` `[N, T, K]`, and `value` `[N, T]`, that of the column `action`.
    """

    provides = frozenset({"value", "values"})

    def __init__(self, inputs: Inputs, net: MLP) -> None:
        super().__init__()
        self.inputs, self.net = inputs, net

    def evaluate(self, batch: Batch, want: frozenset[str]) -> dict[str, Tensor]:
        values = each(self.net(self.inputs(batch["obs"])), batch)
        made = {"values": values} if "values" in want else {}
        return made | ({"value": values.gather(-1, batch["action"][..., None])[..., 0]} if "value" in want else {})

    def act(self, obs: Tensor, carry: Any, rng: torch.Generator) -> tuple[Decision, Any]:
        return Decision(self.mode(obs)), carry

    def mode(self, obs: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.net(self.inputs(obs)).argmax(-1)


class Temperature(nn.Module):
    """One positive number `alpha = exp(log alpha)`; `evaluate` gives `temperature` and `log_temperature`, `[N, T]`."""

    provides = frozenset({"temperature", "log_temperature"})

    def __init__(self, begin: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.begin = begin
        self.log = nn.Parameter(torch.full((), math.log(begin), dtype=dtype))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.log, math.log(self.begin))

    def evaluate(self, batch: Batch, want: frozenset[str]) -> dict[str, Tensor]:
        made = {"log_temperature": self.log, "temperature": self.log.exp()}
        return {name: made[name].expand(batch["mask"].shape) for name in want & self.provides}

    def pullback(self, batch: Batch, want: frozenset[str]) -> Pullback | None:
        """See `contracts.Policy.evaluate`."""
        if not self.log.requires_grad:
            return None
        with torch.no_grad():
            made = self.evaluate(batch, want)
            slope = {"log_temperature": torch.ones_like(self.log), "temperature": self.log.exp()}
        return made, lambda grads: [torch.stack([slope[n] * g.sum() for n, g in grads.items()]).sum()]
