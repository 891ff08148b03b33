"""Ctrl-C as a request: finish the turn, save, stop."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interruptible() -> Iterator[Any]:
    """Ctrl-C asks the run to finish its turn, save and stop; a second one stops at once."""
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if asked:
            signal.signal(signal.SIGINT, old)
            raise KeyboardInterrupt
        asked.append(number)

    try:
        old = signal.signal(signal.SIGINT, ask)
    except ValueError:  # not in the main thread: whoever runs us there handles signals
        yield lambda: False
        return
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, old)
