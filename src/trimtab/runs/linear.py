"""A linear model of costs: what something takes is a sum of amounts, each times a price that is not negative."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

Amounts = Mapping[str, float]


def prices(seen: Sequence[tuple[Amounts, float]]) -> dict[str, float]:
    """Non-negative prices `b` that minimise `sum_i ((sum_k a_ik b_k - c_i) / c_i)^2` over observations `(a_i, c_i)`.

    The error is relative, so that a small observation counts as much as a large one; those of cost 0 say nothing and
    are left out, and with none left every price is 0. Amounts are few (at most about four), so every subset of them is
    tried, and the best one whose prices are all positive is taken; of equal ones the smaller.
    """
    names = list(dict.fromkeys(name for amounts, _ in seen for name in amounts))
    known = [(amounts, cost) for amounts, cost in seen if cost > 0]
    best, found = float("inf"), dict.fromkeys(names, 0.0)
    if not known:
        return found
    table = np.array([[amounts.get(name, 0.0) / cost for name in names] for amounts, cost in known])
    for size in range(1, len(names) + 1):
        for chosen in map(list, combinations(range(len(names)), size)):
            part = table[:, chosen]
            if np.linalg.matrix_rank(part) < size:
                continue
            made = np.linalg.lstsq(part, np.ones(len(known)), rcond=None)[0]
            error = float(((part @ made - 1) ** 2).sum())
            if (made > 0).all() and error < best * (1 - 1e-9) - 1e-18:
                best = error
                found = {**dict.fromkeys(names, 0.0), **{names[k]: float(b) for k, b in zip(chosen, made)}}
    return found


def cost(amounts: Amounts, price: Mapping[str, float]) -> float:
    """`sum_k a_k b_k`."""
    return sum(amount * price.get(name, 0.0) for name, amount in amounts.items())
