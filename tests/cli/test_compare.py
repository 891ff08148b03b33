"""`trimtab compare` as a user types it, and the pieces it is made of."""

from __future__ import annotations

import json
import math
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import trimtab.runs.experiment
import trimtab.runs.jobs
from trimtab.cli import main
from trimtab.core.errors import MethodError, TrimtabError
from trimtab.report.folder import RunFolder
from trimtab.report.paired import Run, compared, measured
from trimtab.runs.comparison import ComparisonError, compare, plan
from trimtab.runs.experiment import Request, command, resume, train

ENV = "toy:sum(limit=5)"
SMALL = ("collect.prompts=3", "collect.group=4", "collect.new_tokens=3", "update.lr=3e-3")
ARMS = ("grpo", "rloo")


def ask(out: Path, **more: Any) -> Request:
    usual = {"steps": 3, "set": SMALL, "eval_every": 1, "eval_problems": 4}
    return Request("", "nano", ENV, str(out), **{**usual, **more})


def say(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(list(words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def typed(out: Path, *arms: str, seeds: int = 2) -> list[str]:
    words = ["compare", *arms, "--policy", "nano", "--env", ENV, "--seeds", str(seeds), "--steps", "3"]
    return [*words, "--eval-every", "1", "--eval-problems", "4", "--out", str(out), *[f"--set={s}" for s in SMALL]]


def rows(folder: Path) -> list[dict[str, Any]]:
    """What a run recorded, without what differs from one time to the next."""
    return [{k: v for k, v in r.items() if k != "seconds"} for r in RunFolder(folder).metrics()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    compare(ask(out), ARMS, [0, 1], mode="silent")
    return out


# -- the budget of one run ---------------------------------------------------------------------------------------


def test_a_run_stops_after_the_turn_that_reaches_its_decisions(tmp_path: Path) -> None:
    request = replace(ask(tmp_path / "a", decisions=80), method="grpo")
    made = train(request, mode="silent")
    records = RunFolder(tmp_path / "a").metrics()
    assert made["finished"]
    assert records[-1]["decisions"] >= 80 > records[-2]["decisions"]
    assert RunFolder(tmp_path / "a").config()["until"] == {"decisions": 80}
    assert RunFolder(tmp_path / "a").evaluations()[-1]["decisions"] == records[-1]["decisions"]
    assert "--decisions 80" in command(request)
    assert "--steps" not in command(request)
    assert "--out" not in command(replace(request, out=""))
    more = resume(tmp_path / "a", mode="silent", decisions=150)
    assert RunFolder(tmp_path / "a").metrics()[-1]["decisions"] >= 150
    assert more["turns"] > made["turns"]


def test_schedules_follow_the_decisions(tmp_path: Path) -> None:
    train(replace(ask(tmp_path / "a", decisions=100), method="grpo", set=(*SMALL[:3], "update.lr=linear(0.1, 0)")),
          mode="silent")  # fmt: skip
    records = RunFolder(tmp_path / "a").metrics()
    expected = [0.1 * (1 - d / 100) for d in (0, *(r["decisions"] for r in records[:-1]))]
    assert [r["lr"] for r in records] == pytest.approx(expected)


def test_two_budgets_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = say(capsys, *typed(tmp_path, *ARMS), "--decisions", "50")
    assert code == 1
    assert "two budgets" in err
    with pytest.raises(MethodError, match="decisions=0 must be"):
        ask(tmp_path, decisions=0)


# -- the comparison ----------------------------------------------------------------------------------------------


def test_json_is_one_object_and_the_same_as_the_file(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = say(capsys, *typed(whole, *ARMS), "--json")
    made = json.loads(out)
    assert code == 0
    assert {k: v for k, v in made.items() if k != "report"} == json.loads((whole / "comparison.json").read_text())
    row_keys = {"arms", "metric", "values", "effect", "low", "high", "detectable", "seeds", "decisions", "seconds"}
    for row in made["rows"]:
        assert row_keys <= set(row)
        assert row["arms"] == ["grpo", "rloo"]
        assert row["seeds"] == [0, 1]
        assert len(row["values"]["rloo"]) == 2
    assert {r["metric"] for r in made["rows"]} == {"last_three", "final", "sampled", "area", "reward"}
    assert len(made["runs"]) == 4
    assert all(r["state"] == "finished" and r["command"].startswith("trimtab train") for r in made["runs"])
    assert made["differences"]["rloo"]
    assert {"torch", "trimtab"} <= set(made["versions"])
    assert made["machine"]
    assert Path(made["report"]).is_file()
    assert (whole / "held-out-light.svg").is_file()


def test_the_table_and_the_sentence(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = say(capsys, *typed(whole, *ARMS))
    assert code == 0
    assert "4 runs of 4 finished before" in out
    assert "2 of 2" in out
    assert "over 2 seeds" in out
    assert "2 seeds say little about chance" in out


def test_the_first_turn_is_the_same_under_both_arms(whole: Path) -> None:
    for seed in (0, 1):
        first = [[s for s in RunFolder(whole / arm / f"seed{seed}").samples() if s["turn"] == 1 and "group" in s]
                 for arm in ARMS]  # fmt: skip
        assert first[0]
        assert [(s["prompt"], s["response"]) for s in first[0]] == [(s["prompt"], s["response"]) for s in first[1]]
        before = [RunFolder(whole / arm / f"seed{seed}").evaluations()[0] for arm in ARMS]
        assert before[0]["sampled"] == before[1]["sampled"]
        assert before[0]["right"] == before[1]["right"]
    assert rows(whole / "grpo/seed0")[0]["reward"] is not None
    assert RunFolder(whole / "grpo/seed0").samples() != RunFolder(whole / "grpo/seed1").samples()


def test_every_arm_gets_the_decisions_of_the_first(whole: Path) -> None:
    for seed in (0, 1):
        first, other = (RunFolder(whole / arm / f"seed{seed}") for arm in ARMS)
        budget = first.metrics()[-1]["decisions"]
        assert len(first.metrics()) == 3
        assert other.config()["until"] == {"decisions": budget}
        done = [r["decisions"] for r in other.metrics()]
        assert done[-1] >= budget > done[-2]


def test_a_shared_budget_of_decisions(tmp_path: Path) -> None:
    made = compare(ask(tmp_path, decisions=60), ["grpo", "grpo(clip_high=0.3)"], [3], mode="silent")
    assert all(r["decisions"] >= 60 for r in made["runs"])
    assert made["budget"] == {"decisions": 60}
    assert made["rows"][0]["low"] is None
    assert "from one seed" in made["conclusions"][0]
    assert "--first-seed 3" in made["command"]
    assert "--decisions 60" in made["command"]


@pytest.mark.parametrize("how", ["asked to stop", "killed"])
def test_an_interrupted_comparison_goes_on(
    how: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = trimtab.runs.experiment._record_turn

    def interrupted(made: Any, folder: RunFolder, view: Any, tally: Any, step: Any) -> None:
        record(made, folder, view, tally, step)
        if folder.path.parent.name == "rloo" and step.turn == 2:
            if how == "killed":  # a second Ctrl-C: nothing is saved
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(trimtab.runs.experiment, "_record_turn", interrupted)
        code, out, err = say(capsys, *typed(tmp_path / "a", *ARMS))
    assert code == 130
    assert "go on with: trimtab compare grpo rloo" in err
    assert "3 runs of 4 are not finished" in out
    code, out, _ = say(capsys, *typed(tmp_path / "a", *ARMS))
    assert code == 0
    assert "1 run of 4 finished before" in out
    for run in ("grpo/seed0", "rloo/seed0", "grpo/seed1", "rloo/seed1"):
        assert rows(tmp_path / "a" / run) == rows(whole / run)


def test_a_failed_run_is_counted_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flaky(request: Request, **more: Any) -> dict[str, Any]:
        if (request.method, request.seed) in (("rloo", 0), ("grpo", 2)):
            raise TrimtabError("no verifier today")
        return train(request, **more)

    monkeypatch.setattr(trimtab.runs.jobs, "train", flaky)
    code, out, _ = say(capsys, *typed(tmp_path, *ARMS, seeds=3))
    assert code == 1
    assert "rloo, seed 0, failed: no verifier today" in out
    assert "rloo, seed 2, failed: it has no budget, because grpo, seed 2 failed" in " ".join(out.split())
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert [(a["seeds"], a["of"]) for a in found["arms"]] == [(2, 3), (1, 3)]
    assert found["rows"][0]["seeds"] == [1]
    assert "from one seed of 3" in found["conclusions"][0]
    assert found["finished"]


def test_several_at_once_make_the_same_runs(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    budget = rows(whole / "grpo/seed0")[-1]["decisions"]
    words = [w for w in typed(tmp_path, *ARMS, seeds=1) if w not in ("--steps", "3")]
    code, out, _ = say(capsys, *words, "--decisions", str(budget), "--jobs", "2")
    assert code == 0
    assert "run 2 of 2" in out
    for run in ("grpo/seed0", "rloo/seed0"):
        assert rows(tmp_path / run) == rows(whole / run)
    assert RunFolder(tmp_path / "rloo/seed0").config()["request"]["threads"] == 1


def test_a_failure_in_another_process_is_said_in_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken_reward.py").write_text("def grade(problem, text):\n    raise ValueError('no grader today')\n")
    monkeypatch.chdir(tmp_path)
    words = [*typed(tmp_path / "a", *ARMS, seeds=1), "--reward", "broken_reward:grade", "--jobs", "2"]
    code, out, _ = say(capsys, *words)
    assert code == 1
    assert "no grader today" in out
    assert "rloo cannot be compared with grpo: no seed finished under both (grpo failed at 1 seed, rloo" in out
    assert "Traceback" not in out


def test_another_run_in_the_folder_is_refused(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(whole, tmp_path / "a")
    code, _, err = say(capsys, *typed(tmp_path / "a", *ARMS), "--rows", "6")
    assert code == 1
    assert "rows is None there and 6 here" in err
    config = tmp_path / "a/grpo/seed1/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "fingerprint": "another"}))
    with pytest.raises(ComparisonError, match="redefined"):
        plan(ask(tmp_path / "a"), ARMS, [0, 1])


@pytest.mark.parametrize(
    ("arms", "seeds", "sentence"),
    [
        (["grpo"], [0], "compare takes 2 to 6"),
        (["grpo", "rloo", "reinforce", *(f"grpo(clip_high={x})" for x in (0.3, 0.4, 0.5, 0.6))], [0], "7 methods"),
        (["grpo", "grop"], [0], "arm 'grop'.*Did you mean 'grpo'"),
        (["grpo", "grpo()"], [0], "the same method"),
        (["grpo", "rloo"], [1, 1], "each once"),
        (["grpo", "rloo"], [], "at least one"),
    ],
)
def test_what_cannot_be_compared(arms: list[str], seeds: list[int], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ComparisonError, match=sentence):
        plan(ask(tmp_path), arms, seeds)


def test_an_option_that_one_arm_lacks_names_the_arm(tmp_path: Path) -> None:
    with pytest.raises(ComparisonError, match=r"arm 'reinforce'.*bound"):
        plan(ask(tmp_path, set=("surrogate.bound.high=0.3",)), ["grpo", "reinforce"], [0])


# -- the analysis, by hand ---------------------------------------------------------------------------------------


def evaluation(turn: int, mean: float) -> dict[str, Any]:
    return {"turn": turn, "decisions": 10 * turn, "mean": mean, "sampled": mean / 2}


def test_what_is_measured_of_a_run() -> None:
    metrics = [{"turn": t, "updates": 2 * t, "decisions": 10 * t, "seconds": t / 2, "reward": t / 20}
               for t in range(1, 21)]  # fmt: skip
    evaluations = [evaluation(0, 0.0), evaluation(10, 0.5), evaluation(15, 0.75), evaluation(20, 1.0)]
    run = measured("a", 7, metrics, evaluations)
    assert run.values == pytest.approx(
        {"last_three": 0.75, "final": 1.0, "sampled": 0.375, "area": 0.5, "reward": 0.975}
    )
    assert (run.turns, run.updates, run.decisions, run.seconds, run.seed) == (20, 40, 200, 10.0, 7)
    few = measured("a", 0, [], [evaluation(0, 0.2)])
    assert few.values == {}


def of(arm: str, *finals: float | None) -> list[Run]:
    return [
        Run(arm, s, state="failed", reason="it broke") if v is None else Run(arm, s, {"last_three": v}, decisions=10)
        for s, v in enumerate(finals)
    ]


def test_the_difference_is_paired_by_seed() -> None:
    # Apart by seed, and yet b is above a by 0.04, 0.02, 0.03 at every one: t(2, .975) = 4.3027, s = 0.01.
    made = compared(["a", "b"], [0, 1, 2], of("a", 0.1, 0.5, 0.9) + of("b", 0.14, 0.52, 0.93))
    (row,) = made["rows"]
    half = 4.302653 * 0.01 / math.sqrt(3)
    assert row["effect"] == pytest.approx(0.03)
    assert (row["low"], row["high"]) == pytest.approx((0.03 - half, 0.03 + half), rel=1e-5)
    assert row["detectable"] == pytest.approx((4.302653 + 1.060660) * 0.01 / math.sqrt(3), rel=1e-5)
    assert made["conclusions"] == ["b is better than a on this task: +3.0 points [0.5, 5.5] over 3 seeds."]
    assert made["arms"][0]["metrics"]["last_three"]["low"] == 0.0
    assert made["arms"][1]["decisions"] == 30


def test_what_may_be_concluded() -> None:
    def sentence(a: list[float | None], b: list[float | None]) -> str:
        seeds = list(range(len(a)))
        (said,) = compared(["a", "b"], seeds, of("a", *a) + of("b", *b))["conclusions"]
        return str(said)

    assert sentence([0.9, 0.8, 0.7], [0.5, 0.41, 0.3]).startswith("b is worse than a on this task: -39.7 points [")
    no = sentence([0.5, 0.5, 0.5], [0.6, 0.4, 0.53])
    assert no.startswith("No difference between b and a could be shown on this task: +1.0 points [")
    assert "over 3 seeds; one of less than" in no
    assert "over 2 seeds of 3" in sentence([0.5, None, 0.5], [0.6, 0.5, 0.4])
    assert "exactly equal at every seed, over 2 seeds" in sentence([0.5, 1.0], [0.5, 1.0])
    assert "by the same +10.0 points at every seed" in sentence([0.5, 0.6], [0.6, 0.7])
    assert sentence([None], [0.5]) == ("b cannot be compared with a: no seed finished under both (a failed at 1 seed).")


def test_rewards_that_are_no_shares_are_numbers() -> None:
    made = compared(["a", "b"], [0, 1], of("a", 3.0, 4.0) + of("b", 5.0, 5.5))
    assert made["rows"][0]["share"] is False
    assert "+1.75 [" in made["conclusions"][0]


def test_notes_say_what_weakens_a_comparison() -> None:
    runs = of("a", 0.5, 0.5) + of("b", 0.6, None) + of("c", 0.4)
    made = compared(["a", "b", "c"], [0, 1], runs)
    assert any("not corrected for several comparisons" in n for n in made["notes"])
    assert any("2 seeds say little" in n for n in made["notes"])
    assert "b, seed 1, failed: it broke" in made["notes"]
    assert "1 run of 6 is not finished." in made["notes"]
    assert made["arms"][2]["unfinished"] == [1]
