"""The page of a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.report.page import document, section
from trimtab.report.records import write_atomic
from trimtab.report.transcripts import clean


def write_comparison(out: str | Path, made: Mapping[str, Any]) -> Path:
    """Write `report.html` of a comparison and return its path."""
    path = Path(out) / "report.html"
    body = "".join(f"<p>{clean(c)}</p>" for c in made["conclusions"])
    write_atomic(path, document("comparison · trimtab", section("said", "Comparison", body)))
    return path
