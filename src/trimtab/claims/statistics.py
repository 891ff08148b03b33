"""What a few paired seeds say about an effect: its interval, and the smallest effect they could have shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np

from trimtab.core.errors import TrimtabError
from trimtab.report.intervals import bootstrap_mean, t_quantile, wilson

Kind = Literal["difference", "ratio"]
FEW = 30  # below it the percentile bootstrap of a mean covers too rarely, so Student's t is used


class ClaimError(TrimtabError):
    """A claim that cannot be measured as asked."""


@dataclass(frozen=True)
class Effect:
    """value with its 95% interval; detectable: the smallest departure from no effect (0, or a ratio of 1) that so many
    seeds of this spread would have shown with 80% power at 5% two-sided; how: which interval it is."""

    value: float
    low: float
    high: float
    detectable: float
    how: str


def paired_effect(method: Sequence[float], baseline: Sequence[float], kind: Kind = "difference") -> Effect:
    """The effect of the method on the baseline, paired by seed: `mean(m_i - b_i)` or `exp(mean(log(m_i / b_i)))`.

    interval   Student's t on the paired differences (of logarithms for a ratio) below 30 seeds, from there on the
               percentile bootstrap over seeds; where both arms are 0 or 1 at every seed (found or not), Newcombe's
               score interval, which keeps a width when all seeds agree
    detectable half the interval x (q(.975) + q(.80)) / q(.975) with the same quantiles: the usual power calculation,
               (q(.975) + q(.80)) x standard error, on the spread that was seen

    method, baseline: [n] finite, n >= 2, the same seeds in the same order; above 0 for a ratio.
    Raises `ClaimError` outside these ranges.
    Sources: R. G. Newcombe, Statistics in Medicine 17 (1998) 2635-2650, method 10; M. Bland, An Introduction to Medical
    Statistics (2015), chapter 18.
    """
    m, b = np.asarray(method, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    if m.shape != b.shape or m.ndim != 1 or len(m) < 2:
        raise ClaimError(f"{len(m)} and {len(b)} values were given; a paired effect needs the same two seeds or more")
    if not (np.isfinite(m).all() and np.isfinite(b).all()):
        raise ClaimError("a value is nan or infinite; a seed that broke down is not a number to be averaged")
    if kind == "ratio" and not ((m > 0).all() and (b > 0).all()):
        raise ClaimError("a ratio needs values above 0; use a difference for values that may be 0")
    n = len(m)
    x = np.log(m / b) if kind == "ratio" else m - b
    value = float(x.mean())
    quantiles = (NormalDist().inv_cdf(0.975), NormalDist().inv_cdf(0.8))
    if kind == "difference" and np.isin(m, (0, 1)).all() and np.isin(b, (0, 1)).all():
        how, (low, high) = f"Newcombe, {n} seeds", newcombe(m, b)
    elif n < FEW:
        how, quantiles = f"Student t, {n} seeds", (t_quantile(0.975, n - 1), t_quantile(0.8, n - 1))
        half = quantiles[0] * float(x.std(ddof=1)) / math.sqrt(n)
        low, high = value - half, value + half
    else:
        how, (_, low, high) = f"bootstrap, {n} seeds", bootstrap_mean(x)
    detectable = (high - low) / 2 * (quantiles[0] + quantiles[1]) / quantiles[0]
    if kind == "ratio":
        value, low, high, detectable = (math.exp(v) for v in (value, low, high, detectable))
    return Effect(value, low, high, detectable, how)


def newcombe(m: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """The 95% interval of a difference of paired shares, `mean(m) - mean(b)`, from values that are 0 or 1, `[n]`."""
    n, p, q = len(m), float(m.mean()), float(b.mean())
    low_p, high_p = wilson(float(m.sum()), n)
    low_q, high_q = wilson(float(b.sum()), n)
    spread = math.sqrt(p * (1 - p) * q * (1 - q))
    phi = 0.0 if spread == 0 else float(((m - p) * (b - q)).mean()) / spread

    def side(u: float, v: float) -> float:
        return math.sqrt(max(0.0, u * u - 2 * phi * u * v + v * v))

    return p - q - side(p - low_p, high_q - q), p - q + side(high_p - p, q - low_q)
