"""CAPO's literal twin: the seven steps of its card, with loops, numbers and lists."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.golden import twins

Rows = dict[int, list[float]]


class Shadow:
    """The modelled Adam: moments of each vocabulary row that was seen."""

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        self.betas, self.eps, self.step = betas, eps, 0
        self.m: Rows = {}
        self.s: Rows = {}

    def direction(self, row: int, g: list[float]) -> list[float]:
        """Step 3: what Adam would make of one row's gradient; nothing is changed."""
        if self.step == 0:
            return g
        (b1, b2), t = self.betas, self.step + 1
        m, s = self.m.get(row, [0.0] * len(g)), self.s.get(row, [0.0] * len(g))
        made = []
        for j, x in enumerate(g):
            m1, s1 = b1 * m[j] + (1 - b1) * x, b2 * s[j] + (1 - b2) * x * x
            made.append(m1 / (1 - b1**t) / (math.sqrt(s1 / (1 - b2**t)) + self.eps))
        return made

    def learn(self, gradients: list[tuple[list[int], list[list[float]]]]) -> None:
        """Step 6: of each row the mean over the kept decisions that have it."""
        found: dict[int, list[list[float]]] = {}
        for ids, g in gradients:
            for row, x in zip(ids, g):
                found.setdefault(row, []).append(x)
        b1, b2 = self.betas
        for row, every in found.items():
            mean = [sum(column) / len(every) for column in zip(*every)]
            m, s = self.m.get(row, [0.0] * len(mean)), self.s.get(row, [0.0] * len(mean))
            self.m[row] = [b1 * a + (1 - b1) * b for a, b in zip(m, mean)]
            self.s[row] = [b2 * a + (1 - b2) * b * b for a, b in zip(s, mean)]
        self.step += 1


def looked_at(logp: list[float], action: int, k: int) -> tuple[list[int], list[float], list[float]]:
    """Step 1: the K tokens, their probabilities among themselves, and v; the action is always one of them."""
    ids = sorted(range(len(logp)), key=lambda j: -logp[j])[:k]
    if action not in ids:
        ids[-1] = action
    total = sum(math.exp(logp[j]) for j in ids)
    pi = [math.exp(logp[j]) / total for j in ids]
    return ids, pi, [float(j == action) - p for j, p in zip(ids, pi)]


def predict(
    a: float, ids: list[int], pi: list[float], v: list[float], x: list[float], lr: float, shadow: Shadow | None
) -> tuple[float, float, list[list[float]]]:
    """Steps 2 to 4: (m_F, m_H, g)."""
    g = [[a * vk * xj for xj in x] for vk in v]
    p = [row if shadow is None else shadow.direction(j, row) for j, row in zip(ids, g)]
    u = [sum(pj * xj for pj, xj in zip(row, x)) for row in p]
    d = sum(vk * uk for vk, uk in zip(v, u))
    mean = sum(pk * uk for pk, uk in zip(pi, u))
    variance = sum(pk * uk * uk for pk, uk in zip(pi, u)) - mean * mean
    inner = sum(x1 * x2 for r1, r2 in zip(g, p) for x1, x2 in zip(r1, r2))
    return 0.5 * lr * lr * d * d, lr * inner + 0.5 * lr * lr * a * (d * d - variance), g


def capo(
    batch: Any, start: Tensor, *, fisher: float = math.inf, hessian: float = math.inf, adam: bool = False,
    symmetric: bool = True, normalise: bool = False, k: int = 50, per: str = "token",
    shadow: Shadow | None = None, seen: Callable[[float, bool], None] = lambda a, kept: None,
) -> Tensor:  # fmt: skip
    """All updates of one batch from the table as a linear layer, whose input is a single 1."""
    shadow = shadow or (Shadow() if adam else None)
    a = twins.credit(batch, "std")
    keys = [(i, t) for i in twins.rows_of(batch) for t in twins.decisions(batch, i)]
    old = {key: float(twins.logp(start, batch, *key)) for key in keys}
    places, table = start.shape[1], start
    for _ in range(twins.PASSES):
        kept, gradients = [], []
        for i, t in keys:
            row = table[int(batch.prompt[i, 0]), t]
            logp = [float(z) - math.log(sum(math.exp(float(y)) for y in row)) for z in row]
            x = [0.0] * (start.shape[0] * places)
            x[int(batch.prompt[i, 0]) * places + t] = 1.0
            share = (
                1 / len(keys) if per == "token" else 1 / (len(twins.rows_of(batch)) * len(twins.decisions(batch, i)))
            )
            c = a[i] * share if normalise else a[i]
            ids, pi, v = looked_at(logp, int(batch.action[i, t]), k)
            m_f, m_h, g = predict(c, ids, pi, v, x, twins.LR, shadow)
            on = m_f < fisher and (abs(m_h) < hessian if symmetric else 0 <= m_h < hessian)
            seen(a[i], on)
            if on:
                kept.append((i, t))
                gradients.append((ids, g))
        if shadow is not None:
            shadow.learn(gradients)
        leaf = table.clone().requires_grad_()
        total, rows = leaf.new_zeros(()), {i: leaf.new_zeros(()) for i in twins.rows_of(batch)}
        for i, t in kept:
            value = twins.clipped(a[i], torch.exp(twins.logp(leaf, batch, i, t) - old[i, t]), 0.8, 1.2)
            total, rows[i] = total + value, rows[i] + value
        counts = {i: max(1, sum(j == i for j, _ in kept)) for i in rows}
        mean = sum(rows[i] / counts[i] for i in rows) / len(rows)
        loss = total / max(1, len(kept)) if per == "token" else mean
        (grad,) = torch.autograd.grad(loss + 0 * leaf.sum(), leaf)  # type: ignore[operator]
        table = table - twins.LR * grad
    return table
