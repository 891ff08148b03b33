"""A control run that begins with the networks of an earlier one: what is taken, what is refused, exact resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.control.worlds import register
from tests.faults.common import Say, refused
from trimtab.core.errors import MethodError
from trimtab.core.registry import find
from trimtab.core.state import checkpoints
from trimtab.environments.gym import GymEnvironment
from trimtab.policies.networks import build_networks
from trimtab.policies.start import read_start, started
from trimtab.report.folder import RunFolder
from trimtab.runs.experiment import evaluate_folder, resume, train
from trimtab.runs.request import Request, configured

register()
COUNTER = "TrimtabCounter-v0"
PPO = "ppo(horizon=8, rows=None, passes=1, hidden=(8,), lr=1e-3)"
SAC = "sac(hidden=(8,), warmup=8, batch=4, capacity=50)"


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    return Say(capsys)


def ask(method: str, out: Path, **more: Any) -> Request:
    usual = {"policy": "", "env": COUNTER, "steps": 3, "eval_problems": 2, "save_every": 1, "threads": 1, **more}
    return Request(method, usual.pop("policy"), usual.pop("env"), str(out), **usual)


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("earlier")
    for name, method, steps in (("ppo", PPO, 3), ("sac", SAC, 20)):
        train(ask(method, home / name, steps=steps), mode="silent")
    return {"ppo": home / "ppo", "sac": home / "sac"}


def tensors(run: Path, turn: int = -1) -> dict[str, torch.Tensor]:
    return load_file(checkpoints(run / "checkpoints")[turn] / "tensors.safetensors")


# -- what is taken -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "method"), [("ppo", PPO), ("sac", SAC)])
def test_networks_and_moments_are_those_of_the_earlier_run(
    name: str, method: str, earlier: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "b"
    train(ask(method, run, policy=str(earlier[name]), steps=1, seed=7, set=()), mode="silent")
    last, first = (RunFolder(r).evaluations()[i] for r, i in ((earlier[name], -1), (run, 0)))
    assert last["returns"] == first["returns"]
    assert last["drawn"] == first["drawn"]  # parameters, moments and spread: the policy is the same one
    config = RunFolder(run).config()
    start = read_start(earlier[name])
    assert config["policy"]["start"]["digest"] == start.digest
    assert all(v == start.digest for k, v in config["resolved"].items() if k.endswith(".start"))
    taken = {"ppo": ["policy"], "sac": ["policy", "critic", "temperature"]}[name]
    assert [k for k in config["resolved"] if k.endswith(".start")] == [f"network {n}.start" for n in taken]
    assert bool(start.moments()) == (name == "ppo")
    assert "began with" in RunFolder(run).report.read_text()
    assert f"--policy {earlier[name]}" in config["command"]


def test_moments_go_on_from_what_the_earlier_run_saw(earlier: dict[str, Path], tmp_path: Path) -> None:
    train(ask(PPO, tmp_path / "b", policy=str(earlier["ppo"]), steps=1), mode="silent")
    seen = [load_file(run / "model" / "acting.safetensors")["obs_moments/count"].item()
            for run in (earlier["ppo"], tmp_path / "b")]  # fmt: skip
    assert seen == [25, 34]  # a run sees one observation more than it decides


def test_targets_and_behavior_policies_begin_as_what_they_follow(earlier: dict[str, Path], tmp_path: Path) -> None:
    made = configured(ask(SAC, tmp_path, policy=str(earlier["sac"])))
    environment = GymEnvironment(COUNTER)
    start = read_start(earlier["sac"])
    models = build_networks(made, environment, 0, start=start)
    from trimtab.core.loop import begin

    state = begin(made, environment, models)
    for n, p in state.copies["critic_target"].module.named_parameters():
        assert torch.equal(p, start.networks["critic"][n])


def test_what_the_earlier_run_has_not_begins_anew_and_is_said(earlier: dict[str, Path], tmp_path: Path) -> None:
    over = "props(batches=1, blocks=1)+" + PPO
    train(ask(over, tmp_path / "b", policy=str(earlier["ppo"]), steps=1), mode="silent")
    said = RunFolder(tmp_path / "b").config()["policy"]["start"]["said"]
    assert said.startswith(f"policy begins as in {earlier['ppo']} ({PPO} on {COUNTER}, turn 3)")
    assert said.endswith("with its moments of observations; behavior begins anew.")
    train(ask(PPO, tmp_path / "c", policy=str(tmp_path / "b"), steps=1), mode="silent")
    assert "; behavior of it is left out." in RunFolder(tmp_path / "c").config()["policy"]["start"]["said"]


def test_it_is_part_of_the_fingerprint(earlier: dict[str, Path], tmp_path: Path) -> None:
    plain, warm = (configured(ask(SAC, tmp_path, policy=p)) for p in ("", str(earlier["sac"])))
    assert plain.fingerprint() != warm.fingerprint()
    other = shutil.copytree(earlier["sac"] / "model", tmp_path / "other")
    assert configured(ask(SAC, tmp_path, policy=str(other))).fingerprint() == warm.fingerprint()  # moved, the same
    numbers = load_file(other / "policy.safetensors")
    save_file({k: t + 1 for k, t in numbers.items()}, other / "policy.safetensors")
    assert configured(ask(SAC, tmp_path, policy=str(other))).fingerprint() != warm.fingerprint()


def test_explain_and_the_command_line_say_it(earlier: dict[str, Path], tmp_path: Path, say: Say) -> None:
    said = say("explain", SAC, "--policy", str(earlier["sac"]))
    assert said.code == 0, said.err
    assert "network policy.start" in said.out
    assert "note: policy, critic and temperature begin as in" in said.out.replace("\n", " ")
    words = ["--env", COUNTER, "--policy", str(earlier["sac"]), "--steps", "2", "--eval-problems", "1"]
    said = say("train", SAC, *words, "--out", str(tmp_path / "b"))
    assert said.code == 0, said.err
    assert "begin as in" in said.out.replace("\n", " ")
    refused(say("explain", "grpo", "--policy", "nano"), "the same method whatever policy it trains")


# -- resume --------------------------------------------------------------------------------------------------------


def test_a_resumed_run_reaches_the_same_bits_though_the_earlier_one_is_gone(
    earlier: dict[str, Path], tmp_path: Path
) -> None:
    first = shutil.copytree(earlier["ppo"], tmp_path / "first")
    train(ask(PPO, tmp_path / "whole", policy=str(first), steps=4), mode="silent")
    train(ask(PPO, tmp_path / "half", policy=str(first), steps=2), mode="silent")
    before = evaluate_folder(tmp_path / "half")["eval"]["before"]
    killed = shutil.copytree(tmp_path / "half", tmp_path / "killed")
    shutil.rmtree(first)
    assert resume(tmp_path / "half", mode="silent", steps=4)["finished"]
    for checkpoint in checkpoints(killed / "checkpoints"):  # killed before its first checkpoint: all is made again
        shutil.rmtree(checkpoint)
    assert resume(killed, mode="silent", steps=4)["finished"]
    whole = tensors(tmp_path / "whole")
    for run in (tmp_path / "half", killed):
        mine = tensors(run)
        assert mine.keys() == whole.keys()
        assert all(torch.equal(mine[k], whole[k]) for k in mine)
        assert evaluate_folder(run)["eval"]["before"] == before


# -- faults --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "run", "env", "parts"),
    [
        ("ppo(hidden=(9,), horizon=8)", "ppo", COUNTER, ["'policy'", "hidden is (8,) there and (9,) here"]),
        (SAC, "ppo", COUNTER, ["kind is 'actor_critic' there and 'squashed_gaussian' here", "without --policy"]),
        (SAC.replace("warmup", "critics=3, warmup"), "sac", COUNTER, ["'critic'", "critics is 2 there and 3 here"]),
        (
            PPO.replace("lr", "normalise_obs=False, lr"),
            "ppo",
            COUNTER,
            ["normalised, at most 10 from 0"],
        ),
        (PPO, "ppo", "CartPole-v1", ["are made for the observation space", "Box(-10.0, 10.0, (2,)", "CartPole-v1"]),
        (SAC, "sac", "MountainCarContinuous-v0", ["the observation space", "where spaces are the same"]),
        (PPO, "ppo", "TrimtabChoice-v0", ["the action space Box(-1.0, 1.0, (1,), float32)", "Discrete(3, start=2)"]),
    ],
)
def test_what_does_not_fit_is_refused_before_a_folder_is_made(
    method: str, run: str, env: str, parts: list[str], earlier: dict[str, Path], tmp_path: Path, say: Say
) -> None:
    out = tmp_path / "b"
    refused(say("train", method, "--env", env, "--policy", str(earlier[run]), "--out", str(out)), *parts)
    assert not out.exists()


def test_a_folder_without_such_a_model_is_refused(earlier: dict[str, Path], tmp_path: Path) -> None:
    def reads(path: Path | str, match: str) -> None:
        with pytest.raises(MethodError, match=match):
            read_start(path)

    reads("nano", "--policy nano: a control method begins with the networks of an earlier run")
    reads(tmp_path, "holds no model of a control run")
    half = shutil.copytree(earlier["ppo"], tmp_path / "half")
    shutil.rmtree(half / "model")
    reads(half, "has no model yet; finish it with: trimtab resume")
    cut = shutil.copytree(earlier["ppo"], tmp_path / "cut")
    (cut / "model" / "policy.safetensors").write_bytes(b"short")
    reads(cut, "is damaged")
    (cut / "model" / "model.json").write_text('{"networks": []}')
    reads(cut, "written by an earlier version")
    odd = shutil.copytree(earlier["ppo"], tmp_path / "odd")
    save_file({"actor.log_std": torch.zeros(2)}, odd / "model" / "policy.safetensors")
    start, method = read_start(odd), configured(ask(PPO, tmp_path))
    with pytest.raises(MethodError, match=r"log_std is \[2\] there and \[1\] here; .* is absent there and"):
        build_networks(started(method, start), GymEnvironment(COUNTER), 0, start=start)
    about = json.loads((odd / "model" / "model.json").read_text())
    (odd / "model" / "model.json").write_text(json.dumps({**about, "networks": {}}))
    with pytest.raises(MethodError, match="has no network called 'policy'"):
        started(method, read_start(odd))


def test_a_network_that_is_given_another_start_than_the_one_named_is_refused(earlier: dict[str, Path]) -> None:
    start, environment = read_start(earlier["ppo"]), GymEnvironment(COUNTER)
    plain = find("ppo")(hidden=(8,))
    with pytest.raises(MethodError, match=r"is to begin with .* and is given nothing"):
        build_networks(started(plain, start), environment, 0)
    with pytest.raises(MethodError, match="is to begin anew, and is given"):
        build_networks(plain, environment, 0, start=start)


def test_a_comparison_notices_that_its_start_has_changed(earlier: dict[str, Path], tmp_path: Path, say: Say) -> None:
    first = shutil.copytree(earlier["ppo"], tmp_path / "first")
    words = ["compare", PPO, PPO.replace("passes=1", "passes=2"), "--env", COUNTER, "--policy", str(first)]
    words += ["--steps", "1", "--seeds", "1", "--eval-problems", "1", "--out", str(tmp_path / "c")]
    assert say(*words).code == 0
    assert say(*words).code == 0  # nothing is left to do
    numbers = load_file(first / "model" / "policy.safetensors")
    save_file({k: t + 1 for k, t in numbers.items()}, first / "model" / "policy.safetensors")
    refused(say(*words), "holds another run", "the policy that it begins with has changed")
