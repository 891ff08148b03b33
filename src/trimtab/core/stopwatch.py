"""Where a turn's time goes: the loop, the sampler and the closure name their phases, and a watch adds them up.

    with measuring() as watch:
        for step in run(...): ...
    watch.root.parts["update"].parts["forward"].seconds

Off unless somebody measures: a phase then costs the look at one variable. While measuring, a GPU is waited for at both
ends of every phase, so that a phase is charged for what it started.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
NOTHING: AbstractContextManager[None] = nullcontext()


@dataclass
class Span:
    """What one phase took, summed over its calls; the phases inside it are its `parts`.

    totals: seconds and whatever else the watch meters. counts: what was said inside with `count`. peak: the largest
    memory in bytes, 0 where no gauge was given.
    """

    calls: int = 0
    totals: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    peak: int = 0
    parts: dict[str, Span] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return self.totals.get("seconds", 0.0)

    def rest(self, meter: str = "seconds") -> float:
        """What of a total fell outside its parts."""
        return self.totals.get(meter, 0.0) - sum(p.totals.get(meter, 0.0) for p in self.parts.values())

    def walk(self, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Span]]:
        """`(path, span)` of this span and all below it, parents first."""
        yield path, self
        for name, part in self.parts.items():
            yield from part.walk((*path, name))


class Stopwatch:
    """Adds up phases. meters: running totals by name, read at both ends of a phase. gauge: peak memory since it was
    last asked, in bytes."""

    def __init__(
        self, meters: Mapping[str, Callable[[], float]] | None = None, gauge: Callable[[], int] | None = None
    ) -> None:
        self.root = Span()
        self._open = [self.root]
        self._meters = {"seconds": _now, **(meters or {})}
        self._gauge = gauge

    @contextmanager
    def phase(self, name: str, brief: bool = False) -> Iterator[None]:
        """Charge what happens inside to this phase, inside the one that is open.

        brief: one that takes microseconds, so that the gauge is not read for it; its peak is part of the outer one's.
        """
        outer = self._open[-1]
        span = outer.parts.setdefault(name, Span())
        if not brief:
            self._fold(outer)
        start = {meter: read() for meter, read in self._meters.items()}
        self._open.append(span)
        try:
            yield
        finally:
            self._open.pop()
            for meter, read in self._meters.items():
                span.totals[meter] = span.totals.get(meter, 0.0) + read() - start[meter]
            span.calls += 1
            if not brief:
                self._fold(span)
                outer.peak = max(outer.peak, span.peak)

    def count(self, **amounts: float) -> None:
        """Add amounts to the phase that is open."""
        counts = self._open[-1].counts
        for name, amount in amounts.items():
            counts[name] = counts.get(name, 0.0) + amount

    def _fold(self, span: Span) -> None:
        if self._gauge is not None:
            span.peak = max(span.peak, self._gauge())


_watch: ContextVar[Stopwatch | None] = ContextVar("watch", default=None)


@contextmanager
def measuring(
    meters: Mapping[str, Callable[[], float]] | None = None, gauge: Callable[[], int] | None = None
) -> Iterator[Stopwatch]:
    """Measure the phases of what runs inside."""
    watch = Stopwatch(meters, gauge)
    token = _watch.set(watch)
    try:
        yield watch
    finally:
        _watch.reset(token)


def watching() -> Stopwatch | None:
    """The watch that measures now, or None."""
    return _watch.get()


def phase(name: str, brief: bool = False) -> AbstractContextManager[None]:
    """`with phase("forward"): ...`; nothing at all unless somebody measures. brief: see `Stopwatch.phase`."""
    watch = _watch.get()
    return NOTHING if watch is None else watch.phase(name, brief)


def timed(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A function that is a phase."""

    def decorate(fn: Callable[P, R]) -> Callable[P, R]:
        @wraps(fn)
        def measured(*args: P.args, **kwargs: P.kwargs) -> R:
            watch = _watch.get()
            if watch is None:
                return fn(*args, **kwargs)
            with watch.phase(name):
                return fn(*args, **kwargs)

        return measured

    return decorate


def count(**amounts: float) -> None:
    """Add to what is counted in the open phase, if anybody measures."""
    watch = _watch.get()
    if watch is not None:
        watch.count(**amounts)


def count_rows(batch: Any) -> None:
    """Say which rows the open phase reads.

    rows; their decisions; prompts, distinct ones, as far as a group or pair says; and read, the places of both.
    """
    watch = _watch.get()
    if watch is None:
        return
    mask, level = batch["mask"].bool(), next((name for name in ("group", "pair") if name in batch), None)
    prompts = len(batch) if level is None else len(batch[level].unique())
    width = int(batch["prompt_mask"].bool().any(0).sum()) if "prompt_mask" in batch else 0
    read = len(batch) * int(mask.any(0).sum()) + prompts * width
    watch.count(rows=len(batch), decisions=int(mask.sum()), prompts=prompts, read=read)


def _now() -> float:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
