"""Schedules at their ends, in the middle, and where they would divide by zero."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from tests.spikes.bapo import toy_grpo
from tests.spikes.tokens import case
from trimtab.core.errors import MethodError
from trimtab.core.loop import run
from trimtab.core.piece import Schedule
from trimtab.core.schedules import complement, cosine, inverse, linear, power, warmup, warmup_cosine
from trimtab.core.state import Clock
from trimtab.core.terms import fixed
from trimtab.runs.literals import literal

torch.set_num_threads(1)


def at(turns: int = 0, updates: int = 0, **budget: int) -> Clock:
    return Clock(turns=turns, updates=updates, budget=budget or {"turns": 10})


def test_progress_is_the_largest_share_of_the_budget() -> None:
    assert Clock().progress == 0.0
    assert at(5).progress == 0.5
    assert at(20).progress == 1.0
    assert Clock(turns=1, updates=9, budget={"turns": 10, "updates": 10}).progress == 0.9
    assert Clock(turns=1, budget={"turns": 0}).progress == 0.0


@pytest.mark.parametrize(
    ("schedule", "turns", "expected"),
    [
        (linear(2.0, 4.0), 0, 2.0), (linear(2.0, 4.0), 5, 3.0), (linear(2.0, 4.0), 10, 4.0),
        (linear(2.0, 4.0), 99, 4.0),
        (cosine(2.0, 4.0), 0, 2.0), (cosine(2.0, 4.0), 5, 3.0), (cosine(2.0, 4.0), 10, 4.0),
        (cosine(1.0, 0.0), 2, 0.5 * (1 + math.cos(0.2 * math.pi))),
        (power(1.0, 0.5), 0, 1.0), (power(1.0, 0.5), 6, 0.5), (power(3.0, 1.0, ceiling=2.0), 0, 2.0),
        (power(3.0, 1.0, ceiling=2.0), 4, 1.0),
        (complement(linear(0.0, 1.0)), 3, 0.7), (complement(0.25), 3, 0.75),
        (inverse(linear(1.0, 3.0)), 5, 0.5), (inverse(complement(linear(0.0, 0.5))), 10, 2.0),
    ],
)  # fmt: skip
def test_values_by_turn(schedule: Schedule, turns: int, expected: float) -> None:
    assert schedule(at(turns)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("warmup", "decay", "updates", "expected"),
    [(10, 20, 0, 0.0), (10, 20, 5, 0.5), (10, 20, 9, 0.9), (10, 20, 10, 1.0), (10, 20, 20, 0.6), (10, 20, 30, 0.2),
     (10, 20, 999, 0.2), (0, 20, 0, 1.0), (0, 0, 0, 0.2), (4, 0, 3, 0.75), (4, 0, 4, 0.2)],
)  # fmt: skip
def test_warmup_then_cosine_by_update(warmup: int, decay: int, updates: int, expected: float) -> None:
    schedule = warmup_cosine(warmup, decay, peak=1.0, valley=0.2)
    assert schedule(at(turns=77, updates=updates)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("schedule", "updates", "expected"),
    [(warmup(10, 4.0), 0, 0.0), (warmup(10, 4.0), 5, 2.0), (warmup(10, 4.0), 10, 4.0), (warmup(10, 4.0), 99, 4.0),
     (warmup(0, 4.0), 0, 4.0), (warmup(4, linear(1.0, 0.0)), 2, 0.4), (warmup(4, linear(1.0, 0.0)), 5, 0.5),
     (warmup(2, warmup(4, 1.0)), 1, 0.125)],
)  # fmt: skip
def test_warmup_by_update(schedule: Schedule, updates: int, expected: float) -> None:
    clock = Clock(updates=updates, budget={"updates": 10})
    assert schedule(clock) == pytest.approx(expected, abs=1e-12)


def test_schedules_are_read_from_text() -> None:
    assert literal("warmup(10, linear(1e-5, 0))") == warmup(10, linear(1e-5, 0))
    assert literal(" inverse(complement(other=cosine(1, 0.5))) ") == inverse(complement(cosine(1, 0.5)))
    assert literal("fixed(64)") == fixed(64)
    assert [literal(t) for t in ("1e-5", "None", "group", "'f(x)'", "a b", "-x", "(1, 2)")] == [
        1e-5, None, "group", "f(x)", "a b", "-x", (1, 2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("warmpu(10, 1)", "Did you mean 'warmup'"), ("warmup(-1, 1)", "updates=-1 must be a whole number of updates"),
        ("warmup(2.5, 1)", "whole number"), ("warmup(True, 1)", "whole number"), ("warmup(3, 'x')", "or a schedule"),
        ("warmup(3, linear(foo, 0))", "'foo' in .* is neither a number nor a schedule"), ("warmup(3)", "can be made"),
        ("warmup(3, liner(1, 0))", "Did you mean 'linear'"), ("linear('a', 0)", "start='a' must be a number"),
        ("linear(1, 0, 2)", "can be made"), ("linear(1, until=3)", "can be made"), ("cosine(None, 0)", "a number"),
        ("warmup_cosine(-1, 2, 1.0, 0.0)", "warmup=-1 must be"), ("Schedule()", "there is no schedule"),
        ("fixed(0)", "positive"),
    ],
)  # fmt: skip
def test_bad_schedules_are_refused_with_a_sentence(text: str, sentence: str) -> None:
    with pytest.raises(MethodError, match=sentence):
        literal(text)


def test_a_schedule_needs_numbers() -> None:
    with pytest.raises(MethodError, match="end=nan must be a number"):
        linear(1.0, math.nan)
    assert inverse(4.0)(at()) == 0.25


def test_schedules_are_values() -> None:
    assert linear(0.1, 0.2) == linear(0.1, 0.2) != linear(0.1, 0.3)
    assert repr(complement(linear(0.0, 1.0))) == "complement(other=linear(start=0.0, end=1.0))"


def test_a_schedule_without_a_value_says_so() -> None:
    with pytest.raises(MethodError, match="Schedule defines no value"):
        Schedule()(at())


@pytest.mark.parametrize("budget", [{"turns": 4}, {"updates": 24}, {"rows": 96}])
def test_a_learning_rate_may_be_one(budget: dict[str, int]) -> None:
    environment, models = case(0)
    seen: list[float] = []
    m = toy_grpo().set("update.lr", linear(0.4, 0.0))
    for step in run(m, environment, models, until=budget):
        seen.append(step.logs["lr"])
    per = {"turns": 0, "updates": 1, "rows": 0}[next(iter(budget))]
    expected: Callable[[int], float] = lambda turn: 0.4 * (1 - (turn + per * 2.5 / 6) / 4)  # noqa: E731  six updates a turn
    assert seen == pytest.approx([expected(turn) for turn in range(4)])
