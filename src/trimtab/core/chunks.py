"""Rows that are only ever added: files of them that checkpoints share, so that saving costs what is new.

A chunk is a file of consecutive rows, named by its digest, in `chunks/` beside the checkpoints that name it. It is
never written into: a last one that is not full is written again, under another name, with what follows it.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimtab.core.errors import CheckpointError

CHUNK = 16_384  # rows a file
PLACE = "chunks"
Saved = list[tuple[int, int, str]]  # rows from, rows to, file


class AppendOnly(ABC):
    """State that grows at its end and is forgotten at its beginning: rows k with `first <= k < total`, k a count of the
    run. saved: the files that hold them, as far as there are any; the checkpoint keeps it up to date."""

    saved: Saved
    total: int

    @property
    @abstractmethod
    def first(self) -> int:
        """The oldest row that is still there."""

    @abstractmethod
    def between(self, start: int, stop: int) -> Tensor:
        """Rows start to stop - 1, `[stop - start, ...]`."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """Everything but the rows and `saved`."""

    @abstractmethod
    def restore(self, about: Mapping[str, Any], rows: Tensor) -> None:
        """Be what `about` and the rows from first to total say."""


def write(kept: AppendOnly, folder: Path) -> int:
    """Put what no file holds yet into files below `folder`; `kept.saved` then names all. Returns the bytes written."""
    saved = [s for s in kept.saved if s[1] > kept.first]
    if saved and saved[-1][1] - saved[-1][0] < CHUNK:
        saved.pop()
    there = saved and saved[0][0] <= kept.first and all((folder / PLACE / name).exists() for *_, name in saved)
    saved = saved if there else []
    done, size = saved[-1][1] if saved else kept.first, 0
    for start in range(done, kept.total, CHUNK):
        stop = min(start + CHUNK, kept.total)
        rows = kept.between(start, stop).detach().cpu().contiguous()
        saved.append((start, stop, _put(rows, folder / PLACE)))
        size += rows.nbytes
    kept.saved = saved
    return size


def _put(rows: Tensor, place: Path) -> str:
    """Write one chunk: complete under its name or not there."""
    place.mkdir(parents=True, exist_ok=True)
    work = place / ".writing"
    save_file({"rows": rows}, work)
    name = f"{_digest(work)}.safetensors"
    _sync(work)
    work.rename(place / name)
    _sync(place)
    return name


def read(saved: Saved, first: int, folder: Path) -> Tensor:
    """Rows from `first` on, in their own allocation. Raises CheckpointError for a file that is missing or damaged."""
    parts = []
    for start, _, name in saved:
        file = folder / PLACE / name
        if not file.exists() or f"{_digest(file)}.safetensors" != name:
            what = "damaged: its sha256 is not its name" if file.exists() else "missing"
            raise CheckpointError(
                f"{file} is {what}, and the checkpoint needs its rows {start} and on. Checkpoints share the files in "
                f"{PLACE}/ beside them; put it back, or go on from a checkpoint that does not name it."
            )
        parts.append(load_file(file)["rows"][max(0, first - start) :])
    return torch.cat(parts) if parts else torch.zeros(0, 0)


def prune(folder: Path, named: Iterable[str]) -> None:
    """Remove the chunks that no checkpoint names, and what a kill left half written."""
    needed = set(named)
    for file in (folder / PLACE).glob("*"):
        if file.name not in needed:
            file.unlink()


def _digest(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
