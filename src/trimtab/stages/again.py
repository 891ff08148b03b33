"""Collect twice: the prompts of a batch asked again, with other options of the same collect."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.core.batch import Batch
from trimtab.core.errors import MethodError
from trimtab.core.kit import Kit
from trimtab.core.piece import Piece


class Noting:
    """An environment that remembers what it gave out to be decided; all else is the environment's own."""

    def __init__(self, environment: Any) -> None:
        self._environment = environment
        self.drawn: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._environment, name)

    def draw(self, n: int, *more: Any) -> Any:
        given = self._environment.draw(n, *more)
        self.drawn += list(given)
        return given


class Same:
    """An environment that gives these out, in turn and over again, and scores as the real one; its cursor rests."""

    def __init__(self, environment: Any, drawn: list[Any]) -> None:
        self._environment, self._drawn, self._next = environment, drawn, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._environment, name)

    def draw(self, n: int, *more: Any) -> Any:
        given = [self._drawn[(self._next + i) % len(self._drawn)] for i in range(n)]
        self._next += n
        return torch.stack(given) if isinstance(given[0], Tensor) else given


def noted(kit: Kit, collect: Piece) -> tuple[Batch, list[Any]]:
    """The rows of a collect, and what the environment gave out for them, in order."""
    environment = Noting(kit.environment)
    return kit.counted(lambda: collect(kit.playing(environment))), environment.drawn


def again(kit: Kit, collect: Piece, drawn: list[Any], **options: Any) -> Batch:
    """The same collect on what was drawn before, with other options; what it logs is dropped, what it decides counts.

    An option belongs to the collect or to a wrap around it. Raises MethodError for one that none of them has.
    """
    for name, value in options.items():
        if not has(collect, name):
            raise MethodError(f"{collect.core.name} has no option {name!r}, which asking again must set")
        collect = collect.assign([name], value)
    return kit.counted(lambda: collect(kit.playing(Same(kit.environment, drawn), quietly=True)))


def has(collect: Piece, name: str) -> bool:
    """Whether a collect, or a wrap around it, has this option."""
    return name in collect.options or (collect.inner is not None and has(collect.inner, name))
