"""How numbers are said: one spelling for the page, the terminal and the diagnosis."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeGuard

WHY_LOSS_IS_ZERO = (
    "A policy loss near 0 is normal: advantages are centred and the ratio starts at 1, so the terms cancel; the "
    "gradient does not. Watch the reward."
)

LOSS_SHOULD_FALL = (
    "The loss of this method should fall from where it starts: no advantages cancel in it. Whether the policy improves "
    "is seen on the held-out problems."
)


LOSS_IN_CONTROL = (
    "The loss of a policy that acts says little: advantages are centred, and values chase a target that moves. Watch "
    "the return, and the held-out episodes."
)


@dataclass(frozen=True)
class Words:
    """What things are called in a world. shares: rewards in [0, 1] are shares, and shown in percent. mute: findings of
    `diagnose` that mean nothing here: the entropy of real-valued actions is relative, and passes 0 on its way (their
    width is looked at instead); and a behavior policy that is another one on purpose is no fault of a sampler.
    """

    reward: str = "reward"
    problem: str = "problem"
    response: str = "Response"
    decision: str = "token"
    shares: bool = True
    mute: frozenset[str] = frozenset()


LANGUAGE = Words()
WORDS = {
    "language": LANGUAGE,
    "control": Words("return", "episode", "Episode", "decision", False, frozenset({"entropy", "noise", "gap"})),
}


def words_of(world: Any) -> Words:
    """The words of a world; those of language where it is not known, as in an older record."""
    return WORDS.get(world, LANGUAGE) if isinstance(world, str) else LANGUAGE


def about_loss(resolved: Iterable[str], world: Any = "language") -> str:
    """What to make of the loss of a method, from the addresses in force in it, and its world.

    With a credit stage advantages cancel; without one (supervised fine-tuning, preferences) the loss is a distance.
    """
    if world == "control":
        return LOSS_IN_CONTROL
    slots = {path.rpartition(" / ")[2].rpartition(":")[2] for path in resolved}
    return WHY_LOSS_IS_ZERO if "credit" in slots or not slots else LOSS_SHOULD_FALL


_LARGEST_INT = 2**1000  # a JSON integer may be larger than any float


def is_number(value: Any) -> TypeGuard[float]:
    """Whether this is a finite int or float (bools are not numbers here)."""
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < _LARGEST_INT
    return isinstance(value, float) and math.isfinite(value)


def number(value: float) -> str:
    """Three significant digits, plain where that reads well: 0.0123, 4.56, 1,234, 1.2e-06."""
    if not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    size = abs(value)
    if value == int(value) and size < 1e6:
        return f"{int(value):,}"
    if size >= 1e6 or size < 1e-3:
        return f"{value:.2g}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def percent(value: float) -> str:
    """A share in words: 0.14 -> 14%; below 1% one more digit."""
    points = 100 * value
    if 0 < abs(points) < 1:
        return f"{points:.1f}%"
    return f"{points:.0f}%"


def interval(low: Any, high: Any, share: bool = False) -> str:
    """`[7, 26]` for shares (in percent), `[0.35, 0.47]` otherwise; empty when either end is unknown."""
    if not (is_number(low) and is_number(high)):
        return ""
    if share:
        return f"[{100 * low:.0f}, {100 * high:.0f}]"
    return f"[{low:.2f}, {high:.2f}]" if max(abs(low), abs(high)) < 1000 else f"[{number(low)}, {number(high)}]"


def duration(seconds: float) -> str:
    """0.42 s, 12 s, 4 min 10 s, 1 h 05 min, 2 d 03 h."""
    if not math.isfinite(seconds) or seconds < 0:
        return "unknown time"
    if seconds < 10:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def count(n: int, one: str, many: str | None = None) -> str:
    """`1 turn`, `2 turns`."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"
