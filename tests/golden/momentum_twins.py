"""Literal twins of GPOMDP, N-SGDM, N-PG-IGT and (N-)HARPG on a softmax table: closed forms and loops, no autograd.

Everything is written for ascent, as the card has it; a table is a list of rows of logits.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

Table = list[list[float]]
DISCOUNT = 0.99


def zeros(like: Table) -> Table:
    return [[0.0] * len(row) for row in like]


def plus(a: Table, b: Table, factor: float = 1.0) -> Table:
    return [[x + factor * y for x, y in zip(r, s)] for r, s in zip(a, b)]


def times(a: Table, factor: float) -> Table:
    return [[factor * x for x in r] for r in a]


def inner(a: Table, b: Table) -> float:
    return sum(x * y for r, s in zip(a, b) for x, y in zip(r, s))


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in row)
    return [math.exp(x) / total for x in row]


def steps(batch: Any, i: int) -> list[tuple[int, int, float]]:
    """(state, action, reward) of every decision of a row."""
    length = int(batch.mask[i].sum())
    return [(int(batch.obs[i, h]), int(batch.action[i, h]), float(batch.reward[i, h])) for h in range(length)]


def to_go(played: list[tuple[int, int, float]], h: int) -> float:
    return sum(DISCOUNT**t * played[t][2] for t in range(h, len(played)))


def score(theta: Table, played: list[tuple[int, int, float]], weights: list[float]) -> Table:
    """`sum_h w_h grad log pi(a_h|s_h)`: on row s it is `e_a - pi`."""
    made = zeros(theta)
    for (s, a, _), w in zip(played, weights):
        pi = softmax(theta[s])
        for b in range(len(pi)):
            made[s][b] += w * ((1.0 if a == b else 0.0) - pi[b])
    return made


def gradient(theta: Table, batch: Any, rows: list[int]) -> Table:
    made = zeros(theta)
    for i in rows:
        played = steps(batch, i)
        made = plus(made, score(theta, played, [to_go(played, h) for h in range(len(played))]), 1 / len(rows))
    return made


def hessian_vector(theta: Table, batch: Any, rows: list[int], v: Table) -> Table:
    """Mean of `grad Phi <grad log p, v> + hess Phi v`; `hess log pi(a|s) v = -pi o (v_s - <pi, v_s>)` on row s."""
    made = zeros(theta)
    for i in rows:
        played = steps(batch, i)
        weights = [to_go(played, h) for h in range(len(played))]
        along = inner(score(theta, played, [1.0] * len(played)), v)
        made = plus(made, score(theta, played, weights), along / len(rows))
        for (s, _, _), w in zip(played, weights):
            pi = softmax(theta[s])
            mean = sum(p * x for p, x in zip(pi, v[s]))
            for b in range(len(pi)):
                made[s][b] -= w * pi[b] * (v[s][b] - mean) / len(rows)
    return made


class Twin:
    """kind: "gpomdp", "n_sgdm", "n_pg_igt", "harpg" or "n_harpg", with the card's schedules."""

    STEP: ClassVar = {"gpomdp": 2 / 3, "n_sgdm": 1.0, "n_pg_igt": 1.0, "harpg": 0.5, "n_harpg": 1.0}
    ETA: ClassVar = {"gpomdp": 0.0, "n_sgdm": 2 / 3, "n_pg_igt": 4 / 5, "harpg": 1.0, "n_harpg": 1.0}

    def __init__(self, kind: str, theta: Table, gamma0: float) -> None:
        self.kind, self.theta, self.before, self.gamma0 = kind, theta, theta, gamma0
        self.d: Table | None = None
        self.t = 0

    def update(self, batch: Any, q: float | None) -> None:
        """One turn on the rows that were collected; `q` is what the run drew for the point between."""
        f = 2 / (self.t + 2)
        eta, step = min(1.0, f ** self.ETA[self.kind]), self.gamma0 * f ** self.STEP[self.kind]
        point = [int(p) for p in batch.point] if "point" in batch else [0] * len(batch)
        here, there = ([i for i, p in enumerate(point) if p == k] for k in (0, 1))
        at, moved = self.theta, plus(self.theta, self.before, -1.0)
        if self.kind == "n_pg_igt":
            at = plus(self.theta, moved, (1 - eta) / eta)
        old = self.d
        if self.kind.endswith("harpg") and old is not None:
            assert q is not None
            between = plus(times(self.theta, q), self.before, 1 - q)
            old = plus(old, hessian_vector(between, batch, there, moved))
        g = gradient(at, batch, here)
        self.d = g if old is None else plus(times(old, 1 - eta), g, eta)
        norm = math.sqrt(inner(self.d, self.d))
        length = step / norm if self.kind.startswith("n_") else step
        self.theta, self.before = plus(self.theta, self.d, length), self.theta
        self.t += 1
