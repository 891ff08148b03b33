"""What every test here speaks with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.common import Say


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Say:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRIMTAB_THREADS", "1")
    return Say(capsys)
