"""Stopping a run from outside without losing its turn."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Ctrl-C, and what clusters and `kill` send before they take a machine away.
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Gives `asked()`: whether Ctrl-C or SIGTERM asked the run to finish its turn, save and stop.

    A second signal of either kind stops at once, as KeyboardInterrupt.
    """
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    try:
        old = {number: signal.signal(number, ask) for number in SIGNALS}
    except ValueError:  # not in the main thread: whoever runs us there handles signals
        yield lambda: False
        return
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
