"""Spike: BAPO's bound, solved anew from all rows of every update (card `bapo`)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trimtab.core.batch import Batch
from trimtab.core.kit import Kit
from trimtab.core.method import Method
from trimtab.core.piece import piece
from trimtab.core.registry import Neutral, method
from trimtab.core.terms import mask_of
from trimtab.methods.language.bases import grpo
from trimtab.stages.surrogate import Bound

from .tokens import token_rollouts

TOLERANCE = 1e-6  # on-policy data have a share of exactly target - rounding, which must not start a search


def share(r: Tensor, a: Tensor, m: Tensor, low: float, high: float, metric: str) -> float:
    """Positive decisions' share of the surrogate's value: Pos / Neg ("ratio") or Pos / (Pos + Neg) ("fraction")."""
    r = r.detach()  # the bounds are constants
    e = torch.where(a >= 0, r.clamp(max=high), r.clamp(min=low)) * a * m
    positive, negative = float(e.clamp_min(0).sum()), float(-e.clamp_max(0).sum())
    if negative <= 0:
        return float("inf")
    return positive / negative if metric == "ratio" else positive / (positive + negative)


def search(
    r: Tensor,
    a: Tensor,
    m: Tensor,
    *,
    target: float,
    low: tuple[float, float, float],
    high: tuple[float, float, float],
    metric: str,
    order: str,
) -> tuple[float, float]:
    """Raise one bound, then the other, each from its start to its maximum by its step, until the share is reached."""
    at = {"low": low[0], "high": high[0]}
    limits = {"low": low[1:], "high": high[1:]}

    def short() -> bool:
        return share(r, a, m, at["low"], at["high"], metric) < target - TOLERANCE

    for name in ("high", "low") if order == "high_first" else ("low", "high"):
        most, step = limits[name]
        while step > 0 and at[name] < most - TOLERANCE and short():
            at[name] = min(at[name] + step, most)
    return at["low"], at["high"]


@piece("part", at="update", reads=("advantage", "keep", "mask"))
def balanced(
    kit: Kit,
    batch: Batch,
    now: Mapping[str, Tensor],
    ratio: Tensor,
    *,
    target: float = 0.4,
    low: tuple[float, float, float] = (0.6, 0.9, 0.02),
    high: tuple[float, float, float] = (1.2, 3.0, 0.05),
    metric: str = "fraction",
    order: str = "high_first",
) -> Bound:
    """Bounds such that positive decisions supply at least `target`; low and high are (start, most, step)."""
    m = mask_of(batch)
    found = search(ratio, batch.advantage, m, target=target, low=low, high=high, metric=metric, order=order)
    kit.log("bound_low", found[0])
    kit.log("bound_high", found[1])
    return Bound(*found)


@method(
    world="language",
    title="BAPO (spike)",
    base=grpo,
    case="tokens",
    register=False,
    neutral=Neutral({"low": (0.8, 0.8, 0.02), "high": (1.2, 1.2, 0.05)}, level="exact"),
)
def bapo(
    base: Method,
    *,
    target: float = 0.4,
    low: tuple[float, float, float] = (0.6, 0.9, 0.02),
    high: tuple[float, float, float] = (1.2, 3.0, 0.05),
    metric: str = "fraction",
    order: str = "high_first",
) -> Method:
    """Edits to grpo: the clip's bounds are solved from the update."""
    return base.swap("surrogate.bound", balanced(target=target, low=low, high=high, metric=metric, order=order))


def toy_grpo() -> Method:
    """GRPO on toy tokens with stale data: three updates of 8 rows a batch."""
    base = grpo(rows=8, passes=2)
    return base.swap("collect", token_rollouts()).set("update.lr", 0.05)
