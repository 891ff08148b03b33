"""Who changes a method: each edit is recorded under the name of the method that made it, or as yours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

YOU = "you"  # who made an edit that no method made


@dataclass(frozen=True)
class Author:
    """Whose edits are being recorded: a method's name, and the bases whose swaps it may replace."""

    name: str = YOU
    lineage: frozenset[str] = frozenset()


AUTHOR: ContextVar[Author] = ContextVar("author", default=Author())  # noqa: B039  frozen


@contextmanager
def authored_by(name: str, lineage: frozenset[str]) -> Iterator[None]:
    """Record the edits made inside under this method's name."""
    token = AUTHOR.set(Author(name, lineage))
    try:
        yield
    finally:
        AUTHOR.reset(token)


@dataclass(frozen=True)
class Edit:
    """One recorded change: who, what kind, where, and in words."""

    by: str
    kind: str
    path: str
    text: str
