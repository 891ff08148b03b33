"""Everything that watches a run, told at once."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Protocol, Self


class Watcher(Protocol):
    """What a run tells. No method may raise: observing never kills training."""

    def update(self, logs: Mapping[str, Any], clock: Mapping[str, Any]) -> None: ...

    def evaluated(self, mean: float, low: float | None, high: float | None, n: int | None) -> None: ...

    def note(self, text: str) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Watchers:
    """Several watchers as one: each call goes to all of them, in order."""

    def __init__(self, *watchers: Watcher) -> None:
        self._all = list(watchers)
        self._stack = ExitStack()

    def add(self, watcher: Watcher) -> None:
        self._all.append(watcher)

    def update(self, logs: Mapping[str, Any], clock: Mapping[str, Any]) -> None:
        for watcher in self._all:
            watcher.update(logs, clock)

    def evaluated(self, mean: float, low: float | None = None, high: float | None = None, n: int | None = None) -> None:
        for watcher in self._all:
            watcher.evaluated(mean, low, high, n)

    def note(self, text: str) -> None:
        for watcher in self._all:
            watcher.note(text)

    def __enter__(self) -> Self:
        for watcher in self._all:
            self._stack.enter_context(watcher)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
