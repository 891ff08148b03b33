"""Writing files: what the system refuses becomes a sentence with the path, the space needed and the space free."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from trimtab.core.errors import DiskError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def writing(path: Path, needed: int = 0) -> Iterator[None]:
    """Raise DiskError, naming `path`, for what the system refuses inside. needed: bytes, 0 where it is not known."""
    try:
        yield
    except DiskError:  # named already, by whoever knew the file itself
        raise
    except SafetensorError as error:  # it puts the system's number into its text
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise
        raise DiskError(_sentence(path, needed, int(found[1]))) from error
    except OSError as error:
        raise DiskError(_sentence(path, needed, error.errno, str(error))) from error


def _sentence(path: Path, needed: int, number: int | None, text: str = "") -> str:
    reason = os.strerror(number) if number else text
    if number in _FULL:
        need = f"it needs about {size_words(needed)}, and " if needed else ""
        free = size_words(_free(path))
        return f"{path} cannot be written ({reason}): {need}{free} is free on that disk. Make room there."
    if number in _FORBIDDEN:
        return f"{path} cannot be written ({reason}). Allow this user to write there, or choose another place."
    return f"{path} cannot be written ({reason}). Choose another place, or put that right."


def _free(path: Path) -> int:
    """Bytes free on the disk that holds `path`, which need not exist."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def size_words(count: float) -> str:
    """Bytes as a reader says them: 300 bytes, 4.5 kB, 1.6 GB."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
