"""trimtab profile and trimtab plan, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from trimtab.cli import main
from trimtab.core.stopwatch import Span
from trimtab.report.profile_page import flame
from trimtab.runs.meters import Products
from trimtab.runs.profile import phases

WORDS = ["--policy", "nano", "--env", "toy:sum(limit=5)", "--set=collect.prompts=2", "--set=collect.group=3"]
WORDS += ["--set=collect.new_tokens=3", "--threads", "1"]


def test_profile_prints_phases_and_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "grpo(kl=0.04)", *WORDS, "--turns", "2", "--out", str(tmp_path / "p")]) == 0
    out = capsys.readouterr().out
    for word in ("prefill", "decode", "reward", "forward", "backward", "optimizer", "GFLOP/s in a large float32"):
        assert word in out
    found = json.loads((tmp_path / "p" / "profile.json").read_text())
    lines = {"/".join(line["path"]): line for line in found["phases"]}
    turn = lines["turn"]
    assert turn["share"] == 1
    assert sum(v["seconds"] for k, v in lines.items() if k.count("/") == 1) == pytest.approx(turn["seconds"])
    assert lines["turn/update/backward"]["flops"] > lines["turn/update/forward"]["flops"] > 0
    assert lines["turn/collect/sample/decode"]["tokens"] > 0
    assert turn["peak_bytes"] == found["peak_bytes"] > 5e7
    assert isinstance(found["busy"], bool)
    page = (tmp_path / "p" / "profile.html").read_text()
    assert page.count("<rect") == len(lines)
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")


def test_profile_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "rloo", *WORDS, "--turns", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["method"] == "rloo"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [(["--turns", "0"], "turns=0 must be at least 1"), (["--steps", "3"], "steps=3 leave no room")],
)
def test_a_profile_that_cannot_be_made(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "grpo", *WORDS, *words]) == 1
    assert sentence in capsys.readouterr().err


def test_plan_says_what_it_assumed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "grpo", *WORDS, "--steps", "7"]) == 0
    out = capsys.readouterr().out
    for word in ("training, 7 turns", "peak memory", "a checkpoint", "Assumed:", "tokens on average"):
        assert word in out
    assert main(["plan", "grpo", *WORDS, "--decisions", "100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["turns"] >= 100 / 18


def test_a_plan_without_an_end_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--policy", "nano", "--env", "toy:sum(limit=5)", "--threads", "1"]
    assert main(["plan", "sft", *words, "--set=collect.prompts=2", "--decisions", "10"]) == 1
    assert "makes no decisions" in capsys.readouterr().err


def test_products_are_counted() -> None:
    a, b = torch.ones(3, 5, requires_grad=True), torch.ones(5, 7)
    with Products() as counter:
        (a @ b).sum().backward()
    assert counter.flops == 2 * (2 * 3 * 5 * 7)  # the product, and the gradient of one side
    assert counter.bytes == 4 * 2 * (15 + 35 + 21)
    q = torch.ones(2, 3, 4, 8)
    with Products() as counter:
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert counter.flops == 2 * (2 * 2 * 3 * 4 * 4 * 8)


def test_lines_are_averages_and_bars_lie_inside_their_parents() -> None:
    forward = Span(4, {"seconds": 2.0}, {"decisions": 40.0})
    update = Span(2, {"seconds": 6.0}, parts={"forward": forward, "backward": Span(4, {"seconds": 3.0})})
    turn = Span(2, {"seconds": 10.0}, parts={"collect": Span(2, {"seconds": 3.0}), "update": update})
    counted = Span(1, {"flops": 8e9}, parts={"update": Span(1, {"flops": 8e9})})
    lines = phases(turn, counted, 2, 0.5, {})
    by = {"/".join(line["path"]): line for line in lines}
    assert [line["path"][-1] for line in lines] == [
        "turn", "collect", "update", "forward", "backward", "optimizer", "other",
    ]  # fmt: skip
    assert by["turn"]["seconds"] == 5
    assert by["turn/update/backward"]["tokens_per_second"] == pytest.approx(20 / 1.5)
    assert by["turn/update/optimizer"]["seconds"] == pytest.approx(0.5)
    assert by["turn/update"]["gflops"] == pytest.approx(4 / 3)
    assert flame(lines).count("<rect") == 7
