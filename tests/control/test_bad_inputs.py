"""What goes wrong with an environment or a method, as a user meets it, for methods that learn from replay too."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.control.worlds import register
from tests.faults.common import Say, refused
from trimtab.environments.gym import GymEnvironment
from trimtab.report.folder import RunFolder

register()
COUNTER = "TrimtabCounter-v0"
SAC = "sac(hidden=(8,), warmup=4, batch=4, capacity=60)"
TD3 = "td3(hidden=(8,), warmup=4)"


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    return Say(capsys)


def typed(method: str, env: str, out: Path, *words: str) -> list[str]:
    usual = ["--env", env, "--eval-problems", "1", "--threads", "1", "--out", str(out)]
    return ["train", method, *usual, *words]


@pytest.mark.parametrize(
    ("method", "env", "parts"),
    [
        ("sac", "CartPole-v1", ["a squashed Gaussian makes real-valued actions", "Discrete(2)"]),
        ("td3", "CartPole-v1", ["a deterministic policy makes real-valued actions", "Discrete(2)"]),
        ("dqn", "Pendulum-v1", ["chooses among numbered actions", "Box(-2.0, 2.0, (1,)"]),
        ("props", "CartPole-v1", ["wants 'mean' from the model 'behavior'"]),
        ("bapo+td3", "Pendulum-v1", ["td3 has no piece 'surrogate.bound'"]),
        ("sac", "Pendulum-v9", ["Did you mean 'Pendulum-v1'"]),
        ("sac", "", ["write a Gymnasium id"]),
        ("sac(bogus=1)", "Pendulum-v1", ["sac has no option 'bogus'"]),
    ],
)
def test_methods_and_environments_that_do_not_fit_are_refused_before_a_folder_is_made(
    method: str, env: str, parts: list[str], tmp_path: Path, say: Say
) -> None:
    refused(say(*typed(method, env, tmp_path / "a")), *parts)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("method", [SAC, TD3], ids=["sac", "td3"])
@pytest.mark.parametrize(
    ("fault", "part"),
    [
        ("nan reward", "gave a nan or infinite reward"),
        ("infinite reward", "gave a nan or infinite reward"),
        ("nan observation", "gave a nan or infinite observation"),
        ("raises", "raised RuntimeError: the arm fell off"),
    ],
)
def test_a_fault_while_a_replay_fills_keeps_what_was_learned_before(
    method: str, fault: str, part: str, tmp_path: Path, say: Say
) -> None:
    out = tmp_path / "a"
    env = f"{COUNTER}(end=40, at=30, fault={fault!r})"
    said = say(*typed(method, env, out, "--decisions", "60", "--eval-env", COUNTER))
    refused(said, part, "episode 0", "seed ", "its newest checkpoint is turn-", f"trimtab resume {out}")
    assert RunFolder(out).report.exists()
    refused(say("resume", str(out)), part)  # it meets the same step again, and says the same


def test_a_fault_in_the_environment_of_the_evaluation_is_said_before_anything_is_learned(
    tmp_path: Path, say: Say
) -> None:
    out = tmp_path / "a"
    said = say(*typed(SAC, COUNTER, out, "--decisions", "20", "--eval-env", f"{COUNTER}(fault='raises')"))
    refused(said, "raised RuntimeError: the arm fell off", "Nothing was recorded yet")


def test_an_episode_that_never_ends_stops_the_run_with_the_way_out(
    tmp_path: Path, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(GymEnvironment.__init__.__kwdefaults__, "longest", 30)
    endless = f"{COUNTER}(fault='never ends')"
    said = say(*typed(SAC, endless, tmp_path / "a", "--decisions", "60", "--eval-env", COUNTER))
    refused(said, "has no time limit and its episode does not end", "max_episode_steps=1000", "trimtab resume")
    said = say(*typed(SAC, endless, tmp_path / "b", "--decisions", "60"))  # in the evaluation before training
    refused(said, "has no time limit and its episode does not end", "Nothing was recorded yet")
    limited = f"{COUNTER}(fault='never ends', max_episode_steps=9)"
    assert say(*typed(SAC, limited, tmp_path / "c", "--decisions", "12")).code == 0


def test_a_budget_that_ends_with_the_warm_up_is_said(tmp_path: Path, say: Say) -> None:
    said = say(*typed("sac(hidden=(8,), warmup=30, batch=4)", COUNTER, tmp_path / "a", "--decisions", "20"))
    assert said.code == 0, said.err
    text = " ".join(said.out.split())
    assert "makes 30 decisions before anything is learned" in text
    assert "this run makes one update" in text
    again = say(*typed(SAC, COUNTER, tmp_path / "b", "--decisions", "20"))
    assert "before anything is learned" not in " ".join(again.out.split())
