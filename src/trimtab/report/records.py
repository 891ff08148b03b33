"""Records on disk: standard JSON, written so that a kill at any instant leaves them readable.

A record is one JSON object on one line, written with a single system call. A line that a kill tore in two is skipped
by the reader and cut off by the next writer. Whole files go to a temporary name, are synced, then renamed.

JSON has no nan and no infinity. Such a float is written as `null`, and the record gains
`"not_finite": {"<where>": "nan" | "inf" | "-inf"}`, so that every reader can parse the line and none mistakes a number
that blew up for one that was not measured.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from trimtab.core.disk import writing
from trimtab.core.errors import TrimtabError


class RecordError(TrimtabError):
    """A value cannot be written as standard JSON."""


def to_json(record: Mapping[str, Any], indent: int | None = None) -> str:
    """A record as standard JSON text (see the module's note on floats that are not finite).

    record: strings, numbers, bools, None, paths, dataclasses, arrays and tensors, nested in mappings, lists, tuples
    or sets. Raises `RecordError` naming the place of anything else.
    """
    lost: dict[str, str] = {}
    plain = _plain(record, "", lost)
    if lost:
        plain["not_finite"] = lost
    text = json.dumps(plain, indent=indent, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which a byte-level tokenizer can produce
        text = json.dumps(plain, indent=indent, allow_nan=False)
    return text


def _plain(value: Any, where: str, lost: dict[str, str]) -> Any:
    if value is None or isinstance(value, bool | str):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        lost[where] = "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
        return None
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{where}.{k}" if where else str(k), lost) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, f"{where}[{i}]", lost) for i, v in enumerate(value)]
    if isinstance(value, set | frozenset):
        return _plain(sorted(value, key=str), where, lost)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain({f.name: getattr(value, f.name) for f in dataclasses.fields(value)}, where, lost)
    if hasattr(value, "tolist"):  # numpy and torch, scalars included
        return _plain(value.tolist(), where, lost)
    raise RecordError(
        f"{where or 'the record'} holds a {type(value).__name__}, which JSON cannot; "
        "give strings, numbers, bools, None, or lists and mappings of them"
    )


def write_atomic(path: Path, data: str | bytes) -> None:
    """Replace a file so that readers, and a restart after power loss, see the old data or the new, never a part.

    Raises DiskError when the disk does not take it; the old data stay.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    raw = data.encode("utf-8", "replace") if isinstance(data, str) else data
    with writing(path, len(raw)):
        try:
            with temporary.open("wb") as file:
                file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename in this folder survive power loss (where the system lets a folder be synced)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records of a JSONL file, and how many lines could not be read (a torn last line is not counted).

    A missing file holds no records.
    """
    if not path.exists():
        return [], 0
    lines = path.read_bytes().split(b"\n")
    parsed = [_parse(line) for line in lines]
    damaged = sum(1 for line, record in zip(lines[:-1], parsed[:-1]) if record is None and line.strip())
    return [record for record in parsed if record is not None], damaged


def _parse(line: bytes) -> dict[str, Any] | None:
    # A proper prefix of a JSON object never parses, so a line that does is complete even without its newline.
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def cut_after(path: Path, turn: int | None) -> int:
    """Ready a JSONL file for appending: drop unreadable lines, and records later than `turn`; returns how many fell.

    turn: the checkpoint's; records with a greater `turn` will be written again. None keeps every record. The file is
    rewritten only when something falls.
    """
    if not path.exists():
        return 0
    data = path.read_bytes()
    lines = [line for line in data.split(b"\n") if line.strip()]
    keep = [line for line in lines if _stays(_parse(line), turn)]
    text = b"".join(line + b"\n" for line in keep)
    if text != data:
        write_atomic(path, text)
    return len(lines) - len(keep)


def _stays(record: dict[str, Any] | None, turn: int | None) -> bool:
    if record is None:
        return False
    at = record.get("turn")
    return turn is None or not isinstance(at, int | float) or at <= turn


class Appender:
    """An append-only JSONL file; every record is in the system's hands when `append` returns.

    `sync` waits for the disk: call it before saving a checkpoint, so that a record never ends before its checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Unbuffered: one write call per record, so that a kill can tear at most the record being written.
        with writing(path):
            self._file: BinaryIO = path.open("ab", buffering=0)

    def append(self, record: Mapping[str, Any]) -> None:
        line = to_json(record).encode() + b"\n"
        with writing(self.path, len(line)):
            while line:  # a full disk raises; a short write is continued
                line = line[self._file.write(line) :]

    def sync(self) -> None:
        with writing(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
