"""The command line as a user types it, on the smallest policy and environment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimtab.cli import main
from trimtab.core.errors import MethodError
from trimtab.core.schedules import linear, warmup
from trimtab.environments.text import load_environment
from trimtab.report.folder import RunFolder
from trimtab.runs.commands import command
from trimtab.runs.experiment import config, resume, train
from trimtab.runs.literals import literal
from trimtab.runs.request import Request, configured
from trimtab.runs.worlds import build

ENV = "toy:sum(limit=5)"
SMALL = ("collect.prompts=3", "collect.group=4", "collect.new_tokens=3", "update.lr=3e-3")


def ask(out: Path, **more: Any) -> Request:
    usual = {"steps": 4, "set": SMALL, "eval_every": 2, "save_every": 2}
    return Request("grpo", "nano", ENV, str(out), **{**usual, **more})


def say(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(list(words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_train_json_is_one_stable_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"--set={s}" for s in SMALL]
    words += ["--steps", "3", "--seed", "1", "--out", str(tmp_path / "a"), "--json"]
    code, out, _ = say(capsys, "train", "grpo", "--policy", "nano", "--env", ENV, *words)
    assert code == 0
    made = json.loads(out)
    assert set(made) >= {"run", "seconds", "eval"}
    for when in ("before", "after"):
        assert set(made["eval"][when]) == {"mean", "low", "high", "n"}
    folder = RunFolder(tmp_path / "a")
    assert len(folder.metrics()) == 3
    assert folder.report.exists()
    assert folder.config()["resolved"]["update.lr"] == "0.003"


def test_the_exported_model_loads_with_transformers(tmp_path: Path) -> None:
    train(ask(tmp_path / "a"), mode="silent")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a" / "model")
    assert model.config.vocab_size == len(tokenizer)


def test_a_used_folder_is_refused_with_the_way_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(ask(tmp_path / "a"), mode="silent")
    code, _, err = say(capsys, "train", "grpo", "--policy", "nano", "--env", ENV, "--out", str(tmp_path / "a"))
    assert code == 1
    assert "trimtab resume" in err


def test_resume_reaches_the_same_bits(tmp_path: Path) -> None:
    train(ask(tmp_path / "whole", steps=6), mode="silent")
    child = (
        "import sys, trimtab.runs.experiment as e\n"
        "record = e._record_turn\n"
        "def killed(made, folder, view, tally, step):\n"
        "    record(made, folder, view, tally, step)\n"
        "    if step.turn == 5: import os; os._exit(9)\n"  # as a kill would: after the checkpoint of turn 4
        "e._record_turn = killed\n"
        f"e.train(e.Request('grpo', 'nano', {ENV!r}, {str(tmp_path / 'half')!r}, steps=6, set={SMALL!r}, eval_every=2,"
        " save_every=2), mode='silent')\n"
    )
    done = subprocess.run([sys.executable, "-c", child], check=False, capture_output=True)
    assert done.returncode == 9, done.stderr.decode()[-500:]
    resume(tmp_path / "half", mode="silent")
    a, b = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "half")
    drop = ("seconds",)
    rows = [[{k: v for k, v in r.items() if k not in drop} for r in f.metrics()] for f in (a, b)]
    assert rows[0] == rows[1]
    names = [sorted(p.name for p in (f.path / "checkpoints").iterdir()) for f in (a, b)]
    assert names[0] == names[1]
    final = "turn-00000006/tensors.safetensors"
    assert (a.path / "checkpoints" / final).read_bytes() == (b.path / "checkpoints" / final).read_bytes()


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    words = [f"--set={s}" for s in SMALL]
    out = tmp_path / "a"
    process = subprocess.Popen(
        [sys.executable, "-m", "trimtab.cli", "train", "grpo", "--policy", "nano", "--env", ENV, "--steps", "100000",
         "--eval-every", "100000", "--out", str(out), *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(RunFolder(out).metrics() if out.exists() else []) < 3:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-500:]
    assert "trimtab resume" in said
    turns = len(RunFolder(out).metrics())
    made = resume(out, mode="silent", steps=turns + 2)
    assert made["turns"] == turns + 2
    assert made["finished"]


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path: Path) -> None:
    train(ask(tmp_path / "whole", steps=2), mode="silent")
    folder = RunFolder(tmp_path / "half")
    made = build(ask(tmp_path / "half", steps=2, threads=1))
    folder.create(config(made)).write_metrics({"turn": 1, "reward": 0.0, "seconds": 1.0})
    folder.close()
    resume(tmp_path / "half", mode="silent")
    rows = [[{k: v for k, v in r.items() if k != "seconds"} for r in RunFolder(tmp_path / n).metrics()]
            for n in ("whole", "half")]  # fmt: skip
    assert rows[0] == rows[1]


def test_eval_reads_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = train(ask(tmp_path / "a"), mode="silent")
    code, out, _ = say(capsys, "eval", str(tmp_path / "a"), "--json")
    assert code == 0
    assert json.loads(out)["eval"] == made["eval"]


PASS = ("--samples", "4", "--k", "1,4", "--temperature", "1")


def test_eval_with_pass_at_k(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(ask(tmp_path / "a"), mode="silent")
    code, out, _ = say(capsys, "eval", str(tmp_path / "a"), *PASS, "--json")
    assert code == 0
    for when in json.loads(out)["eval"].values():
        assert set(when["pass_at"]) == {"1", "4"}
        assert when["pass_at"]["1"]["mean"] == pytest.approx(when["mean"])
        assert when["pass_at"]["1"]["mean"] <= when["pass_at"]["4"]["mean"]
    code, out, _ = say(capsys, "eval", str(tmp_path / "a"), *PASS)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines() if line.startswith("pass@")] == ["pass@1", "pass@4"]


def test_train_evaluates_as_asked_and_resumes_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = "toy:sum(limit=9)"
    asked = {"eval_env": other, "eval_samples": 3, "eval_k": "1,3", "eval_temperature": 0.7, "eval_problems": 4}
    made = train(ask(tmp_path / "a", **asked), mode="silent")
    folder = RunFolder(tmp_path / "a")
    records = folder.evaluations()
    assert [r["turn"] for r in records] == [0, 2, 4]
    for record in records:
        assert (record["samples"], record["temperature"], record["n"]) == (3, 0.7, 4)
        assert set(record["pass_at"]) == {"1", "3"}
        assert record["measure"] == "accuracy at temperature 0.7"
    held = {p.question for p in load_environment(other).held_out(4)}
    assert {s["prompt"] for s in folder.samples() if s.get("split") == "eval"} == held
    for words in ("--eval-env", "--eval-samples 3", "--eval-k 1,3", "--eval-temperature 0.7"):
        assert words in folder.config()["command"]
    again = resume(tmp_path / "a", mode="silent", steps=6)
    assert again["eval"]["before"] == made["eval"]["before"]
    assert set(again["eval"]["after"]["pass_at"]) == {"1", "3"}
    report = folder.report.read_text()
    assert "accuracy at temperature 0.7" in report.lower()
    assert "Chance that one of k answers is right: pass@1" in report
    _, out, _ = say(capsys, "eval", str(tmp_path / "a"), "--json")
    assert json.loads(out)["eval"] == again["eval"], "what is left out is as in training"


def test_evaluations_leave_no_trace_in_a_checkpoint(tmp_path: Path) -> None:
    train(ask(tmp_path / "a"), mode="silent")
    train(ask(tmp_path / "b", eval_every=100, eval_problems=3, eval_samples=2, eval_temperature=1.0), mode="silent")
    files = [RunFolder(tmp_path / n).checkpoints / "turn-00000004" for n in "ab"]
    for name in ("tensors.safetensors", "state.json"):
        assert (files[0] / name).read_bytes() == (files[1] / name).read_bytes()


def test_a_disk_that_is_too_small_is_said_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.runs.forecast.shutil.disk_usage", lambda _: type("Usage", (), {"free": 10_000}))
    train(ask(tmp_path / "a", steps=1), mode="plain")
    out = capsys.readouterr().out
    assert "note: A checkpoint takes about" in out
    assert out.index("note: A checkpoint") < out.index("turn 1/1")


def test_methods_json_has_the_promised_fields(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = say(capsys, "methods", "--json")
    rows = json.loads(out)
    assert code == 0
    assert {"reinforce", "rloo", "grpo", "sft"} <= {r["name"] for r in rows}
    for row in rows:
        assert {"name", "world", "base", "title", "arxiv", "stages", "claim"} <= set(row)
    by = {r["name"]: r for r in rows}
    assert by["rloo"]["stages"] == ["credit"]
    assert by["grpo"]["base"] == "reinforce"


LOOKING = [["methods"], ["diff", "reinforce", "grpo"], ["explain", "grpo(kl=0.04)"], ["doctor"]]


@pytest.mark.parametrize("words", LOOKING)
def test_commands_that_look_at_things(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = say(capsys, *words)
    assert code in (0, 1 if words == ["doctor"] else 0)
    assert len(out.splitlines()) > 5


def test_diff_names_exactly_what_a_method_changes(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = say(capsys, "diff", "reinforce", "rloo", "--json")
    assert [(r["address"], r["a"], r["b"]) for r in json.loads(out)] == [("credit", "group_mean", "leave_one_out")]


def test_explain_numbers_the_pipeline_in_running_order(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = say(capsys, "explain", "grpo(kl=0.04)", "--set", "update.lr=1e-6", "--json")
    rows = json.loads(out)
    numbered = [r["place"].split()[1] for r in rows if r["place"]]
    assert numbered == ["collect", "annotate", "annotate", "credit", "loss", "loss", "update"]
    origin = {r["address"]: r["origin"] for r in rows}
    assert origin["update.lr"] == "asked for"
    assert origin["kl.coef"] == "asked for"
    assert origin["credit.scale"] == "grpo (swap)"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train", "grop", "--policy", "nano", "--env", ENV], "Did you mean 'grpo'?"),
        (["train", "grpo(clip=1)", "--policy", "nano", "--env", ENV], "clip_low"),
        (["train", "grpo", "--policy", "nano", "--env", ENV, "--set", "update.learning=1"], "lr"),
        (["train", "grpo", "--policy", "nano", "--env", ENV, "--set", "update.lr"], "piece.option=value"),
        (["train", "grpo", "--policy", "smolm2", "--env", ENV], "smollm2"),
        (["train", "grpo", "--policy", "nano", "--env", "reasoning-gym:chain_sums"], "chain_sum"),
        (["train", "rloo+grpo", "--policy", "nano", "--env", ENV], "both swap 'credit'"),
        (["train", "grpo", "--policy", "nano", "--env", ENV, "--keep", "0"], "keep=0 must be a whole number"),
        (
            ["train", "grpo", "--policy", "nano", "--env", ENV, "--eval-every", "0"],
            "eval_every=0 must be",
        ),
        (["train", "grpo", "--policy", "nano", "--env", ENV, "--save-every", "0"], "save_every=0 must be"),
        (["train", "grpo", "--policy", "nano", "--env", ENV, "--eval-k", "4"], "pass@4 needs at least 4 answers"),
        (["train", "grpo", "--policy", "nano", "--env", ENV, "--eval-samples", "4"], "all be the same"),
        (["train", "grpo", "--policy", "nano", "--env", ENV, "--eval-temperature", "-1"], "must be 0, which is greedy"),
        (["train", "grpo", "--policy", "nano", "--env", ENV, "--eval-k", "one"], "such as 1,4,8"),
        (["train", "grpo", "--policy", "nano", "--env", ENV, "--eval-env", "toys:sum"], "Did you mean 'toy'"),
        (["train", "grpo", "--policy", "nano", "--env", ENV, "--set", "update.lr=warmpu(3, 1)"], "'warmup'"),
        (["train", "grpo", "--policy", "nano", "--env", ENV, "--set", "update.lr=warmup(-3, 1)"], "updates=-3"),
        (["resume", "nowhere"], "config.json"),
        (["eval", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_answered_with_a_sentence(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, err = say(capsys, *words)
    assert code == 1
    assert sentence in err
    assert "Traceback" not in err
    assert not list(tmp_path.rglob("config.json")), "nothing was started"


def test_the_recorded_command_repeats_the_request() -> None:
    request = Request("d3s+bapo", "smollm2", "a.jsonl", "runs/x", steps=7, set=("update.lr=1e-5",), lora=8, chat=False)
    words = command(request)
    assert "--steps 7" in words
    assert "--set update.lr=1e-5" in words
    assert "--chat False" in words
    assert "--seed" not in words


def test_batch_words_reach_the_method() -> None:
    method = configured(Request("grpo", "", "", "", rows=16, passes=2, set=("update.lr=linear(1e-5, 0)",)))
    assert (method.rows, method.passes) == (16, 2)
    assert method.get("update.lr") == linear(1e-5, 0)
    assert literal("group") == "group"
    assert literal("None") is None
    nested = configured(Request("grpo", "", "", "", set=("update.lr=warmup(10, linear(1e-5, 0))",)))
    assert nested.get("update.lr") == warmup(10, linear(1e-5, 0))
    with pytest.raises(MethodError, match="schedule"):
        literal("linear(1)")


def test_a_run_that_cannot_go_on_leaves_a_report_and_says_how(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_reward.py").write_text("def grade(problem, text):\n    raise ValueError('no grader today')\n")
    monkeypatch.chdir(tmp_path)
    words = ["--steps", "3", "--out", "a", "--reward", "broken_reward:grade", *[f"--set={s}" for s in SMALL]]
    code, _, err = say(capsys, "train", "grpo", "--policy", "nano", "--env", ENV, *words)
    assert code == 1
    assert "no grader today" in err
    assert "trimtab resume a" in err
    assert RunFolder("a").report.exists()
