"""A run as TensorBoard event files: every number of every turn under its own name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import util
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from trimtab.core.errors import TrimtabError


class TensorBoardError(TrimtabError):
    """Event files were asked for, and the package that writes them is not there."""


def needs_tensorboard() -> None:
    """Raises TensorBoardError with what to install, before anything has begun."""
    if util.find_spec("tensorboard") is None:
        raise TensorBoardError(
            "--tensorboard needs the package tensorboard, which is not installed: "
            "pip install 'trimtab[tensorboard]', or leave --tensorboard out"
        )


class TensorBoard:
    """Writes what a run logs as scalars; the step is the turn. Use as a context manager around the loop.

    folder: where event files go. turn: the turn the run starts from; what an earlier process wrote about later turns
    is purged, so that a resumed run holds each turn once.

    Names: those of `metrics.jsonl` (nested ones joined by `/`); the clock as `clock/updates`, `clock/decisions`,
    `clock/rows`, `clock/seconds`; evaluations as `held_out/mean`, `held_out/low`, `held_out/high`, `held_out/n`. A
    number that is not finite is written as it is.

    Observing never kills training: the first exception inside is said in one note on stderr, and nothing more is
    written.
    """

    def __init__(self, folder: Path, *, turn: int = 0) -> None:
        self._folder, self._turn = folder, turn
        self._writer: Any = None

    def update(self, logs: Mapping[str, Any], clock: Mapping[str, Any]) -> None:
        """One turn happened. logs: any numbers, nested or not; clock: its counts and seconds."""
        self._observe(lambda: self._update(logs, clock))

    def evaluated(self, mean: float, low: float | None = None, high: float | None = None, n: int | None = None) -> None:
        """Held-out problems were evaluated after the latest turn."""
        values = {"mean": mean, "low": low, "high": high, "n": n}
        self._observe(lambda: self._write(scalars(values, "held_out/")))

    def note(self, text: str) -> None:
        """Say one sentence, on the page of texts."""
        self._observe(lambda: self._writer.add_text("note", text, self._turn))

    def __enter__(self) -> Self:
        try:
            self._open()
        except Exception as error:
            self._off(error)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._observe(lambda: self._writer.close())

    # -- inside ---------------------------------------------------------------------------------------------------
    def _open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=self._turn + 1)

    def _update(self, logs: Mapping[str, Any], clock: Mapping[str, Any]) -> None:
        self._turn = int(clock["turns"])
        times = {key: value for key, value in clock.items() if key != "turns"}
        self._write({**scalars(logs), **scalars(times, "clock/")})

    def _write(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, self._turn)
        self._writer.flush()  # a checkpoint of this turn must not outlive its record

    def _observe(self, action: Callable[[], None]) -> None:
        if self._writer is None:
            return
        try:
            action()
        except Exception as error:
            self._off(error)

    def _off(self, error: Exception) -> None:
        self._writer = None  # not closed: closing would wait for the writes that failed
        with suppress(Exception):  # without stderr, there is nobody to tell
            what = f"{type(error).__name__}: {error}"[:200]
            print(
                f"Writing event files to {self._folder} stopped ({what}). Training goes on, and its record is kept.",
                file=sys.stderr,
            )


def scalars(values: Mapping[str, Any], head: str = "") -> dict[str, float]:
    """The numbers of a record by name, nested mappings joined by `/`; nan and infinity are numbers here."""
    out: dict[str, float] = {}
    for key, value in values.items():
        if getattr(value, "ndim", None) == 0:
            value = value.item()
        if isinstance(value, Mapping):
            out |= scalars(value, f"{head}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            out[f"{head}{key}"] = float(value)
    return out
