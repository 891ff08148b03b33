"""`trimtab compare` on several environments, as a user types it."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest

from tests.control.worlds import register
from tests.faults.common import Say, refused
from trimtab.report.across import across
from trimtab.report.across_page import write_across
from trimtab.report.folder import RunFolder
from trimtab.report.reliable import improvement
from trimtab.runs.across import suite
from trimtab.runs.request import Request

register()
COUNTER = "TrimtabCounter-v0(end=7)"
ENVS = ("CartPole-v1", COUNTER)
BASE = "ppo(horizon=8, rows=None, passes=1, hidden=(8,), lr=1e-3)"
ARM = BASE.replace("passes=1", "passes=2")


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    return Say(capsys)


def typed(out: Path, *words: str, envs: tuple[str, ...] = ENVS) -> list[str]:
    usual = ["--steps", "2", "--seeds", "2", "--eval-problems", "2", "--threads", "1", "--out", str(out)]
    return ["compare", BASE, ARM, "--env", *envs, *usual, *words]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from trimtab.cli import main

    out = tmp_path_factory.mktemp("across") / "whole"
    assert main([*typed(out), "--json", "--reference", f"{COUNTER}=0,7"]) == 0
    return out


def test_every_task_is_a_comparison_and_all_are_put_together(whole: Path) -> None:
    made = json.loads((whole / "comparison.json").read_text())
    assert list(made["tasks"]) == list(ENVS)
    scores = {}
    for task, one in made["tasks"].items():
        folder = Path(one["report"]).parent
        assert folder.parent == whole
        assert json.loads((folder / "comparison.json").read_text())["conclusions"] == one["conclusions"]
        assert one["task"]["environment"] == task
        assert all(RunFolder(r["run"]).config()["environment"]["name"] == task for r in one["runs"])
        assert len(one["reliable"]) == 2
        scores[task] = {arm: [r["values"]["last_three"] for r in one["runs"] if r["arm"] == arm] for arm in (BASE, ARM)}
        assert all(r["start"] == RunFolder(r["run"]).evaluations()[0]["mean"] for r in one["runs"])
    by_seed = {arm: list(zip(*(scores[task][arm] for task in ENVS))) for arm in (BASE, ARM)}
    row = made["aggregate"][1]
    assert row["improvement"]["value"] == improvement(by_seed[ARM], by_seed[BASE])
    assert made["normalised"][1] == {"task": COUNTER, "low": 0.0, "high": 7.0, "by": "given"}
    assert made["normalised"][0]["by"] == f"{BASE}, before and after training"
    assert len(made["conclusions"]) == 1
    assert "on these tasks" in made["conclusions"][0]


def test_the_page_has_a_panel_a_task_the_aggregate_and_every_raw_table(whole: Path, tmp_path: Path) -> None:
    page = (whole / "report.html").read_text()
    assert page.count("<svg") == 2  # a panel each; two turns gave no scale, so there is nothing to draw over all
    for part in ("Over all tasks", "Task by task", "Raw scores", "interquartile mean, normalised", "before and after"):
        assert part in page
    for env in ENVS:
        assert f"<h3>{env} (<a href=" in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    assert (whole / "CartPole-v1" / "report.html").is_file()
    made = json.loads((whole / "comparison.json").read_text())
    scaled = across(BASE, [BASE, ARM], made["tasks"], dict.fromkeys(ENVS, (0.0, 100.0)))
    page = write_across(tmp_path, {**made, **scaled}).read_text()
    assert page.count("<svg") == 3
    assert page.count("<circle") == 2


def test_the_same_command_again_finds_everything_and_prints_raw_and_aggregate(whole: Path, say: Say) -> None:
    command = json.loads((whole / "comparison.json").read_text())["command"]
    words = shlex.split(command)[1:]
    assert words[words.index("--env") + 1 :][:2] == list(ENVS)
    assert words[-2:] == ["--reference", f"{COUNTER}=0,7"]
    said = say(*words)
    assert said.code == 0, said.err
    assert "8 runs of 8 finished before" in said.out
    for title in ("CartPole-v1: arms", f"{COUNTER}: robust summaries", "normalised scores", "over all tasks"):
        assert title in said.out
    alone = json.loads((whole / "CartPole-v1" / "comparison.json").read_text())["command"]
    said = say(*shlex.split(alone)[1:])  # one of them by itself is an ordinary comparison
    assert "4 runs of 4 finished before" in said.out


def test_a_run_that_fails_is_named_with_its_task_and_the_others_go_on(whole: Path, tmp_path: Path, say: Say) -> None:
    broken = "TrimtabCounter-v0(end=40, at=9, fault='raises')"
    out = tmp_path / "c"
    shutil.copytree(whole / "CartPole-v1", out / "CartPole-v1")
    said = say(*typed(out, "--seeds", "1", envs=("CartPole-v1", broken)))
    assert said.code == 1
    assert f"{BASE} on {broken}, seed 0 failed" in said.out.replace("\n", " ")
    made = json.loads((out / "comparison.json").read_text())
    assert [a["seeds"] for a in made["tasks"]["CartPole-v1"]["arms"]] == [1, 1]
    assert made["aggregate"] == []
    assert any("the arm fell off" in note for note in made["notes"])
    assert any("No run of" in note and "no scale" in note for note in made["notes"])


@pytest.mark.parametrize(
    ("words", "envs", "parts"),
    [
        ((), ("CartPole-v1", "CartPole-v1"), ["at least two, each once"]),
        ((), (), ["no environment was given"]),
        (("--reference", "CartPole-v1=0,9"), ("CartPole-v1",), ["there is one here"]),
        (("--reference", "Cartpole-v1=0,9"), ENVS, ["is not compared on", "Did you mean 'CartPole-v1'"]),
        (("--reference", "CartPole-v1=9,9"), ENVS, ["LOW below HIGH"]),
        (("--reference", "CartPole-v1=9"), ENVS, ["not of the form TASK=LOW,HIGH"]),
        (("--reference", "CartPole-v1=nan,inf"), ENVS, ["not of the form"]),
        (("--eval-env", "CartPole-v1"), ENVS, ["--eval-env is one environment"]),
        (("--jobs", "0"), ENVS, ["jobs=0"]),
    ],
)
def test_what_cannot_be_compared_is_refused(
    words: tuple[str, ...], envs: tuple[str, ...], parts: list[str], tmp_path: Path, say: Say
) -> None:
    refused(say(*typed(tmp_path / "c", *words, envs=envs)), *parts)
    assert not (tmp_path / "c").exists()


def test_no_method_is_said_to_be_missing(say: Say) -> None:
    refused(say("compare", "--env", "CartPole-v1", "ppo"), "no method was given")


def test_first_seeds_of_all_tasks_come_first(tmp_path: Path) -> None:
    made = suite(Request("", "", "", str(tmp_path / "c")), ENVS, (BASE, ARM), (0, 1))
    names = [job.name for job in made.jobs()]
    assert len(set(made.jobs())) == len(names) == 8
    assert all(name.endswith("seed 0") for name in names[:4])
    assert names[2] == f"{BASE} on {COUNTER}, seed 0"
