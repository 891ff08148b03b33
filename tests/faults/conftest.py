"""What every test here speaks with."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.common import Say
from trimtab.environments import scoring
from trimtab.report import html


def letters(problem: Any, text: str) -> float:
    """0, 1 or 2 by the letters of a response."""
    return float(zlib.crc32(text.encode()) % 3)


@pytest.fixture(scope="module", autouse=True)
def _quick_runs_that_learn() -> Iterator[None]:
    """Two changes to the runs of these tests.

    A random policy never answers a sum, so its parameters would not move and every comparison would be empty: rewards
    follow the letters. Reports are written without their plots, which take a second each.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(scoring.FAST, "exact", letters)
        patch.setattr(html, "_curves", lambda *_: "")
        yield


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Say:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRIMTAB_THREADS", "1")
    return Say(capsys)
