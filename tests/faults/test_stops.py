"""Stopping: Ctrl-C once and twice, SIGTERM, a folder that is used or in use, a place that cannot be written."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.faults.common import Say, ask, outcome, refused
from trimtab.core.state import checkpoints
from trimtab.report.folder import RunFolder
from trimtab.report.lock import FolderLock
from trimtab.runs import experiment
from trimtab.runs.experiment import resume, train
from trimtab.runs.interrupt import interruptible

BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])


def signalled(monkeypatch: pytest.MonkeyPatch, turn: int, *numbers: int) -> None:
    """Signals arrive while `turn` is being recorded."""
    record = experiment._record_turn

    def interrupted(made: Any, folder: Any, view: Any, tally: Any, step: Any) -> None:
        record(made, folder, view, tally, step)
        if step.turn == turn:
            for number in numbers:
                os.kill(os.getpid(), number)

    monkeypatch.setattr(experiment, "_record_turn", interrupted)


@BOTH
def test_one_signal_finishes_the_turn_saves_and_says_how_to_go_on(
    number: int, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        signalled(patch, 3, number)
        said = say.train("a", "--steps", "6", "--save-every", "100")
    assert said.code == 0
    assert "stopped after turn 3; go on with: trimtab resume a" in said.out
    assert [c.name for c in checkpoints(RunFolder("a").checkpoints)] == ["turn-00000003"]
    assert RunFolder("a").report.exists()
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    assert say("resume", "a").code == 0
    assert say.train("whole", "--steps", "6", "--save-every", "100").code == 0
    assert outcome(Path("a")) == outcome(Path("whole"))


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
@BOTH
def test_a_second_signal_stops_at_once_and_loses_what_followed_the_last_checkpoint(
    number: int, second: int, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        signalled(patch, 5, number, second)
        said = say.train("a", "--steps", "6", "--save-every", "2")
    assert said.code == 130
    assert "what followed the last checkpoint is lost" in said.err
    assert checkpoints(RunFolder("a").checkpoints)[-1].name == "turn-00000004"
    assert say("resume", "a").code == 0
    assert say.train("whole", "--steps", "6", "--save-every", "2").code == 0
    assert outcome(Path("a")) == outcome(Path("whole"))


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    from threading import Thread

    seen: list[bool] = []

    def inside() -> None:
        with interruptible() as asked:
            seen.append(asked())

    before = signal.getsignal(signal.SIGTERM)
    thread = Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [False]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_used_folder_is_refused_with_the_way_on(say: Say) -> None:
    assert say.train("a").code == 0
    before = outcome(Path("a"))
    refused(say.train("a"), "a already holds a run (4 turns recorded)", "trimtab resume a", "choose another folder")
    assert outcome(Path("a")) == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a second process")
def test_two_runs_in_one_folder_at_once(say: Say) -> None:
    assert say.train("a").code == 0
    before = outcome(Path("a"))
    heard, tell = os.pipe()
    child = os.fork()
    if child == 0:
        FolderLock(Path("a")).acquire()
        os.write(tell, b"1")
        signal.pause()
    assert os.read(heard, 1) == b"1"
    try:
        for said in (say.train("a"), say("resume", "a", "--steps", "6")):
            refused(said, f"a is being written by process {child}", "wait for it, stop it, or choose another folder")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert outcome(Path("a")) == before
    assert say("resume", "a", "--steps", "6").code == 0, "the lock died with its process"


def test_a_run_while_another_of_this_process_writes_there(tmp_path: Path, say: Say) -> None:
    train(ask(tmp_path / "a", steps=2), mode="silent")
    with RunFolder("a").resume(None):
        refused(say("resume", "a", "--steps", "4"), "already being written by this process")
    assert resume("a", steps=4, mode="silent")["turns"] == 4


@pytest.mark.parametrize("place", ["file", "file/run", "/proc/nowhere/run"])
def test_a_place_that_cannot_hold_a_folder_is_refused(place: str, say: Say) -> None:
    Path("file").write_text("kept")
    refused(say.train(place), place, "choose another place" if place == "file" else "cannot be written")
    assert Path("file").read_text() == "kept"


def test_a_folder_without_permission_is_refused(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.getuid():
        Path("shut").mkdir(mode=0o500)
    else:  # root may write anywhere
        monkeypatch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "denied")))
    refused(say.train("shut/a"), "shut/a cannot be written (Permission denied)", "Allow this user to write there")
