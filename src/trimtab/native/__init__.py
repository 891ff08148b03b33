"""C++ kernels for the CPU, compiled by the machine's own compiler where they are first used (seconds), and kept.

`language.cpp` is what lies between the matrix products of a language model, `dense.cpp` a small fully connected
network, forward and backward; `smooth.h` is what both need. Without a compiler, or with TRIMTAB_NATIVE=0, torch's
operations do the same work in more calls and more passes over memory.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

from trimtab.core.errors import TrimtabWarning
from trimtab.machine import cache_folder

# The first that the compiler takes: not every one knows what processor it is on, or calls it so.
FLAGS = (("-march=native",), ("-mcpu=native",), ())
COMMON = ("-std=c++17", "-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")


def wanted() -> bool:
    """Whether kernels may be compiled: TRIMTAB_NATIVE=0 says no."""
    return os.environ.get("TRIMTAB_NATIVE", "1") != "0"


def compiler() -> str | None:
    """The C++ compiler: $CXX, or the first there is of c++, g++ and clang++.

    Apple's has no OpenMP, so on macOS only $CXX counts.
    """
    names = ("c++", "g++", "clang++") if sys.platform != "darwin" else ()
    return next((found for name in (os.environ.get("CXX"), *names) if name and (found := shutil.which(name))), None)


def expected() -> bool:
    """Whether kernels are compiled where they are first used."""
    return wanted() and compiler() is not None


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """The compiled kernels of `<name>.cpp`; None where they are not wanted or there is no compiler.

    Warns, and gives None, where the compiler fails.
    """
    found = compiler()
    if not wanted() or found is None:
        return None
    try:
        return ctypes.CDLL(str(_built(Path(__file__).with_name(f"{name}.cpp"), found)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as problem:
        warnings.warn(
            f"the kernels did not compile with {found} ({problem}), so torch's own operations are used, more slowly; "
            "TRIMTAB_NATIVE=0 turns this off",
            TrimtabWarning,
            stacklevel=2,
        )
        return None


def words() -> str:
    """One line about the kernels, for people."""
    if not wanted():
        return "off (TRIMTAB_NATIVE=0): torch's own operations"
    if compiler() is None:
        return "no C++ compiler with OpenMP ($CXX, c++, g++ or clang++): torch's own operations, more slowly"
    whole = all(library(name) for name in ("language", "dense"))
    return f"compiled with {compiler()}" if whole else "did not compile: torch's own operations"


def cache() -> Path:
    """Where compiled kernels are kept."""
    return cache_folder() / "native"


def _built(source: Path, compiler: str) -> Path:
    """The library for this source, compiler and processor, compiled unless that was done before."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    text = [path.read_text() for path in (source, *sorted(source.parent.glob("*.h")))]
    what = "\0".join([*text, version, _processor(), repr((FLAGS, COMMON))])
    target = cache() / f"{hashlib.sha256(what.encode()).hexdigest()[:16]}.so"
    if _ours(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    said = ""
    for flags in FLAGS:
        handle, name = tempfile.mkstemp(".so", dir=target.parent)
        os.close(handle)
        done = subprocess.run(
            [compiler, *COMMON, *flags, str(source), "-o", name], capture_output=True, text=True, check=False
        )
        if not done.returncode:
            os.replace(name, target)  # whole or not at all: two runs may compile at once
            return target
        os.unlink(name)
        said = said or (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[0]
    raise RuntimeError(said)


def _ours(path: Path) -> bool:
    """Whether this file is there and nobody else can have written it."""
    if not path.exists():
        return False
    if not hasattr(os, "getuid"):
        return True
    found = path.stat()
    return found.st_uid == os.getuid() and not found.st_mode & 0o022


def _processor() -> str:
    """What distinguishes processors that share a home folder: code for one may not run on another."""
    table = Path("/proc/cpuinfo")
    if not table.exists():
        return f"{platform.machine()} {platform.processor()}"
    lines = table.read_text().splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
