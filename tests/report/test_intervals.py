from __future__ import annotations

import math

import numpy as np
import pytest

from trimtab.report.intervals import (
    IntervalError,
    bootstrap_mean,
    detectable,
    mean_interval,
    paired_interval,
    sign_test,
    t_quantile,
    wilson,
)


def test_wilson_is_the_set_of_proportions_a_score_test_keeps():
    # The definition: p is inside when |k/n - p| <= z sqrt(p (1 - p) / n).
    z = 1.959963984540054
    for k, n in [(0, 5), (1, 7), (7, 50), (46, 50), (50, 50)]:
        low, high = wilson(k, n)
        grid = np.linspace(0, 1, 20001)
        inside = grid[np.abs(k / n - grid) <= z * np.sqrt(grid * (1 - grid) / n) + 1e-12]
        assert low == pytest.approx(inside.min(), abs=1e-4)
        assert high == pytest.approx(inside.max(), abs=1e-4)


def test_wilson_of_extremes():
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 10)[0] == 0.0
    assert wilson(10, 10)[1] == 1.0
    assert wilson(3, 10, level=0.5)[1] < wilson(3, 10, level=0.99)[1]


@pytest.mark.parametrize(("k", "n", "level"), [(-1, 5, 0.95), (6, 5, 0.95), (1, -1, 0.95), (1, 5, 1.0), (1, 5, 0.0)])
def test_wilson_refuses(k, n, level):
    with pytest.raises(IntervalError):
        wilson(k, n, level)


def test_bootstrap_covers_and_repeats_and_leaves_the_global_stream_alone():
    rng = np.random.default_rng(0)
    np.random.seed(3)
    state = np.random.get_state()[1].copy()
    hits = 0
    for i in range(120):
        mean, low, high = bootstrap_mean(rng.normal(2, 3, 60), 0.95, seed=i, resamples=400)
        assert low <= mean <= high
        hits += low <= 2 <= high
    assert 104 <= hits <= 120  # binomial(120, about .94)
    assert (np.random.get_state()[1] == state).all()
    values = rng.normal(size=30)
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)


def test_bootstrap_agrees_with_the_normal_interval_of_a_large_sample():
    values = np.random.default_rng(0).normal(size=4000)
    mean, low, high = bootstrap_mean(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert high - mean == pytest.approx(half, rel=0.1)
    assert mean - low == pytest.approx(half, rel=0.1)


def test_bootstrap_of_little():
    mean, low, high = bootstrap_mean([0.5])
    assert mean == 0.5
    assert math.isnan(low)
    assert math.isnan(high)
    assert bootstrap_mean([2.0, 2.0]) == (2.0, 2.0, 2.0)
    for bad in ([], [1.0, float("nan")], [float("inf")]):
        with pytest.raises(IntervalError):
            bootstrap_mean(bad)
    with pytest.raises(IntervalError, match="100"):
        bootstrap_mean([1.0, 2.0], resamples=5)


def test_mean_interval_chooses():
    assert mean_interval([1, 1, 0, 1])[1:] == wilson(3, 4)
    assert mean_interval([1, 1, 0.5, 1]) == bootstrap_mean([1, 1, 0.5, 1])


def test_sign_test_by_hand() -> None:
    assert sign_test(0, 0) == 1
    assert sign_test(9, 0) == pytest.approx(2 / 2**9)
    assert sign_test(0, 9) == sign_test(9, 0)
    assert sign_test(3, 1) == pytest.approx(2 * (1 + 4) / 16)
    assert sign_test(4, 4) == 1
    with pytest.raises(IntervalError, match="negative"):
        sign_test(-1, 0)


# Quantiles of Student's t from printed tables.
@pytest.mark.parametrize(
    ("p", "df", "t"),
    [(0.975, 1, 12.7062), (0.975, 2, 4.30265), (0.975, 4, 2.77645), (0.975, 9, 2.26216), (0.8, 4, 0.940965),
     (0.1, 5, -1.47588), (0.995, 30, 2.75000), (0.5, 3, 0.0)],
)  # fmt: skip
def test_t_quantiles_are_those_of_the_tables(p, df, t):
    assert t_quantile(p, df) == pytest.approx(t, rel=1e-5)


def test_paired_interval_covers_nineteen_times_in_twenty():
    rng = np.random.default_rng(0)
    ends = [paired_interval(rng.normal(1.0, 2.0, 5))[1:] for _ in range(2000)]
    assert 0.935 < np.mean([low <= 1.0 <= high for low, high in ends]) < 0.965


def test_detectable_is_found_about_eight_times_in_ten():
    rng = np.random.default_rng(1)
    # For the true spread; the formula is an approximation that errs on the safe side for few seeds.
    effect = np.mean([detectable(rng.normal(0.0, 1.0, 8)) for _ in range(400)])
    found = np.mean([paired_interval(rng.normal(effect, 1.0, 8))[1] > 0 for _ in range(1000)])
    assert 0.7 < found < 0.9


def test_no_spread_no_interval():
    for values in ([0.3], [0.1, 0.1, 0.1], [0.3, 0.1 + 0.2]):
        mean, low, high = paired_interval(values)
        assert mean == pytest.approx(values[0])
        assert np.isnan(low)
        assert np.isnan(high)
        assert np.isnan(detectable(values))
    with pytest.raises(IntervalError):
        paired_interval([])
    with pytest.raises(IntervalError, match="df=0"):
        t_quantile(0.9, 0)
