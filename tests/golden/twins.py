"""Slow, literal, loop-only transcriptions of the cards' equations, one turn each, on the toy tokens.

A twin gets the batch as it was collected, the starting table of logits and the learning rate; it makes every update
with plain gradient descent and returns the final table. Nothing of trimtab's stages is used here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PASSES = 2
LR = 0.5


def logp(table: Tensor, batch: Any, i: int, t: int) -> Tensor:
    row = table[int(batch.prompt[i, 0]), t]
    total = sum(torch.exp(x) for x in row)
    return row[int(batch.action[i, t])] - torch.log(total)  # type: ignore[arg-type]


def entropy(table: Tensor, batch: Any, i: int, t: int) -> float:
    row = table[int(batch.prompt[i, 0]), t].tolist()
    total = sum(math.exp(x) for x in row)
    return -sum(math.exp(x) / total * (x - math.log(total)) for x in row)


def rows_of(batch: Any, source: int = 0) -> list[int]:
    return [i for i in range(len(batch)) if int(batch.source[i]) == source]


def decisions(batch: Any, i: int) -> list[int]:
    return [t for t in range(batch.mask.shape[1]) if bool(batch.mask[i, t])]


def scores(batch: Any) -> dict[int, float]:
    return {i: sum(float(batch.reward[i, t]) for t in decisions(batch, i)) for i in rows_of(batch)}


def group_members(batch: Any, i: int) -> list[int]:
    return [j for j in rows_of(batch) if int(batch.group[j]) == int(batch.group[i])]


def credit(batch: Any, kind: str, eps: float = 1e-4) -> dict[int, float]:
    """kind: "mean", "loo" or "std" (card `_baselines-language`: REINFORCE with baseline, RLOO, GRPO with ddof 1)."""
    r, made = scores(batch), {}
    for i in r:
        members = group_members(batch, i)
        n = len(members)
        mu = sum(r[j] for j in members) / n
        if kind == "mean":
            made[i] = r[i] - mu
        elif kind == "loo":
            made[i] = r[i] - (sum(r[j] for j in members) - r[i]) / (n - 1) if n > 1 else 0.0
        else:
            s = math.sqrt(sum((r[j] - mu) ** 2 for j in members) / (n - 1)) if n > 1 else 0.0
            made[i] = (r[i] - mu) / (s + eps)
    return made


def descend(table: Tensor, loss_of: Callable[[Tensor], Tensor], passes: int) -> Tensor:
    for _ in range(passes):
        leaf = table.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss_of(leaf), leaf)
        table = table - LR * grad
    return table


def reinforce(batch: Any, start: Tensor, kind: str = "mean") -> Tensor:
    a = credit(batch, kind)

    def loss(table: Tensor) -> Tensor:
        total, count = table.new_zeros(()), 0
        for i in rows_of(batch):
            for t in decisions(batch, i):
                total, count = total - a[i] * logp(table, batch, i, t), count + 1
        return total / count

    return descend(start, loss, 1)


def rloo(batch: Any, start: Tensor) -> Tensor:
    return reinforce(batch, start, "loo")


def sft(batch: Any, start: Tensor) -> Tensor:
    def loss(table: Tensor) -> Tensor:
        total, count = table.new_zeros(()), 0
        for i in rows_of(batch, 1):
            for t in decisions(batch, i):
                total, count = total - logp(table, batch, i, t), count + 1
        return total / count

    return descend(start, loss, 1)


def clipped(a: float, r: Tensor, low: float, high: float) -> Tensor:
    inside = torch.clamp(r, low, high)
    return -torch.minimum(r * a, inside * a)


def grpo(
    batch: Any, start: Tensor, *, per: str = "token", kl: float = 0.0, bounds: Callable[..., Any] | None = None,
    keep: Callable[..., Any] | None = None, mu: float = 0.0, phi: bool = True,
) -> Tensor:  # fmt: skip
    """GRPO; with `bounds` BAPO, with `keep` D3S, with `mu` CHORD."""
    a = credit(batch, "std")
    old = {(i, t): float(logp(start, batch, i, t)) for i in rows_of(batch) for t in decisions(batch, i)}
    kept = keep(batch, a, start) if keep else {(i, t) for i, t in old}

    def loss(table: Tensor) -> Tensor:
        low, high = bounds(batch, a, old, kept, table) if bounds else (0.8, 1.2)
        total, count, penalties = table.new_zeros(()), 0, table.new_zeros(())
        row_means = []
        for i in rows_of(batch):
            row, n = table.new_zeros(()), 0
            for t in decisions(batch, i):
                if (i, t) not in kept:
                    continue
                now = logp(table, batch, i, t)
                r = torch.exp(torch.clamp(now - old[i, t], -20, 20))
                value = clipped(a[i], r, low, high)
                d = old[i, t] - now  # the reference is the start, where the old policy stands too
                value = value + kl * (torch.exp(d) - d - 1)
                row, n = row + value, n + 1
            total, count = total + row, count + n
            row_means.append(row / max(n, 1))
        made = total / count if per == "token" else sum(row_means) / len(row_means)  # type: ignore[assignment]
        if mu:
            n = 0
            for i in rows_of(batch, 1):
                for t in decisions(batch, i):
                    now = logp(table, batch, i, t)
                    p = float(torch.exp(now.detach()))
                    weight = p * (1 - p) if phi else 1.0
                    penalties, n = penalties - weight * now, n + 1
            made = (1 - mu) * made + mu * penalties / n
        return made

    return descend(start, loss, PASSES)


def bapo_bounds(batch: Any, a: dict[int, float], old: Any, kept: Any, table: Tensor) -> tuple[float, float]:
    """BAPO as its card's paper version orders it (fraction metric, high first), without the rollout weighting."""

    def phi(low: float, high: float) -> float:
        positive = negative = 0.0
        for i, t in kept:
            r = float(torch.exp(logp(table.detach(), batch, i, t) - old[i, t]))
            if a[i] >= 0:
                positive += min(r, high) * a[i]
            else:
                negative -= max(r, low) * a[i]
        return positive / (positive + negative) if negative > 0 else math.inf

    low, high = 0.6, 1.2
    while phi(low, high) < 0.4 - 1e-6 and high < 3.0 - 1e-6:
        high = min(high + 0.05, 3.0)
    while phi(low, high) < 0.4 - 1e-6 and low < 0.9 - 1e-6:
        low = min(low + 0.02, 0.9)
    return low, high


def bapo(batch: Any, start: Tensor) -> Tensor:
    return grpo(batch, start, bounds=bapo_bounds)


def chord(batch: Any, start: Tensor) -> Tensor:
    return grpo(batch, start, mu=0.1)


def d3s_rows(a: dict[int, float], n: int) -> float:
    """The largest variance of any `n` advantages, by looking at every subset."""
    best = 0.0
    for chosen in itertools.combinations(a.values(), n):
        mean = sum(chosen) / n
        best = max(best, sum((x - mean) ** 2 for x in chosen) / n)
    return best


TWINS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "reinforce": reinforce,
    "rloo": rloo,
    "grpo": grpo,
    "sft": sft,
    "bapo": bapo,
    "chord": chord,
}
