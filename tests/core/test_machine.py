"""Choosing threads."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from trimtab import machine


def test_threads_follow_the_environment_the_model_and_the_idle_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRIMTAB_THREADS", raising=False)
    monkeypatch.setattr(machine, "cores", lambda: 8)
    monkeypatch.setattr(machine, "busy", lambda: 2.6)
    assert machine.threads_for(small=False) == 5
    assert machine.threads_for(small=True) == 1
    monkeypatch.setattr(machine, "busy", lambda: 9.0)
    assert machine.threads_for(small=False) == 1
    monkeypatch.setenv("TRIMTAB_THREADS", "3")
    assert machine.threads_for(small=True) == 3


def test_busy_is_a_number_of_cores() -> None:
    assert 0 <= machine.busy(0.05) <= 1024
    assert machine.cores() >= 1


def test_memory_is_kept_where_the_c_library_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: the setting stays until it ends."""
    code = "from trimtab.machine import keep_freed_memory; print(keep_freed_memory())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str("glibc" in platform.libc_ver())

    if Path("/sys/kernel/mm/transparent_hugepage").exists():
        code += "; print(*(m for m in open('/proc/self/smaps') if m.startswith('VmFlags') and ' hg' in m))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert ("hg" in done.stdout) == ("glibc" in platform.libc_ver()), "large pages were asked for"

    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(machine.ctypes, "CDLL", missing)
    assert machine.keep_freed_memory() is False
