"""The run folder: everything a run leaves behind, readable while it runs and after a kill.

config.json     what was asked, resolved; rebuilds the run
metrics.jsonl   one record a turn
eval.jsonl      one record an evaluation of held-out problems; the first is from before training
samples.jsonl   transcripts
checkpoints/    saved states
report.html     the page made from the above
findings.json   what the numbers suggest, and which rules could be checked
tensorboard/    event files, if asked for
model/          the exported policy
start/          the model of an earlier run that it began with, if asked for
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from trimtab.core.disk import writing
from trimtab.core.errors import TrimtabError
from trimtab.report.lock import FolderLock
from trimtab.report.records import Appender, cut_after, read_records, sync_folder, to_json, write_atomic

RECORDS = ("metrics", "eval", "samples")
START = "start"


class RunFolderError(TrimtabError):
    """A run folder is missing, already used, or not open for writing."""


class RunFolder:
    """A handle on one run's folder. Reading needs nothing; `create` or `resume` opens it for writing.

        with RunFolder("runs/a").create(config) as folder:
            folder.write_metrics({"turn": 1, "reward": 0.2})

    path: the folder; it need not exist yet.
    resume_with: the command named when a used folder is refused; `{path}` stands for the folder.
    """

    def __init__(self, path: str | Path, resume_with: str = "trimtab resume {path}") -> None:
        self.path = Path(path)
        self.resume_with = resume_with
        self._lock = FolderLock(self.path)
        self._open: dict[str, Appender] = {}

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    # -- writing --------------------------------------------------------------------------------------------------
    def holds_run(self) -> bool:
        """Whether a run recorded or saved anything here (a run that died before its first record does not count)."""
        recorded = any(self._file(k).is_file() and self._file(k).stat().st_size for k in RECORDS)
        return recorded or (self.checkpoints.is_dir() and any(self.checkpoints.iterdir()))

    def create(self, config: Mapping[str, Any]) -> Self:
        """Start a new run here: make the folder, lock it, write `config.json`.

        Raises `RunFolderError` if the folder holds a run, `LockedError` if one is being written right now, and
        `DiskError` where no folder can be written.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunFolderError(f"{self.path} is a file, not a folder; choose another place for the run")
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        try:
            if self.holds_run():
                raise RunFolderError(self._used())
            with writing(self.checkpoints):
                self.checkpoints.mkdir(exist_ok=True)
            self.write_json("config", config)
            self._start(None)
        except BaseException:
            self.close()
            raise
        return self

    def resume(self, turn: int | None) -> Self:
        """Continue the run that is here, from the checkpoint of `turn`: lock, and drop every later record.

        The turns after the checkpoint will run again and be recorded again, so without this the record would hold
        them twice. `turn` None keeps every record (nothing will be repeated).
        Raises `RunFolderError` if there is no run, `LockedError` if one is being written right now.
        """
        if not (self.path / "config.json").is_file():
            raise RunFolderError(f"{self.path} holds no run to resume: it has no config.json")
        with writing(self.path):
            self._lock.acquire()
        try:
            with writing(self.checkpoints):
                self.checkpoints.mkdir(exist_ok=True)
            self._start(turn)
        except BaseException:
            self.close()
            raise
        return self

    def write_metrics(self, record: Mapping[str, Any]) -> None:
        """Append one turn's record to `metrics.jsonl`. Floats that are not finite: see `records`."""
        self._append("metrics", record)

    def write_eval(self, record: Mapping[str, Any]) -> None:
        """Append one evaluation's record to `eval.jsonl`: turn, seconds, mean, low, high, n."""
        self._append("eval", record)

    def write_samples(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append transcripts to `samples.jsonl`, one record a response."""
        for record in records:
            self._append("samples", record)

    def write_json(self, name: str, value: Mapping[str, Any]) -> Path:
        """Write `name.json` whole or not at all; returns its path."""
        path = self.path / f"{name}.json"
        write_atomic(path, to_json(value, indent=2) + "\n")
        return path

    def sync(self) -> None:
        """Wait until every record is on disk. Call before saving a checkpoint: resuming needs its record."""
        for appender in self._open.values():
            appender.sync()
        if self._open:
            sync_folder(self.path)

    def close(self) -> None:
        """Stop writing and give the lock back. Closing twice is harmless."""
        for appender in self._open.values():
            appender.close()
        self._open.clear()
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- reading --------------------------------------------------------------------------------------------------
    def config(self) -> dict[str, Any]:
        """The resolved configuration. Raises `RunFolderError` if it is missing or unreadable."""
        return self.read_json("config")

    def read_json(self, name: str) -> dict[str, Any]:
        """`name.json`. Raises `RunFolderError` if it is missing or not a JSON object."""
        path = self.path / f"{name}.json"
        try:
            value = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise RunFolderError(f"there is no {path}; is {self.path} a run folder?") from None
        except (OSError, ValueError, RecursionError) as error:
            raise RunFolderError(f"{path} cannot be read as JSON: {error}") from None
        if not isinstance(value, dict):
            raise RunFolderError(f"{path} holds a {type(value).__name__}; a JSON object is needed")
        return value

    def metrics(self) -> list[dict[str, Any]]:
        """The record of every turn so far, in order."""
        return read_records(self._file("metrics"))[0]

    def evaluations(self) -> list[dict[str, Any]]:
        """Every evaluation so far, in order."""
        return read_records(self._file("eval"))[0]

    def samples(self) -> list[dict[str, Any]]:
        """Every transcript so far, in order."""
        return read_records(self._file("samples"))[0]

    def damaged(self) -> int:
        """How many lines of the records cannot be read (a last line torn by a kill is not counted)."""
        return sum(read_records(self._file(kind))[1] for kind in RECORDS)

    # -- inside ---------------------------------------------------------------------------------------------------
    def _file(self, kind: str) -> Path:
        return self.path / f"{kind}.jsonl"

    def _start(self, turn: int | None) -> None:
        for kind in RECORDS:
            cut_after(self._file(kind), turn)
            self._open[kind] = Appender(self._file(kind))

    def _append(self, kind: str, record: Mapping[str, Any]) -> None:
        if kind not in self._open:
            raise RunFolderError(f"{self.path} is not open for writing; call create(config) or resume(turn) first")
        self._open[kind].append(record)

    def _used(self) -> str:
        turns = len(self.metrics())
        done = "1 turn" if turns == 1 else f"{turns} turns"
        command = self.resume_with.format(path=self.path)
        return (
            f"{self.path} already holds a run ({done} recorded); continue it with `{command}`, or choose another folder"
        )
