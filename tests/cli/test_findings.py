"""What a run says of itself: in the terminal, on the page, in findings.json and in what --json prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trimtab.cli import main
from trimtab.report.folder import RunFolder
from trimtab.report.html import write_report

ENV = "toy:sum(limit=5)"
SMALL = ("collect.prompts=4", "collect.group=4", "collect.new_tokens=3")


def trained(capsys: pytest.CaptureFixture[str], out: Path, *more: str) -> tuple[str, str]:
    words = ["train", "grpo", "--policy", "nano", "--env", ENV, "--out", str(out), *[f"--set={s}" for s in SMALL]]
    assert main([*words, "--eval-problems", "4", *more]) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_a_run_whose_numbers_look_wrong_goes_on_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = trained(capsys, tmp_path / "a", "--steps", "6", "--set=update.lr=0.1")
    assert err == ""
    notes = [line for line in out.splitlines() if line.startswith("note: ")]
    folder = RunFolder(tmp_path / "a")
    made = folder.read_json("findings")
    assert [f["kind"] for f in made["findings"]] == ["dead", "truncated"], "a policy of random weights never ends"
    assert notes == [f"note: {f['sentence']}" for f in made["findings"]]
    assert "What to look at" in folder.report.read_text()
    assert all(f["sentence"].replace("'", "&#x27;") in folder.report.read_text() for f in made["findings"])
    assert {"dead_right", "dead_wrong", "silent_groups"} <= folder.metrics()[-1].keys()
    (tmp_path / "a" / "findings.json").unlink()
    folder.report.unlink()
    assert main(["report", str(tmp_path / "a")]) == 0
    said = capsys.readouterr().out
    assert all(f"- {f['sentence']}\n" in said for f in made["findings"])
    assert "no finding: numbers that are not finite; " in said
    assert folder.report.exists()
    assert main(["report", str(tmp_path / "a"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == made == folder.read_json("findings")


def test_json_of_a_run_holds_its_findings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = trained(capsys, tmp_path / "a", "--steps", "5", "--json")
    made = json.loads(out)
    assert made["findings"] == RunFolder(tmp_path / "a").read_json("findings")["findings"]
    assert {"kind", "turn", "sentence", "numbers"} == made["findings"][0].keys()


def test_a_folder_that_holds_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "nothing")]) == 1
    assert "there is no folder" in capsys.readouterr().err


def page(folder: Path, *records: dict[str, float]) -> str:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return write_report(folder).read_text()


def test_where_no_rule_fired_the_page_says_which_were_checked(tmp_path: Path) -> None:
    calm = [{"turn": t, "grad_norm": 1.0, "clip_low": 0.01, "clip_high": 0.01} for t in range(1, 8)]
    text = page(tmp_path / "calm", *calm)
    assert "No rule fired. Checked were: numbers that are not finite; peaks of the gradient norm; the clip rate" in text
    assert "dead groups;" not in text, "nothing of it was recorded"
    text = page(tmp_path / "clipped", *[{**r, "clip_high": 0.7} for r in calm])
    assert "71% of decisions" in text
    assert "Checked as well, without a finding: numbers that are not finite; peaks of the gradient norm." in text
    assert "What to look at" not in page(tmp_path / "empty")
