"""Robust summaries of a few seeds: interquartile means, stratified bootstrap intervals, probability of improvement.

As in the library rliable, computed with numpy and scipy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from trimtab.core.errors import TrimtabError

if TYPE_CHECKING:
    from trimtab.report.paired import Run

Array = np.ndarray[Any, Any]
RESAMPLES = 5000


class ReliableError(TrimtabError):
    """A summary was asked of scores that have none."""


def iqm(scores: Array | Sequence[Any]) -> float:
    """The mean of the middle half of all scores, whatever seed and task they are of.

    Of n scores in order the lowest and the highest `floor(n / 4)` are left out: more robust than the mean, and of less
    variance than the median. scores: `[seeds]` or `[seeds, tasks]`, finite.
    Source: Agarwal et al. 2021 (arXiv 2108.13264), section 4.
    """
    return float(_iqms(_scores(scores)[None])[0])


def _iqms(scores: Array) -> Array:
    """Of every `[seeds, tasks]` of a stack."""
    from scipy.stats import trim_mean

    made: Array = trim_mean(scores.reshape(len(scores), -1), 0.25, axis=1)
    return made


def improvement(better: Array | Sequence[Any], than: Array | Sequence[Any]) -> float:
    """The chance that a run of one method scores higher than a run of the other: 0.5 is no difference.

        P = mean over tasks of (1 / (N M)) sum_i sum_j [x_i > y_j] + [x_i = y_j] / 2

    which is the Mann-Whitney statistic. better, than: `[N]` and `[M]`, or `[N, tasks]` and `[M, tasks]`.
    Source: Agarwal et al. 2021, section 4.3.
    """
    x, y = _pair(better, than)
    return float(_improvements(x[None], y[None])[0])


def _improvements(x: Array, y: Array) -> Array:
    above = x[:, :, None] - y[:, None]
    made: Array = ((above > 0) + 0.5 * (above == 0)).mean((1, 2, 3))
    return made


def iqm_interval(scores: Array | Sequence[Any], level: float = 0.95, seed: int = 0) -> tuple[float, float, float]:
    """`(iqm, low, high)`: a percentile bootstrap, seeds drawn anew within each task. nan where there is one seed."""
    x = _scores(scores)
    return (iqm(x), *_interval([x], lambda stacks: _iqms(stacks[0]), level, seed))


def improvement_interval(
    better: Array | Sequence[Any], than: Array | Sequence[Any], level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """`(P, low, high)` of `improvement`, both sides drawn anew within each task. nan where a side has one seed."""
    x, y = _pair(better, than)
    return (improvement(x, y), *_interval([x, y], lambda stacks: _improvements(*stacks), level, seed))


def luck(better: Array | Sequence[Any], than: Array | Sequence[Any], seed: int = 0) -> float:
    """How often chance alone puts `improvement` as far from 0.5: seeds dealt anew to both sides within each task.

    A permutation test, in (0, 1]. Where two sides do not overlap a bootstrap has no spread however few the seeds are:
    2 seeds on 2 tasks are so by luck 1 time in 18.
    """
    x, y = _pair(better, than)
    rng, n, both = np.random.default_rng(seed), len(x), np.concatenate([x, y])
    order = rng.permuted(np.broadcast_to(np.arange(len(both))[None, :, None], (RESAMPLES, *both.shape)), axis=1)
    dealt = np.take_along_axis(both[None], order, 1)
    far = np.abs(_improvements(dealt[:, :n], dealt[:, n:]) - 0.5)
    seen = abs(improvement(x, y) - 0.5)
    return float((1 + (far >= seen - 1e-12).sum()) / (1 + RESAMPLES))


def _interval(
    groups: Sequence[Array], statistic: Callable[[Sequence[Array]], Array], level: float, seed: int
) -> tuple[float, float]:
    if min(len(g) for g in groups) < 2:
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    drawn = [np.take_along_axis(g[None], rng.integers(0, len(g), (RESAMPLES, *g.shape)), 1) for g in groups]
    low, high = np.quantile(statistic(drawn), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _scores(scores: Array | Sequence[Any]) -> Array:
    x = np.asarray(scores, dtype=np.float64)
    x = x[:, None] if x.ndim == 1 else x
    if x.ndim != 2 or not x.size or not np.isfinite(x).all():
        raise ReliableError(f"scores of shape {list(x.shape)} must be finite numbers, [seeds] or [seeds, tasks]")
    return x


def _pair(better: Array | Sequence[Any], than: Array | Sequence[Any]) -> tuple[Array, Array]:
    x, y = _scores(better), _scores(than)
    if x.shape[1] != y.shape[1]:
        raise ReliableError(f"{x.shape[1]} and {y.shape[1]} tasks cannot be compared; give both sides the same ones")
    return x, y


def summarised(arms: Sequence[str], runs: Sequence[Run], metric: str) -> list[dict[str, Any]]:
    """For each arm that finished some seed: `iqm` of a metric with its ends, and the chance to beat the first arm."""
    scores = {arm: [r.values[metric] for r in runs if r.arm == arm and metric in r.values] for arm in arms}
    made = []
    for arm in (a for a in arms if scores[a]):
        row: dict[str, Any] = {
            "arm": arm,
            "metric": metric,
            "n": len(scores[arm]),
            **_named("iqm", *iqm_interval(scores[arm])),
        }
        if arm != arms[0] and scores[arms[0]]:
            row["improvement"] = _named("value", *improvement_interval(scores[arm], scores[arms[0]]))
        made.append(row)
    return made


def _named(name: str, value: float, low: float, high: float) -> dict[str, float | None]:
    return {name: value, "low": low if math.isfinite(low) else None, "high": high if math.isfinite(high) else None}


def rows(summary: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A summary as text, under HEADS."""
    from trimtab.report.words import interval, number, percent

    def chance(row: Mapping[str, Any]) -> str:
        found = row.get("improvement")
        return f"{percent(found['value'])} {interval(found['low'], found['high'], True)}".rstrip() if found else "-"

    return [
        [row["arm"], f"{number(row['iqm'])} {interval(row['low'], row['high'])}".rstrip(), chance(row), str(row["n"])]
        for row in summary
    ]


HEADS = ["arm", "interquartile mean", "chance to beat the first", "seeds"]
