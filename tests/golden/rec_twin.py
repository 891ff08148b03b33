"""REC's literal twin: the unified token loss of its card, and its named members as the card's table lists them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.golden import twins

LR, PASSES = 25.0, 3  # steps so large that ratios leave [0.4, 3]: otherwise no mask would be looked at

# name -> clip mode, weight, std, and the rest; from the table of members, the ring's outer bounds being (0.6, 2.0).
MEMBERS: dict[str, dict[str, Any]] = {
    "reinforce": {"mode": "none"},
    "grpo": {"mode": "one", "weight": "is", "std": True},
    "one_side_is": {"mode": "one", "weight": "is"},
    "one_side": {"mode": "one"},
    "two_side_is": {"mode": "two", "weight": "is"},
    "two_side": {"mode": "two"},
    "ring_is": {"mode": "ring", "weight": "is"},
    "ring": {"mode": "ring"},
    "wide": {"mode": "one", "eps": (0.6, 2.0)},
    "gspo_one_side_is": {"mode": "one", "weight": "is", "sequence": True},
    "gspo_one_side": {"mode": "one", "sequence": True},
    "asymre": {"mode": "none", "forward_kl": 0.1},
    "opmd": {"mode": "none", "k2": 0.1},
    "red_drop": {"mode": "none", "drop": True},
    "red_weight": {"mode": "none", "weight": "advantage"},
}


def active(mode: str, a: float, rho: float, eps: tuple[float, float], outer: tuple[float, float]) -> bool:
    low, high = 1 - eps[0], 1 + eps[1]
    if mode == "one":
        return (a >= 0 and rho <= high) or (a <= 0 and rho >= low)
    if mode == "two":
        return low <= rho <= high
    if mode == "ring":
        back = (a >= 0 and rho <= 1 - outer[0]) or (a <= 0 and rho >= 1 + outer[1])
        return low <= rho <= high or back
    return True


def credit(batch: Any, std: bool, drop: bool) -> dict[int, float]:
    """The group-centred reward; with `drop`, rows that the run dropped (it drew the lots) are taken from its batch."""
    r, made = twins.scores(batch), {}
    for i in r:
        members = twins.group_members(batch, i)
        kept = members
        mean = sum(r[j] for j in members) / len(members)
        negative = [j for j in members if r[j] < mean]
        extra = len(negative) - (len(members) - len(negative))
        if drop and extra > 0:
            dropped = [j for j in members if not bool((batch.advantage[j] != 0).any())]
            assert len(dropped) == extra, "as many are dropped as there are too many negatives"
            assert set(dropped) <= set(negative), "only negatives are dropped"
            kept = [j for j in members if j not in dropped]
        mean = sum(r[j] for j in kept) / len(kept)
        s = math.sqrt(sum((r[j] - mean) ** 2 for j in kept) / len(kept))
        made[i] = 0.0 if i not in kept else (r[i] - mean) / (s + 1e-6) if std else r[i] - mean
    return made


def rec(
    batch: Any, start: Tensor, *, mode: str = "one", weight: str = "none", std: bool = False, drop: bool = False,
    eps: tuple[float, float] = (0.2, 0.2), outer: tuple[float, float] = (0.6, 2.0), sequence: bool = False,
    forward_kl: float = 0.0, k2: float = 0.0, k2_sequence: float = 0.0, temp: float = 1.0,
    seen: Callable[[float, float, bool], None] = lambda a, rho, on: None,
) -> Tensor:  # fmt: skip
    """All updates of one batch; `seen(A, rho, active)` is told of every decision of every update."""
    a = credit(batch, std, drop)
    rows = twins.rows_of(batch)
    old = {(i, t): float(twins.logp(start, batch, i, t)) for i in rows for t in twins.decisions(batch, i)}
    table = start
    for _ in range(PASSES):
        leaf = table.clone().requires_grad_()
        total, count, means = leaf.new_zeros(()), 0, []
        for i in rows:
            logs = {t: twins.logp(leaf, batch, i, t) for t in twins.decisions(batch, i)}
            change = {t: x - old[i, t] for t, x in logs.items()}
            far = {t: float(d.detach()) for t, d in change.items()}
            s = math.exp(sum(far.values()) / len(far))
            row = leaf.new_zeros(())
            for t, x in logs.items():
                rho = s if sequence else math.exp(far[t])
                on = active(mode, a[i], rho, eps, outer)
                seen(a[i], rho, on)
                w = {"none": 1.0, "is": rho, "token_is": math.exp(far[t]), "advantage": math.exp(a[i] / temp)}[weight]
                row = row - a[i] * w * x * float(on) + k2 * change[t] ** 2 - forward_kl * x
            row = row + k2_sequence * sum(change.values()) ** 2  # the whole response, squared once
            total, count = total + row, count + len(logs)
            means.append(row / len(logs))
        loss = sum(means) / len(means) if sequence else total / count
        assert isinstance(loss, Tensor)
        (grad,) = torch.autograd.grad(loss, leaf)
        table = table - LR * grad
    return table
