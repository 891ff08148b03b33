"""Runs of the control world from the command line: train, resume, eval, watch, compare, export; and their faults."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.control.worlds import register
from tests.faults.common import Say, refused
from trimtab.core.errors import MethodError
from trimtab.core.loop import begin
from trimtab.core.state import Clock, checkpoints, load
from trimtab.environments.gym import GymEnvironment
from trimtab.policies import networks
from trimtab.report.folder import RunFolder
from trimtab.returns import HELD_OUT, evaluated
from trimtab.runs import experiment
from trimtab.runs.experiment import evaluate_folder, resume, train
from trimtab.runs.request import Request
from trimtab.runs.rhythm import Rhythm
from trimtab.runs.worlds import build, world_of

register()
COUNTER = "TrimtabCounter-v0"
SMALL = ("ppo.hidden",)
METHOD = "ppo(horizon=8, rows=None, passes=1, hidden=(8,), lr=1e-3)"  # a schedule would depend on the budget


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    return Say(capsys)


def ask(out: Path, **more: Any) -> Request:
    usual: dict[str, Any] = {"steps": 6, "envs": 2, "eval_every": 2, "save_every": 2, "eval_problems": 3, "threads": 1}
    return Request(METHOD, "", more.pop("env", "CartPole-v1"), str(out), **{**usual, **more})


def typed(command: str, *words: str, env: str = COUNTER) -> list[str]:
    usual = ["--env", env, "--envs", "2", "--eval-problems", "3"]
    return [*command.split(" ", 1), *usual, *words] if " " in command else [command, METHOD, *usual, *words]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("control") / "whole"
    train(ask(out), mode="silent")
    return out


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoints(run / "checkpoints")[-1] / "tensors.safetensors")


def test_a_run_folder_has_everything_and_names_what_it_was_made_of(whole: Path) -> None:
    folder = RunFolder(whole)
    config = folder.config()
    assert (config["world"], config["environment"]["name"], config["environment"]["envs"]) == (
        "control",
        "CartPole-v1",
        2,
    )
    assert "gymnasium" in config["versions"]
    assert config["policy"]["parameters"]["policy"] > 0
    assert [r["turn"] for r in folder.metrics()] == [1, 2, 3, 4, 5, 6]
    assert folder.metrics()[-1]["decisions"] == 6 * 8 * 2
    evaluations = folder.evaluations()
    assert [e["turn"] for e in evaluations] == [0, 2, 4, 6]
    assert all(len(e["returns"]) == len(e["drawn"]) == e["n"] == 3 and e["unit"] == "return" for e in evaluations)
    page = folder.report.read_text()
    assert "held-out episodes" in page
    assert "Return while training" in page
    assert "Dead groups" not in page


def test_a_run_resumed_from_its_middle_reaches_the_same_bits(whole: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    train(ask(half, steps=3), mode="silent")
    made = resume(half, mode="silent", steps=6)
    assert made["turns"] == 6
    mine, theirs = tensors(half), tensors(whole)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)
    plain = [{k: v for k, v in e.items() if k != "seconds"} for e in RunFolder(half).evaluations() if e["turn"] != 3]
    assert plain == [{k: v for k, v in e.items() if k != "seconds"} for e in RunFolder(whole).evaluations()]


def test_evaluation_is_paired_and_moves_nothing(whole: Path) -> None:
    made = build(ask(whole))
    state = begin(made.method, made.environment, made.models, seed=0)
    load(state, checkpoints(whole / "checkpoints")[-1])
    before = state.tree()
    first, again = (made.evaluate(state) for _ in range(2))
    assert first == again
    assert first.record()["returns"] == RunFolder(whole).evaluations()[-1]["returns"]
    assert str(before) == str(state.tree())
    few = evaluated(state, made.method, GymEnvironment("CartPole-v1", envs=1, seed=HELD_OUT), 2)
    assert few.returns == first.record()["returns"][:2]  # an episode depends on its number, not on its neighbours


def test_eval_reads_a_run_and_refuses_another_space(whole: Path, say: Say) -> None:
    said = say("eval", str(whole), "--problems", "2", "--json")
    assert said.code == 0
    made = json.loads(said.out)["eval"]
    assert made["after"]["n"] == made["before"]["n"] == 2
    assert made["after"]["unit"] == "return"
    refused(
        say("eval", str(whole), "--env", "Pendulum-v1"), "observation_space", "only be evaluated where they are alike"
    )
    refused(say("eval", str(whole), "--temperature", "1"), "--eval-temperature is an option of language methods")


def test_eval_closes_its_environments(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[GymEnvironment] = []
    closed: list[GymEnvironment] = []
    make, close = GymEnvironment.__init__, GymEnvironment.close
    monkeypatch.setattr(GymEnvironment, "__init__", lambda self, *a, **k: (opened.append(self), make(self, *a, **k))[1])
    monkeypatch.setattr(GymEnvironment, "close", lambda self: (closed.append(self), close(self))[1])
    evaluate_folder(whole, problems=1)
    assert len(opened) == 4  # two experiments, each with one to train in and one to be evaluated in
    assert set(map(id, opened)) == set(map(id, closed))


def test_the_command_line_trains_without_a_policy(tmp_path: Path, say: Say) -> None:
    said = say(*typed("train", "--steps", "2", "--out", str(tmp_path / "a")))
    assert said.code == 0, said.err
    assert re.search(r"return: [\d.]+ .* over 3 episodes before, [\d.]+ .* over 3 episodes after", said.out)
    shown = RunFolder(tmp_path / "a").config()["command"]
    assert "--policy" not in shown
    assert "--envs 2" in shown


def test_a_run_left_open_is_spread_over_its_budget(tmp_path: Path) -> None:
    request = Request(METHOD, "", COUNTER, str(tmp_path / "a"), decisions=64 * 8, envs=1, eval_problems=2, threads=1)
    made = train(request, mode="silent")
    folder = RunFolder(tmp_path / "a")
    assert made["turns"] == 64
    assert len(folder.evaluations()) == 21
    assert len(folder.metrics()) == 64
    assert Request(METHOD, "", COUNTER, "").budget == {"decisions": 100_000}
    assert Request("grpo", "nano", "toy:sum", "").budget == {"turns": 60}


REPLAYED = "hidden=(8,), warmup=20, batch=8, capacity=100"


@pytest.mark.parametrize(
    ("method", "env", "decisions"),
    [
        (METHOD, COUNTER, 30 * 8),
        (f"sac({REPLAYED})", COUNTER, 60),
        ("td3(hidden=(8,), warmup=20)", COUNTER, 60),
        (f"dqn({REPLAYED})", "CartPole-v1", 90),
    ],
    ids=["ppo", "sac", "td3", "dqn"],
)
def test_a_run_stopped_and_resumed_is_the_whole_one(
    method: str, env: str, decisions: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def request(out: str) -> Request:
        return Request(method, "", env, str(tmp_path / out), decisions=decisions, eval_problems=1, threads=1)

    record = experiment._record_turn

    def interrupted(made: Any, folder: Any, view: Any, tally: Any, step: Any) -> None:
        record(made, folder, view, tally, step)
        if step.turn == 7:
            signal.raise_signal(signal.SIGINT)

    train(request("whole"), mode="silent")
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "_record_turn", interrupted)
        assert not train(request("half"), mode="silent")["finished"]
    assert resume(tmp_path / "half", mode="silent")["finished"]
    turns = [[e["turn"] for e in RunFolder(tmp_path / out).evaluations()] for out in ("whole", "half")]
    assert turns[0] == turns[1]
    assert len(turns[0]) > 8
    mine, theirs = tensors(tmp_path / "half"), tensors(tmp_path / "whole")
    assert all(torch.equal(mine[k], theirs[k]) for k in theirs)


def test_a_rhythm_is_due_so_many_times_over_the_budget() -> None:
    clock, seen = Clock(budget={"decisions": 1000}), []
    for turn in range(1, 251):
        before = clock.progress
        clock.turns, clock.decisions = turn, 4 * turn
        seen.append(Rhythm(None, 20).due(clock, before))
    assert sum(seen) == 20
    assert seen[-1]
    assert Rhythm(10).count(25) == 3
    assert Rhythm(None, 20).count(5) == 5


def test_watch_makes_a_video_of_the_episode_that_was_evaluated(whole: Path, say: Say) -> None:
    said = say("watch", str(whole), "--json")
    assert said.code == 0, said.err
    made = json.loads(said.out)
    assert made["return"] == RunFolder(whole).evaluations()[-1]["returns"][0]
    assert 0 < made["bytes"] < 200_000
    page = RunFolder(whole).report.read_text()
    assert "data:video/mp4;base64," in page
    assert "media-src data:" in page
    assert say("watch", str(whole), "--kind", "gif", "--steps", "5").code == 0
    assert not (whole / "video.mp4").exists()
    assert "data:image/gif;base64," in RunFolder(whole).report.read_text()
    refused(say("watch", str(whole), "--steps", "0"), "steps=0")
    refused(say("watch", str(whole), "--checkpoint", "77"), "has no checkpoint of turn 77")


def test_watch_says_when_nothing_can_be_drawn(tmp_path: Path, say: Say) -> None:
    for fault, part in (("no picture", "cannot be drawn here: RuntimeError: there is no display"),):
        out = tmp_path / "a"
        train(ask(out, env=f"{COUNTER}(fault={fault!r})", steps=1), mode="silent")
        refused(say("watch", str(out)), part, "MUJOCO_GL=egl")


def test_compare_gives_robust_summaries_of_returns(tmp_path: Path, say: Say) -> None:
    words = ["compare", METHOD, METHOD.replace("passes=1", "passes=2"), "--env", "CartPole-v1", "--steps", "2"]
    words += ["--eval-problems", "2", "--seeds", "2", "--out", str(tmp_path / "c")]
    said = say(*words)
    assert said.code == 0, said.err
    assert "interquartile mean" in said.out
    made = json.loads((tmp_path / "c" / "comparison.json").read_text())
    base, arm = made["reliable"]
    assert base["n"] == arm["n"] == 2
    assert "improvement" not in base
    assert 0 <= arm["improvement"]["value"] <= 1
    assert "Robust summaries" in (tmp_path / "c" / "report.html").read_text()


def test_export_writes_every_network_and_what_acting_reads(whole: Path, tmp_path: Path) -> None:
    model = whole / "model"
    kept = load_file(model / "policy.safetensors")
    made = build(ask(whole))
    state = begin(made.method, made.environment, made.models, seed=0)
    load(state, checkpoints(whole / "checkpoints")[-1])
    assert all(torch.equal(kept[k], v) for k, v in made.models["policy"].state_dict().items())
    acting = load_file(model / "acting.safetensors")
    moments = state.pieces["/obs_moments"]
    assert torch.equal(acting["obs_moments/mean"], moments.mean)
    assert acting["obs_moments/count"].item() == moments.count
    assert json.loads((model / "model.json").read_text())["environment"] == "CartPole-v1"


# -- faults --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--env", "Pendulun-v1"], ["Did you mean 'Pendulum-v1'"]),
        (["--env", "reasoning-gym:chain_sum"], ["acts in Gymnasium environments", "for language methods"]),
        (["--env", COUNTER, "--policy", "nano"], ["the networks of an earlier run", "leave it out"]),
        (["--env", COUNTER, "--lora", "8"], ["--lora is an option of language methods"]),
        (["--env", COUNTER, "--eval-temperature", "1"], ["--eval-temperature is an option of language methods"]),
        (["--env", COUNTER, "--envs", "0"], ["envs=0 must be a whole number of at least 1"]),
        (["--env", "TrimtabTangled-v0"], ["Box, Discrete and MultiDiscrete"]),
    ],
)
def test_a_run_that_cannot_be_is_refused_before_a_folder_is_made(
    words: list[str], parts: list[str], tmp_path: Path, say: Say
) -> None:
    out = tmp_path / "a"
    refused(say("train", METHOD, *words, "--out", str(out)), *parts)
    assert not out.exists()


def test_options_and_environments_of_control_are_refused_by_language_methods(tmp_path: Path, say: Say) -> None:
    out = str(tmp_path / "a")
    refused(say("train", "grpo", "--env", "toy:sum", "--out", out), "add --policy")
    refused(
        say("train", "grpo", "--env", "toy:sum", "--policy", "nano", "--envs", "2", "--out", out), "--envs is an option"
    )
    refused(
        say("train", "grpo", "--env", "Pendulum-v1", "--policy", "nano", "--out", out), "Pendulum-v1", "control method"
    )


@pytest.mark.parametrize(
    ("fault", "part"),
    [
        ("nan observation", "gave a nan or infinite observation"),
        ("nan reward", "gave a nan or infinite reward"),
        ("raises", "raised RuntimeError: the arm fell off"),
        ("os error", "raised OSError: [Errno 5] the camera is gone"),
    ],
)
def test_a_fault_in_the_middle_of_a_run_is_a_sentence_with_the_place(
    fault: str, part: str, tmp_path: Path, say: Say
) -> None:
    out = tmp_path / "a"
    env = f"{COUNTER}(end=40, at=30, fault={fault!r}, max_episode_steps=40)"
    said = say("train", METHOD, "--env", env, "--eval-env", f"{COUNTER}(end=4)", "--out", str(out), "--steps", "9")
    refused(said, part, "episode 0", "step ", "seed ", "trimtab resume")
    assert RunFolder(out).report.exists()


def test_an_exception_that_is_not_ours_is_a_sentence_in_both_worlds(
    tmp_path: Path, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trimtab.environments.text import TextEnvironment

    def unplugged(*args: Any) -> Any:
        raise OSError(19, "no such device")

    monkeypatch.setattr(TextEnvironment, "draw", unplugged)
    refused(say.train(tmp_path / "a"), "OSError", "no such device", "trimtab resume")
    monkeypatch.setattr(GymEnvironment, "step", unplugged)
    said = say("train", METHOD, "--env", COUNTER, "--out", str(tmp_path / "b"))
    refused(said, "OSError", "no such device")


def test_a_method_that_needs_log_probabilities_refuses_a_policy_without_them(
    tmp_path: Path, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fixed(torch.nn.Module):
        provides = frozenset({"value"})

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

    monkeypatch.setattr(networks, "build_networks", lambda *given, **more: {"policy": Fixed()})
    said = say("train", METHOD, "--env", COUNTER, "--out", str(tmp_path / "a"))
    refused(said, "provides", "logp", "without likelihoods")


def test_worlds_are_those_of_the_registered_methods() -> None:
    assert world_of(METHOD) == "control"
    assert world_of("bapo+grpo") == "language"
    with pytest.raises(MethodError, match="there is no method"):
        world_of("grqo")


def test_a_language_method_over_a_control_base_acts(tmp_path: Path, say: Say) -> None:
    assert [world_of(e) for e in ("bapo+ppo", "d3s+bapo+ppo", "bapo", "props+ppo")] == [
        "control", "control", "language", "control",
    ]  # fmt: skip
    words = ["--env", "CartPole-v1", "--decisions", "64", "--set", "collect.horizon=32", "--set", "update.lr=1e-3"]
    said = say("train", "bapo+ppo", *words, "--rows", "16", "--passes", "1", "--out", str(tmp_path / "run"))
    assert said.code == 0, said.err
    assert "report:" in said.out
