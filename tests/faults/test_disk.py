"""A full disk: the sentence names path and space, the last complete checkpoint stays, nothing half-written is left."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from tests.faults.common import Say, ask, outcome, refused
from trimtab.core import state as module
from trimtab.core.disk import writing
from trimtab.core.errors import DiskError
from trimtab.core.state import checkpoints
from trimtab.report import records
from trimtab.report.folder import RunFolder
from trimtab.runs import experiment, salvage
from trimtab.runs.experiment import resume, train


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def full_for_tensors(*_: Any, **__: Any) -> Any:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def leftovers(folder: Path) -> list[str]:
    return [str(p.relative_to(folder)) for p in folder.rglob("*") if ".writing" in p.name or p.name.endswith(".tmp")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("whole")
    train(ask(folder / "a"), mode="silent")
    return outcome(folder / "a")


PLACES = ["tensors", "text", "sync", "folder", "rename"]


@pytest.mark.parametrize("place", PLACES)
def test_a_disk_that_is_full_during_a_checkpoint(
    place: str, say: Say, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        save = module.save
        faults: dict[str, tuple[Any, str, Any]] = {
            "tensors": (module, "save_file", full_for_tensors),
            "text": (Path, "write_text", full),
            "sync": (module, "_sync", full),
            "folder": (Path, "mkdir", full),
            "rename": (Path, "rename", full),
        }

        def failing(*args: Any, **more: Any) -> Path:
            owner, name, fault = faults[place]
            with monkeypatch.context() as inner:
                if len(checkpoints(Path("a/checkpoints"))) == 2:
                    inner.setattr(owner, name, fault)
                return save(*args, **more)

        patch.setattr(experiment, "save", failing)
        said = say.train("a", "--steps", "6", "--save-every", "2", "--eval-every", "2")
    refused(said, "a/checkpoints/turn-00000006 cannot be written (No space left on device)", "it needs about",
            "is free on that disk", "its newest checkpoint is turn-00000004", "trimtab resume a")  # fmt: skip
    assert [c.name for c in checkpoints(Path("a/checkpoints"))] == ["turn-00000002", "turn-00000004"]
    assert leftovers(Path("a")) == []
    assert RunFolder("a").report.exists()
    assert say("resume", "a").code == 0
    assert outcome(Path("a")) == whole


@pytest.mark.parametrize("short", [False, True], ids=["nothing written", "half a line written"])
def test_a_disk_that_is_full_during_a_record(
    short: bool, say: Say, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        append = records.Appender.append

        class Full:
            """A file on a disk with room for ten more bytes."""

            def __init__(self, file: Any) -> None:
                self.file, self.room = file, 10 if short else 0

            def write(self, data: bytes) -> int:
                if not self.room:
                    full()
                self.room = 0
                return int(self.file.write(data[:10]))

        def failing(self: Any, record: Any) -> None:
            real = self._file
            if self.path.name == "metrics.jsonl" and record["turn"] == 5:
                self._file = Full(real)
            try:
                append(self, record)
            finally:
                self._file = real

        patch.setattr(records.Appender, "append", failing)
        said = say.train("a", "--steps", "6", "--save-every", "2", "--eval-every", "2")
    refused(said, "a/metrics.jsonl cannot be written (No space left on device)", "it needs about", "trimtab resume a")
    assert len(RunFolder("a").metrics()) == 4
    assert say("resume", "a").code == 0
    assert outcome(Path("a")) == whole


def test_a_disk_that_is_full_during_the_report(
    say: Say, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        replace = Path.replace
        patch.setattr(Path, "replace", lambda p, to: full() if "report" in p.name else replace(p, to))
        said = say.train("a", "--steps", "6", "--save-every", "2", "--eval-every", "2")
    refused(said, "a/report.html cannot be written (No space left on device)", "it needs about")
    assert leftovers(Path("a")) == []
    assert outcome(Path("a")) == whole, "the run itself is whole"
    assert say("resume", "a").code == 0, "and resuming only makes the report"
    assert RunFolder("a").report.exists()
    assert outcome(Path("a")) == whole


def test_a_disk_that_is_full_during_the_export(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
        said = say.train("a")
    refused(said, "a/model cannot be written (No space left on device)", "it needs about", "trimtab resume a")
    assert not Path("a/model").exists(), "no half-written model"
    assert say("resume", "a").code == 0
    assert Path("a/model/config.json").exists()


def test_a_disk_that_is_full_from_the_start(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(records.os, "fsync", full)
        refused(say.train("a"), "a/config.json cannot be written (No space left on device)")
    assert leftovers(Path("a")) == []
    assert say.train("a").code == 0


def test_when_the_report_cannot_be_written_either_both_are_said(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "save_file", full_for_tensors)
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda p, to: full() if "report" in p.name else replace(p, to))
    said = say.train("a", "--save-every", "2")
    refused(said, "turn-00000002 cannot be written", "it has no checkpoint yet", "a/report.html cannot be written")
    assert list(Path("a/checkpoints").iterdir()) == []


@pytest.fixture
def largest_file() -> Iterator[Callable[[int], None]]:
    """Sets how large a file this process may write: the system's own refusal, as of a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_real_limit_of_the_system(say: Say, whole: dict[str, Any], largest_file: Callable[[int], None]) -> None:
    largest_file(40_000)  # records fit, the tensors of nano do not
    said = say.train("a", "--steps", "6", "--save-every", "2", "--eval-every", "2")
    largest_file(resource.RLIM_INFINITY)
    refused(said, "turn-00000002 cannot be written (File too large)", "it needs about", "it has no checkpoint yet")
    assert list(Path("a/checkpoints").iterdir()) == []
    assert leftovers(Path("a")) == []
    assert resume("a", mode="silent")["finished"]
    assert outcome(Path("a")) == whole


def test_a_real_full_disk(say: Say, whole: dict[str, Any]) -> None:
    """A file system of 300 kB in memory, where this process may mount one."""
    disk = Path("disk")
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=300k tmpfs {disk} 2>/dev/null"):
        pytest.skip("no file system can be mounted here")
    try:
        said = say.train(disk / "a", "--steps", "6", "--save-every", "2", "--eval-every", "2")
        refused(said, "cannot be written (No space left on device)", "is free on that disk")
        assert leftovers(disk) == []
        shutil.copytree(disk / "a", "a")
    finally:
        os.system(f"umount {disk}")
    assert resume("a", mode="silent")["finished"]
    assert outcome(Path("a")) == whole


def test_the_sentence_of_a_refusal_says_what_to_do(tmp_path: Path) -> None:
    for number, words in [(errno.ENOSPC, "Make room there"), (errno.EDQUOT, "Make room there"),
                          (errno.EACCES, "Allow this user"), (errno.EROFS, "choose another place"),
                          (errno.EIO, "Choose another place")]:  # fmt: skip
        with pytest.raises(DiskError, match=words) as caught, writing(tmp_path / "x" / "y", 3_000_000):
            raise OSError(number, "no")
        assert str(tmp_path / "x" / "y") in str(caught.value)
        assert ("it needs about 3.0 MB" in str(caught.value)) == ("Make room" in words)
    with pytest.raises(SafetensorError), writing(tmp_path):
        raise SafetensorError("not about files")
    assert salvage.standing(RunFolder(tmp_path)).startswith("Nothing was recorded yet")
