"""Intervals of paired effects: coverage by simulation, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trimtab.claims.statistics import ClaimError, paired_effect


@pytest.mark.parametrize("seeds", [3, 5, 10, 40])
def test_intervals_cover_the_true_effect_as_often_as_they_say(seeds: int) -> None:
    rng, hits, trials = np.random.default_rng(0), 0, 600
    for _ in range(trials):
        shared = rng.normal(size=seeds) * 5  # what a seed does to both arms alike cancels
        b, m = shared + rng.normal(size=seeds), shared + 0.7 + rng.normal(size=seeds)
        effect = paired_effect(m, b)
        hits += effect.low < 0.7 < effect.high
    assert 0.91 <= hits / trials <= 0.98


def test_shares_keep_a_width_when_all_seeds_agree() -> None:
    effect = paired_effect([1.0] * 20, [0.0] * 20)
    assert effect.value == 1.0
    assert effect.high == 1.0
    assert effect.low == pytest.approx(1 - math.sqrt(2) * 0.1611, abs=1e-3)  # Wilson's upper limit of 0 of 20
    assert effect.how.startswith("Newcombe")


def test_intervals_of_shares_cover_too() -> None:
    rng, hits, trials = np.random.default_rng(1), 0, 600
    for _ in range(trials):
        m, b = (rng.random(20) < 0.8).astype(float), (rng.random(20) < 0.3).astype(float)
        effect = paired_effect(m, b)
        hits += effect.low < 0.5 < effect.high
    assert 0.92 <= hits / trials <= 0.99


def test_the_detectable_effect_is_found_four_times_in_five() -> None:
    rng, trials, seeds = np.random.default_rng(2), 800, 10
    claimed = np.mean([paired_effect(rng.normal(size=seeds), np.zeros(seeds)).detectable for _ in range(200)])
    found = sum(paired_effect(claimed + rng.normal(size=seeds), np.zeros(seeds)).low > 0 for _ in range(trials))
    assert 0.72 <= found / trials <= 0.88


def test_a_ratio_is_the_geometric_mean_of_paired_ratios() -> None:
    effect = paired_effect([2.0, 4.0, 9.0], [1.0, 1.0, 3.0], "ratio")
    assert effect.value == pytest.approx((2 * 4 * 3) ** (1 / 3))
    assert effect.low < effect.value < effect.high
    assert effect.detectable > 1
    flipped = paired_effect([1.0, 1.0, 3.0], [2.0, 4.0, 9.0], "ratio")
    assert (flipped.low, flipped.high) == pytest.approx((1 / effect.high, 1 / effect.low))


@pytest.mark.parametrize(
    ("method", "baseline", "kind", "sentence"),
    [
        ([1.0], [2.0], "difference", "two seeds or more"),
        ([1.0, 2.0], [1.0, 2.0, 3.0], "difference", "two seeds or more"),
        ([1.0, math.nan], [1.0, 2.0], "difference", "nan or infinite"),
        ([1.0, 0.0], [1.0, 2.0], "ratio", "above 0"),
    ],
)
def test_what_has_no_interval_is_refused(method: list[float], baseline: list[float], kind: str, sentence: str) -> None:
    with pytest.raises(ClaimError, match=sentence):
        paired_effect(method, baseline, kind)  # type: ignore[arg-type]
