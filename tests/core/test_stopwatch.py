"""Phases: nothing while nobody measures, a tree of spans while somebody does."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from trimtab.core import stopwatch
from trimtab.core.loop import run
from trimtab.core.registry import parse
from trimtab.core.stopwatch import NOTHING, count_rows, measuring, phase, timed, watching
from trimtab.environments.text import load_environment
from trimtab.policies.builtin import load_policy


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is a second later at every look."""
    clock = itertools.count()
    monkeypatch.setattr(stopwatch, "_now", lambda: float(next(clock)))


def test_nothing_happens_while_nobody_measures() -> None:
    assert watching() is None
    assert phase("a") is NOTHING
    assert timed("a")(lambda x: x + 1)(1) == 2
    count_rows(None)  # not even the batch is looked at


@pytest.mark.usefixtures("ticking")
def test_spans_nest_and_their_rest_is_what_no_part_explains() -> None:
    with measuring() as watch, phase("turn"):  # 0 .. 9
        for _ in range(2):
            with phase("update"):  # 1 .. 4, 5 .. 8
                timed("forward")(lambda: None)()  # 2 .. 3, 6 .. 7
    turn = watch.root.parts["turn"]
    assert turn.seconds == 9
    assert (turn.parts["update"].seconds, turn.parts["update"].calls) == (6, 2)
    assert turn.parts["update"].rest() == 4
    assert turn.rest() == 3
    assert [path for path, _ in turn.walk()] == [(), ("update",), ("update", "forward")]
    assert watching() is None


def test_a_failure_closes_its_phases() -> None:
    with measuring() as watch:
        with pytest.raises(ValueError, match="broken"), phase("a"), phase("b"):
            raise ValueError("broken")
        with phase("c"):
            pass
    assert set(watch.root.parts) == {"a", "c"}


def test_a_peak_belongs_to_the_phase_it_happened_in_and_to_those_around_it() -> None:
    peaks = iter([1, 2, 9, 3, 4, 3])  # on entering turn, a; leaving a; entering b, leaving b; leaving turn
    with measuring(gauge=lambda: next(peaks)) as watch, phase("turn"):
        for name in ("a", "b"):
            with phase(name):
                pass
    turn = watch.root.parts["turn"]
    assert (turn.parts["a"].peak, turn.parts["b"].peak) == (9, 4)
    assert turn.peak == 9


def test_a_run_names_its_phases_and_is_the_same_run(tmp_path: Path) -> None:
    method = parse("grpo(kl=0.04)").set("collect.prompts", 2).set("collect.group", 4).set("collect.new_tokens", 3)

    def trained() -> torch.Tensor:
        policy = load_policy("nano")
        for _ in run(method, load_environment("toy:sum(limit=5)"), policy, until=2, memory=3):
            pass
        return torch.cat([p.detach().flatten() for p in policy.parameters()])

    plain = trained()
    with measuring() as watch:
        seen = trained()
    assert torch.equal(plain, seen)
    paths = {path for path, _ in watch.root.walk()}
    assert paths >= {
        ("collect", "sample", "prefill"),
        ("collect", "sample", "weights"),
        ("collect", "reward"),
        ("annotate", "evaluate"),
        ("credit",),
        ("update", "forward"),
        ("update", "backward"),
    }
    forward = watch.root.parts["update"].parts["forward"]
    assert forward.calls == watch.root.parts["update"].parts["backward"].calls
    assert forward.counts["rows"] == 16
