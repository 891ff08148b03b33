"""BAPO: clip bounds searched anew in every update, so that positive tokens supply a given share of the surrogate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.core.batch import Batch
from trimtab.core.errors import nearest
from trimtab.core.kit import Kit
from trimtab.core.method import Method
from trimtab.core.piece import piece
from trimtab.core.registry import Neutral, method
from trimtab.core.terms import mask_of
from trimtab.methods.language.bases import grpo
from trimtab.stages.surrogate import Bound

METRICS = ("fraction", "ratio", "active")
ORDERS = ("high_first", "low_first")
WEIGHTINGS = ("behavior", "none")
TOLERANCE = 1e-6  # data on policy have a share of exactly target - rounding, which must not start a search

Range = tuple[float, float, float]


def share(r: Tensor, a: Tensor, m: Tensor, low: float, high: float, metric: str) -> float:
    """What positive decisions supply of the surrogate's value under these bounds; inf where nothing is negative.

    e = min(r, high) A m  where A >= 0,  max(r, low) A m  elsewhere;  Pos = sum of e > 0,  Neg = -sum of e < 0
    "fraction" Pos / (Pos + Neg)    "ratio" Pos / Neg    "active" the fraction over decisions that no bound holds
    """
    positive = a >= 0
    e = torch.where(positive, r.clamp(max=high), r.clamp(min=low)) * a * m
    if metric == "active":
        e = e * torch.where(positive, r <= high, r >= low)
    pos, neg = float(e.clamp_min(0).sum()), float(-e.clamp_max(0).sum())
    if neg <= 0:
        return math.inf
    return pos / neg if metric == "ratio" else pos / (pos + neg)


def search(at: Callable[[float, float], float], target: float, low: Range, high: Range, order: str) -> Bound:
    """Raise one bound, then the other, each from its start by its step to its maximum, while `at(low, high) < target`.

    low, high: (start, most, step); a step of 0 never moves. The last step lands exactly on the maximum.
    """
    bounds = {"low": low[0], "high": high[0]}
    for name in ("high", "low") if order == "high_first" else ("low", "high"):
        _, most, step = low if name == "low" else high
        while step > 0 and bounds[name] < most - TOLERANCE and at(bounds["low"], bounds["high"]) < target - TOLERANCE:
            bounds[name] = min(bounds[name] + step, most)
    return Bound(**bounds)


def _sane(options: Mapping[str, Any]) -> str | None:
    for name, known in (("metric", METRICS), ("order", ORDERS), ("weighting", WEIGHTINGS)):
        if options[name] not in known:
            return f"{name}={options[name]!r} is not known. {nearest(str(options[name]), known)}"
    for name, floor, ceiling in (("low", 0.0, 1.0), ("high", 1.0, math.inf)):
        start, most, step = options[name]
        if not (floor <= start <= most <= ceiling and step >= 0):
            return (
                f"{name}={options[name]} must be (start, most, step) with {floor} <= start <= most <= {ceiling} and "
                f"step >= 0; these are bounds of the ratio itself"
            )
    return None


@piece("part", at="update", reads=("advantage", "keep", "mask", "logp_behavior"), validate=_sane)
def balanced(
    kit: Kit,
    batch: Batch,
    now: Mapping[str, Tensor],
    ratio: Tensor,
    *,
    target: float = 0.4,
    low: Range = (0.6, 0.9, 0.02),
    high: Range = (1.2, 3.0, 0.05),
    metric: str = "fraction",
    order: str = "high_first",
    weighting: str = "behavior",
) -> Bound:
    """Bounds under which positive decisions supply at least `target`, searched once over all rows of the update."""
    r, a = ratio.detach(), batch.advantage
    m = mask_of(batch).to(r.dtype)
    if weighting == "behavior":
        m = m * torch.where(m > 0, batch.logp_behavior, 0.0).exp()

    def at(low: float, high: float) -> float:
        return share(r, a, m, low, high, metric)

    found = search(at, target, low, high, order)
    kit.log("bound_low", found.low)
    kit.log("bound_high", found.high)
    shares = {"positive_share_start": at(low[0], high[0]), "positive_share": at(float(found.low), float(found.high))}
    for name, value in shares.items():
        if math.isfinite(value):
            kit.log(name, value)
    return found


@method(
    world="language",
    title="BAPO: Balanced Policy Optimization with Adaptive Clipping",
    arxiv="2510.18927",
    base=grpo,
    case="text",
    neutral=Neutral(
        {"low": (0.8, 0.8, 0.02), "high": (1.2, 1.2, 0.05)},
        level="exact",
        why="bounds with nowhere to go are grpo's clip of 0.2",
    ),
    presets={
        "official_code": {
            "target": 1.0, "low": (0.6, 0.8, 0.05), "high": (1.2, 2.0, 0.05), "metric": "ratio", "order": "low_first",
            "weighting": "none", "dual": 3.0,
        },
        "official_script": {
            "target": 0.5, "low": (0.8, 0.95, 0.05), "high": (1.2, 2.0, 0.1), "metric": "ratio", "order": "low_first",
            "weighting": "none", "dual": 3.0,
        },
    },
)  # fmt: skip
def bapo(
    base: Method,
    *,
    target: float = 0.4,
    low: Range = (0.6, 0.9, 0.02),
    high: Range = (1.2, 3.0, 0.05),
    metric: str = "fraction",
    order: str = "high_first",
    weighting: str = "behavior",
    dual: float | None = None,
) -> Method:
    """Edits to grpo: the clip's bounds are solved from the update, so that positive tokens supply `target` of it.

    `Pos / (Pos + Neg) >= target` over contributions `pi_behavior |clip(r) A|`; c_high rises from 1.2 to 3.0 by 0.05,
    then c_low from 0.6 to 0.9 by 0.02. With one update per batch the ratio is 1 and the bounds are inert: this is for
    stale data (`rows`, `passes` of grpo, replay).

    target: the share asked for. low, high: (start, most, step) of the ratio's bounds. metric: "fraction" (paper),
    "ratio" Pos / Neg (released code), "active" (a deviation: only decisions inside the bounds count; under the two
    published metrics raising c_low can never help, since a clipped negative token still counts |A| c_low). order: which
    bound moves first. weighting: "behavior" multiplies by the sampler's probability (paper), "none" does not (code).
    dual: verl's dual clip, on in the released code.

    Paper and released code disagree in metric, order, weighting, target and ranges: the default is the paper as its
    readers report it, "official_code" the repository's configuration, "official_script" its run script. The released
    search runs once per micro-batch, so its bounds change with the accumulation size; here it sees the whole update.
    """
    bound = balanced(target=target, low=low, high=high, metric=metric, order=order, weighting=weighting)
    made = base.swap("surrogate.bound", bound)
    return made if dual is None else made.swap("surrogate.shape.dual", dual)
