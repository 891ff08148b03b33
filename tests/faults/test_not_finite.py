"""A loss or gradient that is not finite: the run stops before the update, saves, names the term, and can go on."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.faults.common import LETTERS, Say, refused
from trimtab.core.state import checkpoints
from trimtab.report.folder import RunFolder
from trimtab.runs.experiment import resume
from trimtab.stages import collect

torch.set_num_threads(1)


def spoiled(monkeypatch: pytest.MonkeyPatch, value: float) -> Callable[[], None]:
    """A reward that is `value` slips into every batch from the third on, until what is returned is called."""
    make, made = collect.policy_rows, [0]

    def rows(encoded: Any, said: Any, score: torch.Tensor, temperature: float) -> Any:
        made[0] += 1
        if made[0] > 2:
            score = torch.where(torch.arange(len(score)) == 5, value, score)
        return make(encoded, said, score, temperature)

    monkeypatch.setattr(collect, "policy_rows", rows)
    return lambda: monkeypatch.setattr(collect, "policy_rows", make)


def parameters(folder: str) -> dict[str, torch.Tensor]:
    saved = load_file(checkpoints(RunFolder(folder).checkpoints)[-1] / "tensors.safetensors")
    return {k: v for k, v in saved.items() if k.startswith("/models")}


@pytest.mark.parametrize(
    ("method", "value", "memory"),
    [("grpo", math.nan, None), ("grpo", math.inf, 5), ("rloo", math.inf, None), ("reinforce", -math.inf, 5)],
)
def test_the_state_before_the_update_is_saved_and_the_run_goes_on(
    method: str, value: float, memory: int | None, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("letters.py").write_text(LETTERS)
    cut = [] if memory is None else ["--memory", str(memory)]
    words = ["--reward", "letters:grade", "--eval-every", "100", "--save-every", "100", *cut]
    assert say.train("two", "--steps", "2", *words, method=method).code == 0
    healed = spoiled(monkeypatch, value)
    said = say.train("a", "--steps", "5", *words, method=method)
    refused(said, "term 'surrogate' in track 'policy' is not finite at update 2", "no parameter was changed",
            "a learning rate that is too large", "resuming goes on with the next batch", "--set update.lr=",
            "its newest checkpoint is turn-00000002", "trimtab resume a")  # fmt: skip
    assert RunFolder("a").report.exists()
    assert len(RunFolder("a").metrics()) == 2
    mine, before = parameters("a"), parameters("two")
    assert mine.keys() == before.keys()
    assert all(torch.equal(mine[k], before[k]) for k in mine), "the parameters are those before the update"

    refused(say("resume", "a"), "is not finite at update")  # nothing was put right: it stops again, at the same turn
    assert checkpoints(RunFolder("a").checkpoints)[-1].name == "turn-00000002"
    healed()
    assert resume("a", mode="silent")["finished"]
    assert [r["turn"] for r in RunFolder("a").metrics()] == [1, 2, 3, 4, 5]
    assert all(bool(torch.isfinite(v).all()) for v in parameters("a").values() if v.is_floating_point())
    assert any(not torch.equal(v, before[k]) for k, v in parameters("a").items())


def test_a_learning_rate_that_is_far_too_large_is_named(say: Say) -> None:
    Path("letters.py").write_text(LETTERS)
    said = say.train("a", "--set", "update.lr=1e30", "--reward", "letters:grade", "--steps", "6")
    refused(said, "is not finite at update", "too large", "--set update.lr=", "its newest checkpoint is turn-")
