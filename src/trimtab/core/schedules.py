"""Numbers that follow the clock. Any numeric option of a piece may be one of these."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trimtab.core.piece import Schedule
from trimtab.core.state import Clock


@dataclass(frozen=True)
class linear(Schedule):
    """From `start` to `end` in proportion to the run's progress: `start + (end - start) progress`."""

    start: float
    end: float

    def __call__(self, clock: Clock) -> float:
        return self.start + (self.end - self.start) * clock.progress


@dataclass(frozen=True)
class cosine(Schedule):
    """From `start` to `end` along half a cosine over the run's progress."""

    start: float
    end: float

    def __call__(self, clock: Clock) -> float:
        return self.end + (self.start - self.end) * 0.5 * (1 + math.cos(math.pi * clock.progress))


@dataclass(frozen=True)
class warmup_cosine(Schedule):
    """`peak step / warmup` for `step < warmup`, then half a cosine to `valley` over `decay` updates, then `valley`.

    Steps are updates (CHORD eq. for mu(t); warmup 0 and decay 0 are allowed).
    """

    warmup: int
    decay: int
    peak: float
    valley: float

    def __call__(self, clock: Clock) -> float:
        step = clock.updates
        if step < self.warmup:
            return self.peak * step / self.warmup
        if step >= self.warmup + self.decay:
            return self.valley
        share = (step - self.warmup) / self.decay
        return self.valley + (self.peak - self.valley) * 0.5 * (1 + math.cos(math.pi * share))


@dataclass(frozen=True)
class power(Schedule):
    """`start (2 / (turn + 2)) ** exponent`, never above `ceiling` (the step rules of stochastic approximation)."""

    start: float
    exponent: float
    ceiling: float = math.inf

    def __call__(self, clock: Clock) -> float:
        return min(self.ceiling, self.start * (2 / (clock.turns + 2)) ** self.exponent)


@dataclass(frozen=True)
class complement(Schedule):
    """`1 - other`, for the two sides of a convex combination."""

    other: Schedule | float

    def __call__(self, clock: Clock) -> float:
        return 1 - (self.other(clock) if isinstance(self.other, Schedule) else self.other)


@dataclass(frozen=True)
class inverse(Schedule):
    """`1 / other`."""

    other: Schedule

    def __call__(self, clock: Clock) -> float:
        return 1 / self.other(clock)
