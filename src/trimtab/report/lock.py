"""One writer per run folder.

The lock is the operating system's, on the file `.lock`; it ends with the process that holds it, however that dies, so
a stale file never blocks anybody. The file's text (the process id, since when) only serves the error sentence.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from trimtab.core.errors import TrimtabError

# POSIX record locks belong to the process: a second attempt by the same process would succeed. This set refuses it.
_HELD: set[Path] = set()
_BYTE = 1 << 20  # where Windows locks: beyond the text, which stays readable


class LockedError(TrimtabError):
    """Another run is writing in this folder."""


class FolderLock:
    """Holds `folder/.lock` from `acquire` to `release`.

    `acquire` raises `LockedError`, naming the process, while another one (or this one) holds it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        self._handle: int | None = None

    def acquire(self) -> None:
        key = self.path.resolve()
        # Checked before the file is opened: closing any handle on it would drop the lock this process holds.
        if key in _HELD:
            raise LockedError(f"{self.path.parent} is already being written by this process; close that run first")
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        if not _try_lock(handle):
            holder = os.read(handle, 1000)
            os.close(handle)
            raise LockedError(_refusal(self.path.parent, holder))
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps({"pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}).encode())
        self._handle = handle
        _HELD.add(key)

    def release(self) -> None:
        if self._handle is None:
            return
        # The file stays: removing it could let two processes hold locks on two files of that name.
        os.ftruncate(self._handle, 0)
        os.close(self._handle)
        self._handle = None
        _HELD.discard(self.path.resolve())


def _refusal(folder: Path, holder: bytes) -> str:
    try:
        who = json.loads(holder)
        name = f"process {who['pid']} (since {who['since']})"
    except (ValueError, KeyError, TypeError):
        name = "another process"
    return f"{folder} is being written by {name}; wait for it, stop it, or choose another folder"


if sys.platform == "win32":
    import msvcrt

    def _try_lock(handle: int) -> bool:
        os.lseek(handle, _BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        finally:
            os.lseek(handle, 0, os.SEEK_SET)
        return True
else:
    import fcntl

    def _try_lock(handle: int) -> bool:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        return True
