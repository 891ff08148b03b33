"""`trimtab compare` over composed methods, as a user types it; and demonstrations that only one arm needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trimtab.cli import main
from trimtab.report.folder import RunFolder

ARMS = ("grpo", "bapo", "d3s+bapo", "chord+d3s+bapo")
SMALL = ["--policy", "nano", "--seeds", "1", "--steps", "2", "--eval-problems", "2", "--set", "collect.prompts=3",
         "--set", "collect.group=4", "--set", "collect.new_tokens=3", "--json"]  # fmt: skip


def compared(capsys: pytest.CaptureFixture[str], out: Path, *words: str) -> tuple[int, dict[str, Any]]:
    code = main(["compare", *words, *SMALL, "--out", str(out)])
    return code, json.loads(capsys.readouterr().out)


def test_four_methods_each_on_the_one_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, made = compared(capsys, tmp_path, *ARMS, "--env", "toy:larger(limit=9)", "--rows", "6")
    assert code == 0
    assert [arm["arm"] for arm in made["arms"]] == list(ARMS)
    assert [run["state"] for run in made["runs"]] == ["finished"] * 4
    changed = {arm: {row["address"].partition(".")[0] for row in made["differences"][arm]} for arm in ARMS[1:]}
    assert changed["bapo"] == {"surrogate"}
    assert {"down_sample", "entropy_old"} < changed["d3s+bapo"]
    assert {"with_experts(collect)", "scaled(surrogate)", "imitation", "down_sample"} < changed["chord+d3s+bapo"]
    first, *others = (RunFolder(tmp_path / arm / "seed0").metrics() for arm in ARMS)
    for records in others:
        assert records[-1]["decisions"] >= first[-1]["decisions"] > records[-2]["decisions"], "one budget for all"
    assert {"bound_high", "kept_rows", "expert_nll", "mu"} <= set(others[-1][0]), "all three act"


def test_demonstrations_are_given_to_the_arm_that_needs_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    asked = [f"say {n}" for n in range(20)]
    Path("open_ended.jsonl").write_text("".join(json.dumps({"prompt": q}) + "\n" for q in asked))
    Path("shown.jsonl").write_text("".join(json.dumps({"prompt": q, "response": q[-1]}) + "\n" for q in asked))
    Path("brief.py").write_text("def brief(problem, text):\n    return 1.0 / (1 + len(text))\n")
    shown = "chord(experts='shown.jsonl')+bapo"
    words = ("--env", "open_ended.jsonl", "--reward", "brief:brief")
    code, made = compared(capsys, tmp_path / "out", "grpo", "chord+bapo", shown, *words)
    states = {run["arm"]: (run["state"], run["reason"]) for run in made["runs"]}
    assert states["grpo"][0] == states[shown][0] == "finished"
    assert states["chord+bapo"][0] == "failed"
    assert "have no reference answers to demonstrate" in states["chord+bapo"][1]
    assert "chord(experts='FILE.jsonl')" in states["chord+bapo"][1]
    assert code == 1, "an arm without a result"
