"""Diagnosis while a run goes on: looks now and then, never for more than a fiftieth of the time."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from typing import Any

from trimtab.report.course import Course, Finding
from trimtab.report.diagnose import findings

APART = 2.0  # seconds between looks, at least
SHARE = 0.02  # of the time that looking may take


class Lookout:
    """Keeps the course of a run and what is wrong with it now.

    now: the findings of the last look, gravest first. mute: kinds that mean nothing in this world. course: what was
    recorded before.
    """

    def __init__(self, mute: Collection[str] = (), course: Course | None = None) -> None:
        self.course = Course() if course is None else course
        self.now: list[Finding] = []
        self._mute = mute
        self._said: set[str] = set()
        self._next = float("-inf")

    def add(self, record: Mapping[str, Any]) -> list[Finding]:
        """One more record; the findings of a kind that was not said before, if it was time to look."""
        self.course.add(record)
        return self.look() if time.monotonic() >= self._next else []

    def look(self) -> list[Finding]:
        """Look now, as at the end of a run; the findings of a kind that was not said before."""
        began = time.monotonic()
        self.now = findings(self.course, self._mute)
        self._next = time.monotonic() + max(APART, (time.monotonic() - began) / SHARE)
        new = [f for f in self.now if f.kind not in self._said]
        self._said |= {f.kind for f in new}
        return new

    def soon(self) -> None:
        """Look at the next record, whenever that is."""
        self._next = float("-inf")
