"""Every rule of a declared copy against a literal computation on one number, and resuming with all of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.laws.checks import digest
from trimtab.core.batch import Batch
from trimtab.core.copies import Copy, at_phase, best, ema, every, frozen, mix, polyak, pool, previous
from trimtab.core.errors import MethodError
from trimtab.core.kit import Kit
from trimtab.core.loop import begin, run
from trimtab.core.method import Method, Track
from trimtab.core.piece import piece
from trimtab.core.schedules import linear
from trimtab.core.state import State, load, save

torch.set_num_threads(1)

METRIC = [0.1, 0.5, 0.3, float("nan"), 0.5, 0.9, -1.0, 0.2]


class Number(nn.Module):
    """One parameter and one buffer; the k-th update sets the parameter to k squared and the buffer to k."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.full((1,), 100.0, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(1, dtype=torch.long))


SEEN: list[dict[str, float]] = []


@piece("collect", writes=("mask", "source"))
def nothing(kit: Kit) -> Batch:
    SEEN.append({name: float(model.x.detach()) for name, model in kit.models.items()})  # type: ignore[operator, union-attr]
    kit.log("metric", METRIC[kit.clock.turns])
    return Batch({"mask": torch.ones(4, 1, dtype=torch.bool), "source": torch.zeros(4, dtype=torch.long)})


@piece("update")
def count_up(kit: Kit, closure: Any) -> Any:
    model: Any = kit.models[kit.model]
    with torch.no_grad():
        model.x.fill_((kit.clock.updates + 1) ** 2)
        model.seen.fill_(kit.clock.updates + 1)
    return {}, False


def method(rows: int = 2, **copies: Copy) -> Method:
    track = Track("policy", trains="policy", pieces=(), update=count_up())
    return Method("numbers", pieces=(nothing(),), tracks=(track,), rows=rows).but(copies=copies)


def go(m: Method, turns: int = 8, state: State | None = None) -> State:
    """Two updates a turn: the source is 100, 1, 4, 9, 16 ..."""
    SEEN.clear()
    state = state or begin(m, None, {"policy": Number()})
    for _ in run(m, None, state.models, until=turns, state=state):
        pass
    return state


def after(rule: Copy, turns: int) -> float:
    return value(go(method(c=rule), turns))


def value(state: State, name: str = "c") -> float:
    model: Any = state.copies[name].module
    return float(model.x)


def source(update: int) -> float:
    return 100.0 if update == 0 else float(update**2)


def test_frozen_is_the_start() -> None:
    assert after(frozen("policy"), 3) == 100.0


def test_previous_is_one_update_behind() -> None:
    assert [after(previous("policy"), t) for t in (1, 2, 3)] == [source(1), source(3), source(5)]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 50])
def test_every_copies_after_each_nth_update(n: int) -> None:
    for turns in (1, 2, 3):
        assert after(every("policy", n), turns) == source(2 * turns // n * n)


@pytest.mark.parametrize("rule", [polyak("policy", 0.1), ema("policy", 0.9)], ids=["polyak", "ema"])
def test_polyak_follows_after_each_update(rule: Copy) -> None:
    expected = 100.0
    for k in range(1, 7):
        expected = 0.9 * expected + 0.1 * source(k)
    assert after(rule, 3) == pytest.approx(expected, abs=1e-12)
    assert after(polyak("policy", 1.0), 3) == source(6)


def test_buffers_are_copied_not_blended() -> None:
    state = go(method(c=polyak("policy", 0.1)), 3)
    assert int(state.copies["c"].module.seen) == 6  # type: ignore[arg-type]


def test_mix_is_made_at_the_start_of_each_turn() -> None:
    go(method(old=previous("policy"), c=mix("policy", "old", 3.0)), 4)
    for turn, seen in enumerate(SEEN):
        a, b = source(2 * turn), (source(2 * turn - 1) if turn else 100.0)
        assert seen["policy"] == a
        assert seen["c"] == pytest.approx(3.0 * a - 2.0 * b, abs=1e-12), "a lookahead point lies outside [0, 1]"


def test_mix_with_a_schedule_and_with_a_uniform_draw() -> None:
    state = go(
        method(start=frozen("policy"), c=mix("policy", "start", linear(0.0, 1.0)), u=mix("policy", "start", "uniform")),
        8,
    )
    shares = []
    for turn, seen in enumerate(SEEN):
        a, b, q = source(2 * turn), 100.0, turn / 8
        assert seen["c"] == pytest.approx(q * a + (1 - q) * b, abs=1e-12)
        if turn and a != b:
            shares.append((seen["u"] - b) / (a - b))
    assert all(0 <= q <= 1 for q in shares)
    assert len({round(q, 9) for q in shares}) == len(shares), "a new draw each turn"
    assert state.copies["u"].memory["q"] == pytest.approx(shares[-1])


def test_pool_holds_one_of_the_last_snapshots() -> None:
    state = go(method(c=pool("policy", k=2, every=3)), 8)
    for turn, seen in enumerate(SEEN):
        taken = [source(2 * t) for t in range(0, turn + 1, 3)][-2:]
        assert seen["c"] in taken
    assert [float(s["x"]) for s in state.copies["c"].memory["snapshots"]] == [source(6), source(12)]
    draws = []
    for seed in range(20):
        m = method(c=pool("policy", k=9, every=1))
        go(m, 8, begin(m, None, {"policy": Number()}, seed=seed))
        draws.append(SEEN[-1]["c"])
    assert len(set(draws)) > 4, "drawn from all of them"


def test_best_keeps_the_turn_of_the_highest_metric() -> None:
    held = [after(best("policy", "metric"), t) for t in range(1, 9)]
    won = [1, 2, 2, 2, 2, 6, 6, 6]  # nan never wins, an equal value does not replace
    assert held == [source(2 * t) for t in won]


def test_best_of_a_number_that_is_not_logged_says_what_is() -> None:
    with pytest.raises(MethodError, match=r"best\('reward'\): this run logs no .*; it logs \['metric'\]"):
        after(best("policy", "reward"), 1)


def test_a_copy_of_a_copy_starts_as_the_model_and_follows() -> None:
    go(method(slow=polyak("policy", 0.5), c=mix("slow", "policy", 0.25)), 3)
    slow = 100.0
    for turn, seen in enumerate(SEEN):
        assert seen["slow"] == pytest.approx(slow)
        assert seen["c"] == pytest.approx(0.25 * slow + 0.75 * source(2 * turn))
        for k in (2 * turn + 1, 2 * turn + 2):
            slow = 0.5 * slow + 0.5 * source(k)


def test_copies_have_no_gradient_and_no_memory_in_common() -> None:
    state = go(method(c=frozen("policy"), d=every("policy", 1)), 1)
    policy: Any = state.models["policy"]
    for name in ("c", "d"):
        model: Any = state.copies[name].module
        assert not model.x.requires_grad
        assert model.x.data_ptr() != policy.x.data_ptr()
    assert policy.x.requires_grad


def test_tied_parameters_are_blended_once() -> None:
    class Tied(Number):
        def __init__(self) -> None:
            super().__init__()
            self.y = self.x

    m = method(c=polyak("policy", 0.5))
    state = begin(m, None, {"policy": Tied()})
    next(run(m, None, state.models, until=1, state=state))
    assert value(state) == pytest.approx(0.5 * (0.5 * 100 + 0.5 * 1) + 0.5 * 4)
    model: Any = state.copies["c"].module
    assert model.y is model.x


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: polyak("policy", 0.0), r"tau=0.0 is outside \(0, 1\]"),
        (lambda: polyak("policy", 1.5), "outside"),
        (lambda: polyak("policy", math.nan), "outside"),
        (lambda: ema("policy", 1.0), "outside"),
        (lambda: every("policy", 0), "needs n >= 1"),
        (lambda: pool("policy", 0, 1), "needs both >= 1"),
        (lambda: mix("policy", "b", "normal"), "q is a number, a schedule, or 'uniform'"),
    ],
)
def test_rules_that_make_no_sense_are_refused(make: Callable[[], Copy], words: str) -> None:
    with pytest.raises(MethodError, match=words):
        make()


def test_a_run_with_every_rule_resumes_exactly(tmp_path: Path) -> None:
    m = method(
        a=frozen("policy"),
        b=previous("policy"),
        c=every("policy", 3),
        d=polyak("policy", 0.1),
        e=mix("policy", "b", 2.0),
        f=mix("policy", "a", "uniform"),
        g=pool("policy", k=3, every=2),
        h=best("policy", "metric"),
        i=at_phase("policy"),
        j=mix("d", "a", linear(0.0, 1.0)),
    )

    def until(turns: int, state: State) -> State:
        loop = run(m, None, state.models, until=8, state=state)
        for _ in range(turns):
            next(loop)
        return state

    straight = digest(until(8, begin(m, None, {"policy": Number()})))
    for k in (1, 3, 6):
        save(until(k, begin(m, None, {"policy": Number()})), tmp_path / str(k))
        state = begin(m, None, {"policy": Number()}, seed=5)
        load(state, tmp_path / str(k))
        assert digest(until(8 - k, state)) == straight
