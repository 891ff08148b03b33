"""Intervals for the means a run reports: no reward is shown without one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from math import comb
from statistics import NormalDist

import numpy as np

from trimtab.core.errors import TrimtabError

# Index entries drawn at once by the bootstrap; bounds its memory at about 8 MB whatever the number of values.
_CHUNK = 1_000_000


class IntervalError(TrimtabError):
    """An interval was asked of numbers that have none."""


def wilson(successes: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """The score interval of a proportion: `(low, high)`, both in [0, 1].

        centre = (k + z^2/2) / (n + z^2)
        half   = z / (n + z^2) * sqrt(k (n - k) / n + z^2/4)

    with `z` the normal quantile at `(1 + level) / 2`. Unlike `p +- z se` it never leaves [0, 1] and keeps a width at
    0 of n and n of n. With `n` = 0 nothing is known: `(0, 1)`.

    successes: `k` in [0, n]; n: trials, >= 0; level: coverage in (0, 1).
    Raises `IntervalError` outside these ranges.
    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).
    """
    _check_level(level)
    if n < 0 or not 0 <= successes <= n:
        raise IntervalError(f"wilson got {successes} successes of {n} trials; give 0 <= successes <= n")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + level) / 2)
    centre = (successes + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(successes * (n - successes) / n + z * z / 4)
    # At k = 0 and k = n the two terms are equal on paper; rounding must not leave [0, 1] or exclude the proportion.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def bootstrap_mean(
    values: Sequence[float] | np.ndarray, level: float = 0.95, seed: int = 0, resamples: int = 2000
) -> tuple[float, float, float]:
    """The mean and its percentile bootstrap interval: `(mean, low, high)`, in the units of the values.

        low, high = quantiles (1 -+ level) / 2 of mean(x[i_1], ..., x[i_n]),  i ~ uniform with replacement

    Deterministic in `seed`; the global numpy stream is not touched. One value says nothing about its spread: low and
    high are nan. Equal values give an interval of width 0, so use `wilson` (or `mean_interval`) for right-or-wrong.

    values: [n] finite, any range, n >= 1; level: coverage in (0, 1); resamples: >= 100.
    Raises `IntervalError` for no values, a value that is not finite, or options out of range.
    Source: B. Efron and R. Tibshirani, An Introduction to the Bootstrap (1993), section 13.3.
    """
    _check_level(level)
    x = _finite(values)
    if resamples < 100:
        raise IntervalError(f"bootstrap_mean got resamples={resamples}; its quantiles need at least 100")
    mean = float(x.mean())
    if len(x) == 1:
        return mean, math.nan, math.nan
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, _CHUNK // len(x))
    for start in range(0, resamples, step):
        stop = min(start + step, resamples)
        means[start:stop] = x[rng.integers(0, len(x), (stop - start, len(x)))].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return mean, float(low), float(high)


def sign_test(gained: int, lost: int) -> float:
    """Two-sided p-value of the exact sign test on paired outcomes: problems that turned right against turned wrong.

        p = min(1, 2 sum_{k <= min(gained, lost)} C(n, k) / 2^n),  n = gained + lost

    Problems that stayed right or wrong say nothing about the change. gained, lost: >= 0; with neither, p = 1.
    Source: Q. McNemar, Psychometrika 12 (1947), in its exact form.
    """
    if gained < 0 or lost < 0:
        raise IntervalError(f"gained={gained} and lost={lost} are counts of problems; neither can be negative")
    n, few = gained + lost, min(gained, lost)
    return min(1.0, 2 * sum(comb(n, k) for k in range(few + 1)) / 2**n)


def mean_interval(
    values: Sequence[float] | np.ndarray, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """`(mean, low, high)` by the interval that suits the values: `wilson` if all are 0 or 1, else `bootstrap_mean`.

    values: [n] finite, n >= 1; level: coverage in (0, 1). Raises `IntervalError` as those do.
    """
    x = _finite(values)
    if np.isin(x, (0.0, 1.0)).all():
        return float(x.mean()), *wilson(float(x.sum()), len(x), level)
    return bootstrap_mean(x, level, seed)


def paired_interval(differences: Sequence[float] | np.ndarray, level: float = 0.95) -> tuple[float, float, float]:
    """The mean of paired differences and its Student interval: `(mean, low, high)`, in their units.

        mean -+ t(n - 1, (1 + level) / 2) s / sqrt(n),  s^2 = sum (d_i - mean)^2 / (n - 1)

    For the handful of seeds of a comparison: there the percentile bootstrap is too narrow (of 5 normal values it covers
    the mean 84 times in 100, not 95). One difference, or several that are all equal, say nothing about their spread:
    low and high are nan. Also right for plain values, one a seed.

    differences: [n] finite, n >= 1; level: coverage in (0, 1). Raises `IntervalError` outside these.
    Source: Student, The probable error of a mean, Biometrika 6 (1908).
    """
    _check_level(level)
    mean, error, n = _standard_error(differences)
    half = t_quantile((1 + level) / 2, n - 1) * error if n > 1 and error > 0 else math.nan
    return mean, mean - half, mean + half


def detectable(differences: Sequence[float] | np.ndarray, level: float = 0.95, power: float = 0.8) -> float:
    """The true difference that as many pairs with this spread would show with probability `power`, about.

        (t(n - 1, (1 + level) / 2) + t(n - 1, power)) s / sqrt(n)

    A smaller one would often go unnoticed. nan where the spread is unknown (see `paired_interval`).

    differences: [n] finite, n >= 1; level, power: in (0, 1). Raises `IntervalError` outside these.
    Source: G. Snedecor and W. Cochran, Statistical Methods (1989), the section on sample size.
    """
    _check_level(level)
    _check_level(power)
    _, error, n = _standard_error(differences)
    if n < 2 or error == 0:
        return math.nan
    return (t_quantile((1 + level) / 2, n - 1) + t_quantile(power, n - 1)) * error


def t_quantile(p: float, df: int) -> float:
    """The quantile of Student's t with `df` degrees of freedom: where its distribution function is `p`.

    With theta = atan(t / sqrt(df)) and A(t) = P(-t < T < t), for odd and even df:

        A = (2 / pi) (theta + sin theta (cos theta + 2/3 cos^3 theta + ... up to the power df - 2))
        A = sin theta (1 + 1/2 cos^2 theta + 1 3 / (2 4) cos^4 theta + ... up to the power df - 2)

    p: in (0, 1); df: a whole number >= 1. Raises `IntervalError` outside these.
    Source: M. Abramowitz and I. Stegun, Handbook of Mathematical Functions (1964), 26.7.3 and 26.7.4.
    """
    _check_level(p)
    if df < 1 or df != int(df):
        raise IntervalError(f"t_quantile got df={df}; degrees of freedom are a whole number from 1 on")
    low, high = 0.0, math.pi / 2  # bisect on theta, which is bounded where t is not
    for _ in range(80):
        theta = (low + high) / 2
        low, high = (theta, high) if _t_inside(theta, df) < abs(2 * p - 1) else (low, theta)
    return math.copysign(math.sqrt(df) * math.tan((low + high) / 2), p - 0.5) if p != 0.5 else 0.0


def _t_inside(theta: float, df: int) -> float:
    """P(-t < T < t) at t = sqrt(df) tan(theta)."""
    cosine, odd = math.cos(theta), df % 2
    term, total = (cosine if odd else 1.0), 0.0
    for power in range(odd, df - 1, 2):
        total += term
        term *= (power + 1) / (power + 2) * cosine * cosine
    return 2 / math.pi * (theta + math.sin(theta) * total) if odd else math.sin(theta) * total


def _standard_error(values: Sequence[float] | np.ndarray) -> tuple[float, float, int]:
    x = _finite(values)
    if len(x) == 1 or np.ptp(x) <= 1e-12 * np.abs(x).max():  # equal up to rounding
        return float(x.mean()), 0.0, len(x)
    return float(x.mean()), float(x.std(ddof=1)) / math.sqrt(len(x)), len(x)


def _finite(values: Sequence[float] | np.ndarray) -> np.ndarray:
    x = np.asarray(values, dtype=np.float64).ravel()
    if len(x) == 0:
        raise IntervalError("a mean was asked of no values; give at least one")
    if not np.isfinite(x).all():
        bad = int((~np.isfinite(x)).sum())
        raise IntervalError(f"{bad} of {len(x)} values are nan or infinite; drop or repair them before taking a mean")
    return x


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise IntervalError(f"level={level} is not a coverage; give a number between 0 and 1, such as 0.95")
