"""When a run does what it does now and then: evaluate, save, write a record."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.core.state import Clock


@dataclass(frozen=True)
class Rhythm:
    """Every so many turns; or, where `turns` is None, so many times over the whole budget, whatever a turn holds.

    What is due depends on the clock alone, so a resumed run does it at the same turns.
    """

    turns: int | None = 1
    times: int = 1

    def due(self, clock: Clock, before: float) -> bool:
        """Whether it is time after this turn; before: the clock's progress after the turn before."""
        if self.turns is not None:
            return clock.turns % self.turns == 0
        return int(self.times * clock.progress) > int(self.times * before)

    def count(self, turns: int) -> int:
        """How often in a run of so many turns, at most."""
        return min(turns, self.times) if self.turns is None else -(-turns // self.turns)
