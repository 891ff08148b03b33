"""What a run and its literal twin came to, turn by turn, and the check that they are the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

Params = dict[str, Tensor]


@dataclass(frozen=True)
class Compared:
    """One turn: parameters as the method left them, as its twin has them, and as both found them.

    moves: smallest largest change for which something was compared; 0 where nothing has to move in this turn.
    """

    got: Params
    expected: Params
    before: Params
    tolerance: float = 1e-12
    moves: float = 1e-4

    def check(self, said: str = "it") -> None:
        assert self.expected, f"{said} was compared with nothing"
        errors = {n: float((self.got[n] - x).abs().max()) for n, x in self.expected.items()}
        worst = max(errors, key=errors.__getitem__)
        assert errors[worst] < self.tolerance, f"{said} is off its twin by {errors[worst]:.2e} in {worst}"
        moved = max(float((x - self.before[n]).abs().max()) for n, x in self.expected.items())
        assert moved >= self.moves, f"{said} did not move, so nothing was compared"


def agreed(turns: Iterator[Compared], said: str = "it") -> int:
    """Check every turn; how many there were, at least one of which has to move."""
    seen = list(turns)
    assert any(turn.moves > 0 for turn in seen), f"{said} was compared in no turn in which it moves"
    for turn in seen:
        turn.check(said)
    return len(seen)
