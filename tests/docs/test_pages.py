"""The pages of the methods: made from the definitions, committed, and never stale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trimtab.catalogue import pages
from trimtab.catalogue.evidence import EvidenceError, evidence
from trimtab.catalogue.options import described, options
from trimtab.core.registry import find, methods, parse

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "docs" / "methods"


def test_the_committed_pages_are_what_the_generator_makes() -> None:
    made = pages.pages(ROOT / "docs" / "results" / "claims")
    there = {p.name: p.read_text(encoding="utf-8") for p in COMMITTED.glob("*.md")}
    stale = sorted(name for name in made.keys() | there.keys() if made.get(name) != there.get(name))
    assert not stale, f"docs/methods is not what the definitions say now; run `make docs` and commit: {stale}"


def test_options_name_the_piece_that_reads_them() -> None:
    where = {o.name: o.read_by for o in options(find("grpo"))}
    assert where["clip_high"] == ("surrogate.bound.high",)
    assert where["kl"] == ("kl.coef",), "it is 0 by default, and then no piece reads it"
    assert where["per"] == ("surrogate.per", "kl.per")
    assert where["rows"] == ("rows",)
    assert {o.name: o.read_by for o in options(find("rloo"))}["leave_out"] == ("credit",)
    for name in ("reinforce", "rloo", "grpo", "sft"):
        assert all(o.read_by for o in options(find(name)))


def test_docstrings_say_what_options_are() -> None:
    doc = "The loss.\n\nper: how it\nis reduced (row: a mean). Prose. lr, clip: the step.\nMore; b: not an option.\n"
    assert described(doc, ["per", "lr", "clip"]) == {
        "per": "how it is reduced (row: a mean)", "lr": "the step", "clip": "the step",
    }  # fmt: skip
    assert described(doc, []) == {}


def test_a_page_has_every_part() -> None:
    text = pages.page(find("grpo"), Path("nowhere"))
    for part in (
        "https://arxiv.org/abs/2402.03300",
        "| `credit` | `group_mean` | `group_normalised` |",
        "| `paper` | `kl=0.04`, `per='row'` | `surrogate.per: token -> row`, ",
        "`grpo(scale='none')` is `reinforce` to rounding",
        "trimtab train grpo",
        'trimtab.parse("grpo")',
        "2 annotate at batch",
        "No claim recorded yet.",
    ):
        assert part in text, part
    parse('grpo(preset="paper")')  # as the page says


RECORD: dict[str, Any] = {
    "method": "grpo", "claim": "a|b", "metric": "held-out", "arms": {"grpo": [0.5, 0.7], "reinforce": 0.4,
    "x": {"mean": 1}},
    "effect": 0.2, "low": 0.1, "high": 0.3, "detectable": 0.15, "verdict": "holds", "seeds": 2, "seconds": 61.5,
}  # fmt: skip


def test_evidence_is_shown_with_its_interval(tmp_path: Path) -> None:
    (tmp_path / "grpo.json").write_text(json.dumps([RECORD, {"verdict": "does not hold", "seeds": [0, 1, 2]}]))
    text = pages.page(find("grpo"), tmp_path)
    assert (
        "| a\\|b | held-out | grpo 0.6, reinforce 0.4, x 1 | 0.2 [0.1, 0.3] | 0.15 | 2 | 61.5 | holds |" in text
    )  # the means over seeds
    assert "|  |  |  |  |  | 3 |  | does not hold |" in text
    (tmp_path / "sft.json").write_text(json.dumps({**RECORD, "part": "b", "scope": "full", "effect_is": "x - y"}))
    (row,) = evidence(tmp_path / "sft.json")
    assert (row.claim, row.effect) == ("(b, full) a|b", "0.2 [0.1, 0.3] (x - y)")
    assert "holds, does not hold" in pages.index([find("grpo")], tmp_path)
    assert "none recorded" in pages.index([find("rloo")], tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", '"x"'])
def test_a_record_that_cannot_be_read_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "grpo.json").write_text(text)
    with pytest.raises(EvidenceError, match=r"grpo\.json"):
        evidence(tmp_path / "grpo.json")


def test_writing_changes_only_what_differs_and_removes_what_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "methods"
    assert "grpo.md" in pages.write(folder)
    assert pages.write(folder) == []
    (folder / "old.md").write_text(pages.MARK)
    (folder / "mine.md").write_text("written by hand")
    (folder / "rloo.md").write_text("damaged")
    assert pages.write(folder) == ["old.md", "rloo.md"]
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        ["README.md", "edits.md", "mine.md", *(f"{n}.md" for n in methods())]
    )


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pages.main([str(tmp_path / "methods")]) == 0
    assert "wrote grpo.md" in capsys.readouterr().out
    assert pages.main([]) == 2
    (tmp_path / "results" / "claims").mkdir(parents=True)
    (tmp_path / "results" / "claims" / "sft.json").write_text("{")
    assert pages.main([str(tmp_path / "methods")]) == 1
    assert "sft.json" in capsys.readouterr().err
