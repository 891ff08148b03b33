"""The note about checkpoints that will not fit."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from trimtab.core.disk import size_words
from trimtab.core.loop import begin, run
from trimtab.core.registry import parse
from trimtab.core.state import State, checkpoints, save
from trimtab.methods.cases import case
from trimtab.runs import forecast


class Usage(NamedTuple):
    """As `shutil.disk_usage` answers."""

    total: int
    used: int
    free: int


def begun() -> State:
    made = case("text")
    return begin(made.shrink(parse("grpo(kl=0.1)")), made.environment, made.models)


def written(folder: Path) -> int:
    return (checkpoints(folder)[-1] / "tensors.safetensors").stat().st_size


def test_the_estimate_is_the_size_of_a_checkpoint(tmp_path: Path) -> None:
    """Before the first step, when the optimiser holds nothing yet, and after it; the reference copy counts too."""
    made = case("text")
    method = made.shrink(parse("grpo(kl=0.1)"))
    state = begin(method, made.environment, made.models)
    before = forecast.checkpoint_bytes(state)
    step = next(run(method, made.environment, made.models, until=1, state=state))
    save(step.state, tmp_path)
    for estimate in (before, forecast.checkpoint_bytes(state)):
        assert estimate == pytest.approx(written(tmp_path), rel=0.05)


def test_a_note_when_they_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = begun()
    each = forecast.checkpoint_bytes(state)

    def free(bytes_left: float) -> None:
        monkeypatch.setattr(forecast.shutil, "disk_usage", lambda _: Usage(0, 0, int(bytes_left)))

    free(3 * each)
    assert forecast.disk_notes(state, tmp_path, keep=2) == []
    (note,) = forecast.disk_notes(state, tmp_path, keep=3)
    assert "keep=3" in note
    assert f"below {tmp_path}" in note
    save(state, tmp_path)
    assert forecast.disk_notes(state, tmp_path, keep=3) == [], "one of them is on the disk already"
    free(each / 2)
    assert forecast.disk_notes(state, tmp_path, keep=1)


@pytest.mark.parametrize(("count", "said"), [(999, "999 bytes"), (1.6e9, "1.6 GB"), (2.5e6, "2.5 MB")])
def test_sizes_in_words(count: float, said: str) -> None:
    assert size_words(count) == said
