"""Plans: the linear model on made-up timings, and the whole thing on the smallest policy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab.core.batch import Batch
from trimtab.core.method import Method
from trimtab.core.registry import parse
from trimtab.runs import plan as planning
from trimtab.runs.experiment import Request
from trimtab.runs.linear import cost, prices
from trimtab.runs.plan import Turn, peak, plan, predicted, read_by, scaled

ENV = "toy:sum(limit=5)"
SMALL = ("collect.prompts=8", "collect.group=4", "collect.new_tokens=3")


def test_prices_are_found_again() -> None:
    true = {"steps": 0.02, "decisions": 0.001}
    seen = [({"steps": s, "decisions": d}, cost({"steps": s, "decisions": d}, true)) for s, d in ((8, 40), (8, 90))]
    assert prices(seen) == pytest.approx(true)


def test_a_price_is_never_negative() -> None:
    falling = [({"one": 1.0, "rows": 1.0}, 3.0), ({"one": 1.0, "rows": 2.0}, 2.0), ({"one": 1.0, "rows": 3.0}, 1.0)]
    found = prices(falling)
    assert found["rows"] == 0
    assert 1 < found["one"] < 3


def test_prices_of_nothing_are_nothing() -> None:
    assert prices([({"a": 1.0}, 0.0)]) == {"a": 0.0}
    # What did not vary cannot be told apart: the total is still met.
    same = [({"a": 1.0, "b": 2.0}, 4.0)] * 2
    assert cost(same[0][0], prices(same)) == pytest.approx(4.0)


def made_up(method: Method, problems: int, memory: int | None = None) -> Turn:
    """A turn whose seconds follow a law: 8 rows a problem, of 5 tokens and a prompt of 10."""
    rows, passes = 8.0 * problems, 1.0
    sizes = {
        "problems": float(problems), "rows": rows, "decisions": rows * 5, "response": rows * 5, "prompt": 10.0,
        "width": 5.0, "updates": 1.0, "batches": 1.0,
    }  # fmt: skip
    passes = rows / memory if memory else 1.0
    read = passes * read_by(rows / passes, sizes, False)
    decode = {"steps": 5.0, "decisions": rows * 5}
    learn = {"passes": passes, "read": read}
    spent = {
        ("collect", "sample", "decode"): (decode, 0.1 * 5 + 0.002 * rows * 5),
        ("update", "forward"): (learn, 0.05 * passes + 0.001 * read),
        ("update", "backward"): (learn, 0.1 * passes + 0.002 * read),
        ("update", "optimizer"): ({"updates": 1.0}, 0.3),
    }
    peaks = {"collect": int(1e9 + 1e6 * rows), "update": int(1e9 + 5e6 * min(rows, memory or rows))}
    return Turn(sizes, spent, 1.0, peaks)


@pytest.mark.parametrize("memory", [None, 16])
def test_a_batch_eight_times_as_large_is_predicted(memory: int | None) -> None:
    method = parse("grpo").set("collect.group", 8)
    turns = [made_up(method, n, memory) for n in (2, 3, 4)]
    true = made_up(method, 32, memory)
    sizes = scaled(turns, 32, method)
    assert sizes == pytest.approx({k: v for k, v in true.sizes.items() if k != "response"})
    found = predicted(turns, sizes, method, memory)
    assert found == pytest.approx({path: seconds for path, (_, seconds) in true.spent.items()})
    assert peak(turns, sizes, method, memory) == pytest.approx(true.peaks, rel=1e-3)


def test_rows_that_are_shuffled_share_fewer_prompts() -> None:
    sizes = {"problems": 32.0, "rows": 256.0, "width": 4.0, "prompt": 10.0}
    in_order, shuffled = read_by(16, sizes, False), read_by(16, sizes, True)
    assert in_order == 16 * 4 + 2 * 10
    # 32 prompts, each met with chance 1 - (1 - 1/16)^8.
    assert shuffled == pytest.approx(16 * 4 + 10 * 32 * (1 - (15 / 16) ** 8))
    assert read_by(256, sizes, True) == 256 * 4 + 32 * 10


def test_rows_that_fit_are_suggested(monkeypatch: pytest.MonkeyPatch) -> None:
    method = parse("grpo").set("collect.group", 8)
    turns = [made_up(method, n) for n in (2, 3, 4)]
    sizes = scaled(turns, 32, method)
    monkeypatch.setattr(planning, "memory_used", lambda: int(1e9))
    monkeypatch.setattr(planning, "memory_free", lambda: int(1e9))
    assert planning._room(turns, sizes, method, None, 1.9e9) == []
    (note,) = planning._room(turns, sizes, method, None, 2.4e9)
    assert "--memory 140" in note  # (0.85 x 2 GB - 1 GB) / 5 MB
    (note,) = planning._room(turns, sizes, method, 64, 2.4e9)
    assert "Fewer rows in memory at once do not help" in note
    (said,) = planning._room([replace(t, read=0.0) for t in turns], sizes, method, None, 1.0)
    assert "taught anything" in said


@pytest.mark.parametrize(
    ("expression", "more"), [("grpo", {}), ("grpo(kl=0.04,rows=8,passes=2)", {"memory": 3}), ("sft", {"set": ()})]
)
def test_a_plan_of_the_smallest_policy(expression: str, more: dict[str, Any]) -> None:
    asked = {"steps": 11, "set": SMALL, "eval_every": 5, "save_every": 4, "eval_problems": 3, "threads": 1, **more}
    found = plan(Request(expression, "nano", ENV, "", **asked))
    assert found["turns"] == 11
    assert found["seconds_a_turn"] == pytest.approx(sum(found["phases"].values()))
    assert found["seconds"]["total"] == pytest.approx(
        found["seconds"]["training"] + found["seconds"]["evaluation"] + found["seconds"]["checkpoints"]
    )
    assert found["seconds"]["training"] == pytest.approx(11 * found["seconds_a_turn"])
    assert found["calibration"]["turns"][-1]["problems"] == found["sizes"]["problems"]
    assert found["peak_bytes"] > 5e7
    assert "4 evaluations and 3 checkpoints" in found["assumed"][-1]
    assert ("annotate/evaluate" in found["phases"]) == ("kl" in expression)


@pytest.mark.parametrize(("expression", "asked"), [("grpo", True), ("bapo", False)])
def test_a_plan_knows_what_the_policy_reads_at_once(expression: str, asked: bool, tmp_path: Path) -> None:
    """Where the rows of a turn are read in parts; bapo has read all of them already, for its bounds."""
    request = Request(expression, "nano", ENV, str(tmp_path), set=SMALL)
    made = planning.build(request)
    turn = planning.calibrated(made)[1][-1]
    batch = Batch({"mask": torch.ones(1, 3), "prompt_mask": torch.ones(1, 5)})
    most = made.models["policy"].rows_at_once(batch)  # type: ignore[operator]
    assert (turn.at_once is not None) == asked
    assert not asked or turn.at_once >= most, "responses of 3 tokens at most"  # type: ignore[operator]
