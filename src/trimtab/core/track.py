"""A track: one learner of a method, and what its losses need in every update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from trimtab.core.errors import MethodError
from trimtab.core.piece import Piece


@dataclass(frozen=True)
class Losses:
    """The losses of a track with what is the same in every update.

    wants: of the model. unit: what a micro-batch keeps whole. scoped: those with parts that see the whole update. idle:
    each loss's own test for rows that it is silent on, None where one of them has none.
    """

    pieces: tuple[Piece, ...]
    wants: frozenset[str]
    unit: str
    scoped: tuple[Piece, ...]
    idle: tuple[Callable[[Any], Any], ...] | None

    @classmethod
    def of(cls, pieces: tuple[Piece, ...]) -> Losses:
        tests = [q.idle for p in pieces for q in p.walk() if q.stage == "loss"]
        return cls(
            pieces,
            frozenset().union(*(p.union("wants") for p in pieces)),
            next((p.core.options["unit"] for p in pieces if p.core.options["unit"] != "row"), "row"),
            tuple(p for p in pieces if any(q.stage == "part" and q.at == "update" for q in p.walk())),
            tuple(t for t in tests if t) if tests and None not in tests else None,
        )


@dataclass(frozen=True)
class Track:
    """One learner: the model it trains, its own pieces, its terms, and how its parameters move.

    every: run on each k-th update. on: "update", or "last" to run once per batch, on all of its rows.
    """

    name: str
    trains: str
    pieces: tuple[Piece, ...]
    update: Piece
    every: int = 1
    on: str = "update"

    def __post_init__(self) -> None:
        if self.every < 1 or self.on not in ("update", "last"):
            raise MethodError(
                f"track {self.name!r} has every={self.every!r} and on={self.on!r}; it runs on each k-th 'update', "
                f"k >= 1, or on the 'last' of a batch"
            )

    def of(self, stage: str) -> tuple[Piece, ...]:
        return tuple(p for p in self.pieces if p.stage == stage)

    @cached_property
    def losses(self) -> Losses:
        return Losses.of(self.of("loss"))

    def all(self) -> tuple[Piece, ...]:
        return (*self.pieces, self.update)
