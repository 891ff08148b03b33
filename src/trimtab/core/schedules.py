"""Numbers that follow the clock. Any numeric option of a piece may be one of these."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from trimtab.core.errors import MethodError
from trimtab.core.piece import Schedule
from trimtab.core.state import Clock


def _checked(schedule: Any, *nested: str, whole: tuple[str, ...] = (), text: tuple[str, ...] = ()) -> None:
    """Every field but `text` is a number; those in `nested` may be schedules, those in `whole` count updates."""
    for name in (f.name for f in fields(schedule) if f.name not in text):
        value = getattr(schedule, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
        if name in whole:
            good, wanted = number and isinstance(value, int) and value >= 0, "a whole number of updates, 0 or more"
        else:
            good = number or (name in nested and isinstance(value, Schedule))
            wanted = "a number or a schedule" if name in nested else "a number"
        if not good:
            raise MethodError(f"{type(schedule).__name__}: {name}={value!r} must be {wanted}")


def _at(value: Schedule | float, clock: Clock) -> float:
    return value(clock) if isinstance(value, Schedule) else value


@dataclass(frozen=True)
class linear(Schedule):
    """From `start` to `end` in proportion to the run's progress: `start + (end - start) progress`."""

    start: float
    end: float

    def __post_init__(self) -> None:
        _checked(self)

    def __call__(self, clock: Clock) -> float:
        return self.start + (self.end - self.start) * clock.progress


@dataclass(frozen=True)
class ramp(Schedule):
    """From `start` to `end` in proportion to the run's progress, reached when a share `over` of it is used."""

    start: float
    end: float
    over: float = 1.0

    def __post_init__(self) -> None:
        _checked(self)
        if not 0 < self.over <= 1:
            raise MethodError(f"ramp: over={self.over!r} must be in (0, 1]: the share of the run that it takes")

    def __call__(self, clock: Clock) -> float:
        return self.start + (self.end - self.start) * min(1.0, clock.progress / self.over)


@dataclass(frozen=True)
class cosine(Schedule):
    """From `start` to `end` along half a cosine over the run's progress."""

    start: float
    end: float

    def __post_init__(self) -> None:
        _checked(self)

    def __call__(self, clock: Clock) -> float:
        return self.end + (self.start - self.end) * 0.5 * (1 + math.cos(math.pi * clock.progress))


@dataclass(frozen=True)
class warmup(Schedule):
    """`then * min(1, update / updates)`: from 0 in equal steps to `then`, a number or another schedule.

    updates: how many updates are smaller, 0 or more; the first of them has the value 0, as in common trainers. A
    schedule in `then` goes by its own clock, so it has moved on a little by the end of the warm-up.
    """

    updates: int
    then: Schedule | float

    def __post_init__(self) -> None:
        _checked(self, "then", whole=("updates",))

    def __call__(self, clock: Clock) -> float:
        share = clock.updates / self.updates if clock.updates < self.updates else 1.0
        return share * _at(self.then, clock)


@dataclass(frozen=True)
class warmup_cosine(Schedule):
    """`peak step / warmup` for `step < warmup`, then half a cosine to `valley` over `decay` steps, then `valley`.

    Warmup 0 and decay 0 are allowed (CHORD, arXiv 2508.11408, mu(t)). by: what a step is, "updates" or "turns"; by
    turns the value is the same for all updates of a batch.
    """

    warmup: int
    decay: int
    peak: float
    valley: float
    by: str = "updates"

    def __post_init__(self) -> None:
        _checked(self, whole=("warmup", "decay"), text=("by",))
        if self.by not in ("updates", "turns"):
            raise MethodError(f"warmup_cosine: by={self.by!r} must be 'updates' or 'turns'")

    def __call__(self, clock: Clock) -> float:
        step: int = getattr(clock, self.by)
        if step < self.warmup:
            return self.peak * step / self.warmup
        if step >= self.warmup + self.decay:
            return self.valley
        share = (step - self.warmup) / self.decay
        return self.valley + (self.peak - self.valley) * 0.5 * (1 + math.cos(math.pi * share))


@dataclass(frozen=True)
class staircase(Schedule):
    """`start` for `wait` turns, then a step towards `end` at the first of each `every` turns; never beyond `end`.

    Falling: `max(start - step ceil(max(turn - wait, 0) / every), end)` (ReMix, arXiv 2507.06892, lambda(t)).
    """

    start: float
    end: float
    step: float
    wait: int
    every: int

    def __post_init__(self) -> None:
        _checked(self, whole=("wait", "every"))
        if self.every < 1 or self.step < 0:
            raise MethodError(f"staircase: every={self.every} must be at least 1 and step={self.step} at least 0")

    def __call__(self, clock: Clock) -> float:
        gone = self.step * math.ceil(max(clock.turns - self.wait, 0) / self.every)
        down = self.end < self.start
        return max(self.start - gone, self.end) if down else min(self.start + gone, self.end)


@dataclass(frozen=True)
class power(Schedule):
    """`start (2 / (turn + 2)) ** exponent`, never above `ceiling` (the step rules of stochastic approximation)."""

    start: float
    exponent: float
    ceiling: float = math.inf

    def __post_init__(self) -> None:
        _checked(self)

    def __call__(self, clock: Clock) -> float:
        return min(self.ceiling, self.start * (2 / (clock.turns + 2)) ** self.exponent)


@dataclass(frozen=True)
class complement(Schedule):
    """`1 - other`, for the two sides of a convex combination."""

    other: Schedule | float

    def __post_init__(self) -> None:
        _checked(self, "other")

    def __call__(self, clock: Clock) -> float:
        return 1 - _at(self.other, clock)


@dataclass(frozen=True)
class inverse(Schedule):
    """`1 / other`."""

    other: Schedule | float

    def __post_init__(self) -> None:
        _checked(self, "other")

    def __call__(self, clock: Clock) -> float:
        return 1 / _at(self.other, clock)
