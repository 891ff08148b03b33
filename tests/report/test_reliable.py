"""Robust summaries over seeds, against loops that say what they are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from trimtab.report.paired import PRIMARY, Run, compared
from trimtab.report.reliable import ReliableError, improvement, improvement_interval, iqm, iqm_interval, luck


def test_the_interquartile_mean_is_that_of_the_middle_half() -> None:
    assert iqm([1, 2, 3, 4, 5, 6, 7, 1000]) == pytest.approx((3 + 4 + 5 + 6) / 4)
    assert iqm([0.0, 1.0, 5.0]) == pytest.approx(2.0)  # a quarter of three is no whole seed
    assert iqm([[1, 10], [2, 20], [3, 30], [4, 40]]) == pytest.approx((3 + 4 + 10 + 20) / 4)


def test_the_chance_of_improvement_counts_pairs_and_half_of_the_ties() -> None:
    x, y = np.array([[1.0, 3.0], [2.0, 3.0], [3.0, 0.0]]), np.array([[2.0, 3.0], [0.0, 1.0]])
    by_hand = np.mean(
        [np.mean([(a > b) + 0.5 * (a == b) for a, b in itertools.product(x[:, task], y[:, task])]) for task in range(2)]
    )
    assert improvement(x, y) == pytest.approx(by_hand)
    assert improvement(y, x) == pytest.approx(1 - by_hand)
    assert improvement([1, 2], [1, 2]) == 0.5


def test_the_bootstrap_draws_seeds_within_tasks() -> None:
    spread = [[0.0, 100.0], [0.0, 100.0], [0.0, 100.0], [0.0, 100.0]]  # no spread over seeds, much over tasks
    assert iqm_interval(spread) == (50.0, 50.0, 50.0)
    value, low, high = iqm_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert low < value == 3.0 < high
    assert iqm_interval([1.0, 2.0, 3.0, 4.0, 5.0]) == (value, low, high)
    assert np.isnan(iqm_interval([1.0])[1])
    sure = improvement_interval([5.0, 6.0, 7.0], [1.0, 2.0, 3.0])
    assert sure == (1.0, 1.0, 1.0)


def test_the_bootstrap_covers_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for k in range(100):
        _, low, high = iqm_interval(rng.normal(size=20), seed=k)
        held += low <= 0 <= high
    assert 85 <= held <= 100


def test_luck_is_counted_by_dealing_seeds_anew_within_tasks() -> None:
    apart = [[5.0, 50.0], [6.0, 60.0]], [[1.0, 10.0], [2.0, 20.0]]
    assert luck(*apart) == pytest.approx(2 / 36, abs=0.01)  # 1/6 a task, both the same way
    three = [[5.0], [6.0], [7.0]], [[1.0], [2.0], [3.0]]
    assert luck(*three) == pytest.approx(2 / 20, abs=0.015)
    assert luck(*three) == luck(*reversed(three))
    assert luck([1.0, 2.0], [1.0, 2.0]) == 1.0


def test_scores_that_have_no_summary_are_refused() -> None:
    for bad in ([], [float("nan")], [[[1.0]]]):
        with pytest.raises(ReliableError, match="finite numbers"):
            iqm(bad)
    with pytest.raises(ReliableError, match="2 and 1 tasks"):
        improvement([[1.0, 2.0]], [[1.0]])


def test_only_returns_are_summarised() -> None:
    def runs(unit: str) -> list[Run]:
        return [
            Run(arm, seed, {PRIMARY: float(seed + (arm == "b"))}, unit=unit) for arm in ("a", "b") for seed in range(4)
        ]

    found = compared(["a", "b"], range(4), runs("return"))
    base, arm = found["reliable"]
    assert (base["iqm"], arm["iqm"]) == (1.5, 2.5)
    assert arm["improvement"]["value"] == improvement([1, 2, 3, 4], [0, 1, 2, 3])
    assert compared(["a", "b"], range(4), runs(""))["reliable"] == []
