"""HAPO's literal twin: the equations of its card A, C, D, E and F, with loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.golden import twins

LR, PASSES = 25.0, 3  # steps so large that ratios leave their bounds: otherwise no branch would be looked at

Key = tuple[int, int]


def signal(entropy: dict[Key, float], pivot: float = 0.8, released: bool = False) -> dict[Key, float]:
    """A: log, less the element at the quantile, over the rms around it, over the largest on each side."""
    log = {key: math.log(max(h, 1e-8)) for key, h in entropy.items()}
    ordered = sorted(log.values())
    middle = ordered[round(pivot * (len(ordered) - 1))]
    d = {key: x - middle for key, x in log.items()}
    std = math.sqrt(max(sum(x * x for x in d.values()) / len(d), 1e-8))
    d = {key: x / std for key, x in d.items()}
    top = max([x for x in d.values() if x > 0], default=1.0)
    bottom = min([x for x in d.values() if x < 0], default=-1.0)
    return {key: x / top if x > 0 else x / (bottom if released else -bottom) for key, x in d.items()}


def token_credit(batch: Any, r: dict[int, float]) -> dict[int, float]:
    """C: mean and population std over the tokens of the group, with the fall-back."""
    made = {}
    for i in r:
        members = twins.group_members(batch, i)
        tokens = [r[j] for j in members for _ in twins.decisions(batch, j)]
        mu = sum(tokens) / len(tokens)
        sigma = math.sqrt(sum((x - mu) ** 2 for x in tokens) / len(tokens))
        made[i] = (r[i] - mu) / (sigma + 1e-6)
        if any(abs((x - mu) / (sigma + 1e-6)) >= 5 for x in tokens):
            made[i] = twins.credit(batch, "std", 1e-6, r)[i]
    return made


def hapo(
    batch: Any, start: Tensor, *, token: bool = True, bound: float = 1.0, redistribute: float = 1.0,
    released: bool = False, old_entropy: bool = False, base: tuple[float, float] = (0.2, 0.28),
    dual: float | None = None, penalty: float = 0.5, limit: int = 4,
    seen: Callable[[float, bool, bool, bool], None] = lambda h, still, low, high: None,
) -> Tensor:  # fmt: skip
    """All updates of one batch; `seen` is told of every decision: h, whether the ratio is still, below or above."""
    r = {}
    for i, score in twins.scores(batch).items():  # DAPO's punishment of length, buffer half of the limit
        over = (limit - limit / 2 - len(twins.decisions(batch, i))) / (limit / 2)
        r[i] = score + penalty * min(0.0, over)
    a = token_credit(batch, r) if token else twins.credit(batch, "std", r=r)
    keys = [(i, t) for i in twins.rows_of(batch) for t in twins.decisions(batch, i)]
    old = {key: float(twins.logp(start, batch, *key)) for key in keys}
    table = start
    for _ in range(PASSES):
        at = start if old_entropy else table
        h = signal({key: twins.entropy(at, batch, *key) for key in keys}, released=released)
        leaf = table.clone().requires_grad_()
        total = leaf.new_zeros(())
        for i, t in keys:
            ratio = torch.exp(twins.logp(leaf, batch, i, t) - old[i, t])
            low = base[0] * (1 - bound * h[i, t]) if h[i, t] <= 0 else base[0]
            high = base[1] * (1 + bound * h[i, t]) if h[i, t] > 0 else base[1]
            x = float(ratio.detach())
            still = 1 - low / 2 < x < 1 + high / 2
            seen(h[i, t], still, x < 1 - low, x > 1 + high)
            moved = still if h[i, t] <= 0 else not still
            mine = a[i] * (1 + redistribute * h[i, t]) if moved else a[i]
            value = torch.maximum(-mine * ratio, -mine * torch.clamp(ratio, 1 - low, 1 + high))
            if dual is not None and mine < 0:
                value = torch.minimum(value, torch.as_tensor(-mine * dual))
            total = total + value
        (grad,) = torch.autograd.grad(total / len(keys), leaf)
        table = table - LR * grad
    return table
