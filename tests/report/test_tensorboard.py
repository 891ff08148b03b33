"""The TensorBoard sink: every number once, also after a kill; and it never ends a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trimtab.report import tensorboard as sink
from trimtab.report.folder import RunFolder
from trimtab.report.keys import CLOCK, flat
from trimtab.report.tensorboard import TensorBoard, TensorBoardError, needs_tensorboard, scalars
from trimtab.report.watchers import Watchers
from trimtab.runs import experiment
from trimtab.runs.experiment import Request, command, resume, train

SMALL = ("collect.prompts=3", "collect.group=4", "collect.new_tokens=3", "update.lr=3e-3")


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def ask(out: Path, **more: Any) -> Request:
    usual: dict[str, Any] = {"steps": 4, "set": SMALL, "eval_every": 2, "save_every": 2, "tensorboard": True}
    return Request("grpo", "nano", "toy:sum(limit=5)", str(out), **{**usual, **more})


def test_every_number_of_the_record_is_there(tmp_path: Path) -> None:
    train(ask(tmp_path), mode="silent")
    folder = RunFolder(tmp_path)
    seen = read(folder.tensorboard)
    for record in folder.metrics():
        for name, value in flat(record).items():
            assert (record["turn"], pytest.approx(value, rel=1e-6)) in seen[name], name
        for name in CLOCK & set(record) - {"turn"}:
            assert (record["turn"], pytest.approx(record[name], rel=1e-6)) in seen[f"clock/{name}"]
    means = [(r["turn"], pytest.approx(r["mean"])) for r in folder.evaluations()]
    assert seen["held_out/mean"] == means
    assert [step for step, _ in means] == [0, 2, 4]


def test_a_killed_and_resumed_run_holds_each_turn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = experiment._record_turn

    def killed(made: Any, folder: Any, view: Any, tally: Any, step: Any) -> None:
        record(made, folder, view, tally, step)
        if step.turn == 3:  # after the checkpoint of turn 2
            raise MemoryError

    monkeypatch.setattr(experiment, "_record_turn", killed)
    with pytest.raises(MemoryError):
        train(ask(tmp_path), mode="silent")
    assert [step for step, _ in read(tmp_path / "tensorboard")["reward"]] == [1, 2, 3]
    monkeypatch.setattr(experiment, "_record_turn", record)
    resume(tmp_path, mode="silent")
    seen = read(tmp_path / "tensorboard")
    assert [step for step, _ in seen["reward"]] == [1, 2, 3, 4]
    assert [step for step, _ in seen["held_out/mean"]] == [0, 2, 4]
    assert [value for _, value in seen["entropy"]] == pytest.approx(
        [r["entropy"] for r in RunFolder(tmp_path).metrics()]
    )


class Full:
    """A writer on a full disk."""

    def add_scalar(self, *_: Any) -> None:
        raise OSError(28, "No space left on device")


def test_a_failing_writer_is_one_note_and_the_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    board = TensorBoard(tmp_path)
    with Watchers(board) as view:
        board._writer = Full()
        for turn in range(1, 4):
            view.update({"reward": 1.0}, {"turns": turn})
        view.evaluated(0.5)
        view.note("unheard")
    said = capsys.readouterr().err
    assert said.count("stopped (OSError: [Errno 28] No space left on device)") == 1
    assert "Training goes on" in said


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    with Watchers(TensorBoard(tmp_path / "file" / "below")) as view:
        view.update({"reward": 1.0}, {"turns": 1})
    assert capsys.readouterr().err.count("Writing event files to") == 1


def test_without_the_package_nothing_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sink.util, "find_spec", lambda name: None)
    with pytest.raises(TensorBoardError, match=r"pip install 'trimtab\[tensorboard\]'"):
        needs_tensorboard()
    with pytest.raises(TensorBoardError):
        train(ask(tmp_path / "a"), mode="silent")
    assert not (tmp_path / "a").exists()


def test_numbers_only_and_those_not_finite_too() -> None:
    given = {"a": 1, "b": {"c": math.inf}, "d": "text", "e": None, "f": True, "g": [1.0]}
    assert scalars(given, "x/") == {"x/a": 1.0, "x/b/c": math.inf}


def test_the_recorded_command_repeats_the_wish() -> None:
    assert command(ask(Path("a"))).endswith("--tensorboard")
    assert "tensorboard" not in command(ask(Path("a"), tensorboard=False))
