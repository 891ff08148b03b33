"""What this machine can give a run: its cores, and how many of them are idle right now."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from pathlib import Path

_STAT = Path("/proc/stat")


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def busy(seconds: float = 0.3) -> float:
    """How many cores other work keeps busy, measured over `seconds`; the one-minute load where there is no /proc."""
    if not _STAT.exists():
        return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    start = _ticks()
    time.sleep(seconds)
    used, total = (b - a for a, b in zip(start, _ticks()))
    return (os.cpu_count() or 1) * used / max(total, 1)


def _ticks() -> tuple[int, int]:
    """(busy, all) clock ticks of all cores since boot."""
    numbers = [int(n) for n in _STAT.read_text().split("\n", 1)[0].split()[1:9]]
    return sum(numbers) - numbers[3] - numbers[4], sum(numbers)


def threads_for(small: bool) -> int:
    """Threads for a run: $TRIMTAB_THREADS, else 1 for a small model and the idle cores for a real one.

    Two threads beside another busy process are ten times slower than one, so a busy core is not counted on.
    """
    asked = os.environ.get("TRIMTAB_THREADS", "")
    if asked.isdigit() and int(asked):
        return int(asked)
    return 1 if small else max(1, cores() - round(busy()))


def cache_folder() -> Path:
    """Where what is made once lies, converted models and compiled kernels: $TRIMTAB_CACHE, or ~/.cache/trimtab."""
    return Path(os.environ.get("TRIMTAB_CACHE") or Path.home() / ".cache" / "trimtab")


def keep_freed_memory() -> bool:
    """Ask the C library to keep freed memory for the next tensor; whether it is one that can (glibc).

    Otherwise every large temporary goes back to the system and its pages are made anew: a seventh of a GRPO step of
    SmolLM2. The system is asked for large pages too, where it gives them to who asks: a twentieth of a SAC step. For
    the whole process, so a program decides it, not a library: the command line does.
    """
    settings = {-4: 0, -1: 2**31 - 1, -8: 1}  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX of malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        accepted = [libc.mallopt(name, value) for name, value in settings.items()]
        if all(accepted):
            _large_pages(libc)
        return all(accepted)
    return False


def _large_pages(libc: ctypes.CDLL) -> None:
    """Let the heap grow by 1 GiB, ask for pages of 2 MiB there, and free it again: kept for what is made from now on.

    Nothing is written there, so it takes no memory until it is used.
    """
    size, page, hugepage = 2**30, 2**21, 14  # MADV_HUGEPAGE of mman.h
    libc.malloc.restype = ctypes.c_void_p
    start = libc.malloc(ctypes.c_size_t(size))
    if start:
        first = start + -start % page
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t((start + size - first) // page * page), hugepage)
        libc.free(ctypes.c_void_p(start))
