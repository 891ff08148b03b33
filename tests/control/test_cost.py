"""What a control run costs: `trimtab profile` names the phases of a step, `trimtab plan` predicts a whole run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.control.worlds import register
from tests.faults.common import Say
from trimtab.core.registry import parse
from trimtab.core.stopwatch import Stopwatch, measuring, phase
from trimtab.runs import plan_control
from trimtab.runs.plan import lines, plan
from trimtab.runs.plan_control import Pace, filling, growth, spent
from trimtab.runs.profile import period
from trimtab.runs.request import Request
from trimtab.stages.replay import Ring

register()
COUNTER = "TrimtabCounter-v0"
PPO = "ppo(horizon=8, rows=None, passes=1, hidden=(8,), lr=1e-3)"
SAC = "sac(hidden=(8,), warmup=20, batch=8, capacity=100)"
TD3 = "td3(hidden=(8,), warmup=20)"


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    return Say(capsys)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WARM", "CLOCK", "WATCH"):
        monkeypatch.setattr(plan_control, name, 0.02)


def ask(method: str, **more: Any) -> Request:
    return Request(method, "", COUNTER, "", eval_problems=2, threads=1, **{"decisions": 500, **more})


# -- profile -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "inside"),
    [
        (PPO, ["collect/act", "collect/environment", "update/forward", "update/backward", "update/optimizer"]),
        (SAC, ["collect/act", "collect/environment", "collect/replay", "critic/update/backward", "critic/annotate",
               "policy/update/forward", "temperature/update", "copies", "other"]),
        (TD3, ["collect/replay", "critic/update/optimizer", "policy/update/backward", "copies", "other"]),
    ],
    ids=["ppo", "sac", "td3"],
)  # fmt: skip
def test_profile_names_the_phases_of_a_step(method: str, inside: list[str], say: Say) -> None:
    said = say("profile", method, "--env", COUNTER, "--threads", "1", "--turns", "6", "--json")
    assert said.code == 0, said.err
    found = json.loads(said.out)
    by = {"/".join(line["path"]): line for line in found["phases"]}
    assert {f"turn/{name}" for name in inside} <= set(by)
    assert found["world"] == "control"
    assert found["turns"] == 6
    first = [v for k, v in by.items() if k.count("/") == 1]
    assert sum(v["seconds"] for v in first) == pytest.approx(by["turn"]["seconds"])
    assert by["turn/collect/act"]["tokens"] == found["tokens_a_turn"]["made"] == (8 if method == PPO else 1)
    assert by["turn"]["flops"] > 0
    assert by["turn"]["peak_bytes"] > 5e7
    assert by["turn/collect/environment"]["peak_bytes"] is None  # a gauge is slower than the step


def test_profile_measures_for_seconds_where_turns_are_steps(
    say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trimtab.runs import profile

    monkeypatch.setattr(profile, "WARM", 0.01)
    monkeypatch.setattr(profile, "LONG", 0.1)
    said = say("profile", TD3, "--env", COUNTER, "--threads", "1", "--out", str(tmp_path / "p"))
    assert said.code == 0, said.err
    assert "decisions/s" in said.out
    assert "tokens" not in said.out
    for word in ("act", "environment", "replay", "critic", "policy", "copies", "other"):
        assert word in said.out
    assert json.loads((tmp_path / "p" / "profile.json").read_text())["turns"] > 3
    assert (tmp_path / "p" / "profile.html").is_file()
    few = say("profile", TD3, "--env", COUNTER, "--threads", "1", "--steps", "7", "--json")
    assert few.code == 0, few.err
    assert json.loads(few.out)["turns"] <= 4  # one to begin with, two counted


def test_a_brief_phase_is_charged_and_its_peak_is_that_of_the_outer_one() -> None:
    sizes = iter([1, 5, 2, 9, 3, 3, 3])
    watch = Stopwatch(gauge=lambda: next(sizes))
    with watch.phase("outer"), watch.phase("inner", brief=True):
        pass
    outer = watch.root.parts["outer"]
    assert outer.peak == 5
    assert outer.parts["inner"].peak == 0
    assert outer.parts["inner"].calls == 1
    assert outer.parts["inner"].seconds <= outer.seconds
    with measuring() as other, phase("named", brief=True):
        pass
    assert "named" in other.root.parts


def test_the_period_of_a_method_is_that_of_all_that_waits() -> None:
    periods = {"ppo": 1, "sac": 1, "td3": 2, "sac(delay=2)": 2, "props(blocks=4)": 4, "props(blocks=1)": 1, "a2c": 1}
    assert {name: period(parse(name)) for name in periods} == periods
    full = {"ppo": 1, "sac": 1, "buffered(batches=3)": 3, "props(batches=2, blocks=4)": 8}
    assert {name: filling(parse(name)) for name in full} == full


# -- plan ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [PPO, SAC, TD3, f"props(batches=1, blocks=2)+{PPO}"])
def test_a_plan_says_what_the_whole_run_will_take(method: str, quick: None) -> None:
    found = plan(ask(method, save_every=40))
    per_turn, first = found["sizes"]["decisions"], found["first_turn"]
    assert first["decisions"] == (20 if "warmup" in method else 4 if "props" in method else 8)
    assert per_turn == (1 if "warmup" in method else 4 if "props" in method else 8)
    assert found["turns"] == 1 + -(-(500 - first["decisions"]) // per_turn)
    assert 500 <= found["decisions"] < 500 + per_turn
    seconds = found["seconds"]
    assert seconds["training"] == pytest.approx(first["seconds"] + (found["turns"] - 1) * found["seconds_a_turn"])
    assert seconds["total"] == pytest.approx(seconds["training"] + seconds["evaluation"] + seconds["checkpoints"])
    assert min(seconds.values()) > 0
    assert sum(found["phases"].values()) == pytest.approx(found["seconds_a_turn"])
    assert {"collect/act", "collect/environment"} <= set(found["phases"])
    assert found["peak_bytes"] > 5e7
    assert found["disk_bytes"] > found["checkpoint_bytes"] > 0
    assert (found["replay_bytes"] > 0) == ("warmup" in method)
    assert "evaluations of 2 episodes" in " ".join(found["assumed"])
    said = dict(lines(found))
    assert "a decision" in said
    assert f"training, {found['turns']} turns" in said


def test_a_plan_as_a_user_types_it(say: Say, quick: None) -> None:
    said = say("plan", SAC, "--env", COUNTER, "--decisions", "300", "--eval-problems", "2", "--threads", "1")
    assert said.code == 0, said.err
    for part in ("a decision", "the first turn, 20 decisions", "training, 281 turns", "peak memory", "replay on disk"):
        assert part in said.out
    assert "learns from nothing before that" in said.out.replace("\n", " ")
    few = say("plan", PPO, "--env", COUNTER, "--steps", "3", "--eval-problems", "2", "--threads", "1", "--json")
    assert json.loads(few.out)["turns"] == 3


def test_turns_and_decisions_follow_the_budget() -> None:
    pace = Pace((1.0, 5000), 0.01, 2.0, 1.0, {}, 9)
    assert spent(pace, {"decisions": 6001}) == (502, 6002)
    assert spent(pace, {"decisions": 10}) == (1, 5000)
    assert spent(pace, {"turns": 11}) == (11, 5020)


def test_rows_of_a_replay_are_counted_as_they_fill_memory_and_disk(tmp_path: Path) -> None:
    def grown(capacity: int, decisions: int) -> tuple[dict[str, float], int]:
        ring = Ring(capacity)
        ring.append(*(torch.ones(150, n) for n in (3, 1, 3, 1, 1, 1)))
        state = SimpleNamespace(pieces={"/replay": ring, "/else": 3})
        return growth(state, decisions, saves=10, keep=2, folder=tmp_path), ring.rows[0].nbytes  # type: ignore[arg-type]

    full, each = grown(100, 10_000)
    assert full["memory"] == 0  # it is full already
    assert full["rows"] == 100
    assert full["disk"] == (100 + 2 * 1000 + 2 * 8192) * each  # with those of older checkpoints, and their last chunks
    empty, each = grown(1_000_000, 200_000)
    assert empty["memory"] == (200_000 - 150) * each
    assert empty["disk"] == (200_000 + 2 * 8192) * each
    assert empty["seconds"] > 0
    assert growth(SimpleNamespace(pieces={}), 9, 1, 1, tmp_path)["disk"] == 0  # type: ignore[arg-type]


def test_a_run_that_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_control, "memory_free", lambda: 10**9)
    monkeypatch.setattr(plan_control, "memory_used", lambda: 10**9)
    assert plan_control._room(1.9e9) == []
    (note,) = plan_control._room(2.5e9)
    assert "collect.capacity" in note
