"""Choosing threads."""

from __future__ import annotations

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
