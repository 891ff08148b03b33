"""What a control run will take, from a few seconds of it: nothing is made small, for a turn is short already.

The first turn is another one than the others where a method fills its replay first, so it is measured by itself. What
grows while a run goes on is added: the rows of a replay, in memory as they fill and on disk as they are saved.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trimtab.core import chunks
from trimtab.core.chunks import CHUNK, AppendOnly
from trimtab.core.disk import size_words
from trimtab.core.errors import MethodError
from trimtab.core.loop import Step, run
from trimtab.core.method import Method
from trimtab.core.state import State, save
from trimtab.core.stopwatch import Span, measuring
from trimtab.runs.forecast import checkpoint_bytes
from trimtab.runs.meters import machine_words, memory_free, memory_used, peak_since
from trimtab.runs.profile import REST, period
from trimtab.runs.worlds import Experiment

# Seconds before anything counts, under the clock alone, and under the watch of phases; at least so many groups of
# turns, each as long as the method's period. The median of the groups is taken, so that a pause of the machine does not
# become the pace.
WARM, CLOCK, WATCH, GROUPS = 0.5, 4.0, 1.0, 3
FOREVER = 10**9


@dataclass(frozen=True)
class Pace:
    """Seconds and decisions of the first turn and of a later one; updates of a later one; its phases by path."""

    first: tuple[float, float]
    seconds: float
    decisions: float
    updates: float
    phases: dict[tuple[str, ...], float]
    turns: int


def planned(made: Experiment) -> dict[str, Any]:
    """The plan of a control run; see `plan.plan`, which says what is in it."""
    from trimtab.report import html as _  # noqa: F401  a run makes its report at the end, and what that needs stays

    request, method, started = made.request, made.method, time.perf_counter()
    peak_since()
    state = made.begin()
    pace = measured(made, state)
    turns, decisions = spent(pace, request.budget)
    evaluating, result = _timed(lambda: made.evaluate(state))
    evaluations, saves = 1 + request.evaluations.count(turns), request.saves.count(turns)
    with tempfile.TemporaryDirectory() as folder:
        saving, _saved = _timed(lambda: save(state, Path(folder), keep=1))
        grown = growth(state, decisions, saves, request.keep, Path(folder))
    seen = peak_since()
    training = pace.first[0] + (turns - 1) * pace.seconds
    writing = saving * saves + grown["seconds"]
    seconds = {"training": training, "evaluation": evaluating * evaluations, "checkpoints": writing}
    size, model = checkpoint_bytes(state), sum(t.nbytes for m in made.models.values() for t in m.state_dict().values())
    highest = seen + grown["memory"]
    return {
        "method": method.name,
        "policy": made.describe()["policy"],
        "environment": request.env,
        "seconds_a_turn": pace.seconds,
        "turns": turns,
        "decisions": decisions,
        "first_turn": {"seconds": pace.first[0], "decisions": pace.first[1]},
        "seconds": {**seconds, "total": sum(seconds.values())},
        "phases": {"/".join(path): value for path, value in pace.phases.items()},
        "peak_bytes": highest,
        "checkpoint_bytes": size,
        "replay_bytes": grown["disk"],
        "disk_bytes": size * min(saves, request.keep + 1) + model + grown["disk"],
        "sizes": {"decisions": pace.decisions, "updates": pace.updates},
        "assumed": _assumed(pace, result, evaluations, saves, grown),
        "notes": _room(highest),
        "calibration": {"seconds": time.perf_counter() - started, "turns": pace.turns},
        "machine": machine_words(torch.get_num_threads()),
    }


# -- measuring -------------------------------------------------------------------------------------------------------
def measured(made: Experiment, state: State) -> Pace:
    """Play the run that was asked for, a few seconds of it."""
    method = made.method
    # A budget far above what is measured: schedules stay at their start.
    loop = run(method, made.environment, made.models, until={"turns": FOREVER}, state=state, memory=made.request.memory)
    before = _now(state)
    next(loop)
    after = _now(state)
    group = period(method)
    done = 1
    for _ in _during(WARM, filling(method)):
        next(loop)
        done += 1
    begun, groups = _now(state), []
    for _ in _during(CLOCK, GROUPS):
        groups.append(_seconds(loop, group))
    ended = _now(state)
    n = group * len(groups)
    seconds = statistics.median(_chunked(groups)) / group
    watched = 0
    with measuring() as watch:
        for _ in _during(WATCH, 1):
            for _ in range(group):
                with watch.phase("turn"):
                    next(loop)
            watched += group
    phases = _phases(watch.root.parts["turn"])
    scale = seconds / sum(phases.values())
    return Pace(
        first=(after[0] - before[0], after[1] - before[1]),
        seconds=seconds,
        decisions=(ended[1] - begun[1]) / n,
        updates=(ended[2] - begun[2]) / n,
        phases={path: value * scale for path, value in phases.items()},
        turns=done + n + watched,
    )


def filling(method: Method) -> int:
    """Turns until a collect that keeps earlier batches holds all of them: until then its turns are smaller."""
    one = method.phases[0].method if method.phases else method
    kept = [p.options["blocks"] for p in one.get("collect").walk() if p.name == "kept"]
    return max([1, *kept])


def _now(state: State) -> tuple[float, int, int]:
    return time.perf_counter(), state.clock.decisions, state.clock.updates


def _during(seconds: float, least: int) -> Iterator[int]:
    """Count for so many seconds, and at least so far."""
    began, k = time.perf_counter(), 0
    while k < least or time.perf_counter() - began < seconds:
        yield k
        k += 1


def _seconds(loop: Iterator[Step], turns: int) -> float:
    began = time.perf_counter()
    for _ in range(turns):
        next(loop)
    return time.perf_counter() - began


def _chunked(groups: list[float], most: int = 20) -> list[float]:
    """The means of at most so many runs of neighbours: what happens now and then stays in, a single pause does not."""
    size = max(1, len(groups) // most)
    return [statistics.fmean(groups[k : k + size]) for k in range(0, len(groups) - size + 1, size)]


def _phases(turn: Span) -> dict[tuple[str, ...], float]:
    """Seconds of every phase, without those inside it."""
    made = {}
    for path, span in turn.walk():
        name = (*path, REST.get(path[-1] if path else "turn", "other")) if span.parts else path
        made[name] = span.rest()
    return made


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    made = work()
    return time.perf_counter() - began, made


# -- predicting ------------------------------------------------------------------------------------------------------
def spent(pace: Pace, budget: dict[str, int]) -> tuple[int, int]:
    """Turns and decisions of the whole run."""
    ((unit, most),) = budget.items()
    if unit == "turns":
        return most, round(pace.first[1] + (most - 1) * pace.decisions)
    if not pace.decisions:
        raise MethodError(f"this method makes no decisions, so decisions={most} would never end it")
    later = max(0, math.ceil((most - pace.first[1]) / pace.decisions))
    return 1 + later, round(pace.first[1] + later * pace.decisions)


def growth(state: State, decisions: int, saves: int, keep: int, folder: Path) -> dict[str, float]:
    """What the rows of a replay will take: `memory` beyond those there are, `disk`, `seconds` to write them, `rows`.

    Every row is written once, and the last chunk of a checkpoint, which is not full, once more with the next one. Files
    that no kept checkpoint names are removed.
    """
    made = dict.fromkeys(("memory", "disk", "seconds", "rows"), 0.0)
    for kept in (p for p in state.pieces.values() if isinstance(p, AppendOnly) and p.total):
        capacity = float(getattr(kept, "capacity", math.inf))
        now, rows = float(kept.total - kept.first), float(min(decisions, capacity))
        each = kept.between(kept.first, kept.first + 1).nbytes
        made["memory"] += max(0.0, rows - now) * each
        older = min(saves, keep + 1) - 1  # checkpoints that are kept beside the newest
        whole = min(float(decisions), rows + older * decisions / max(1, saves))
        made["disk"] += (whole + older * min(CHUNK / 2, decisions)) * each
        made["rows"] += rows
        probe = kept.between(kept.first, min(kept.total, kept.first + CHUNK))
        writing, _ = _timed(lambda rows=probe: chunks._put(rows, folder))  # type: ignore[misc]
        again = saves * (min(CHUNK, decisions) / 2 - now)  # the measured checkpoint wrote what there was
        made["seconds"] += writing / len(probe) * max(0.0, decisions + again)
    return made


# -- words -----------------------------------------------------------------------------------------------------------
def _assumed(pace: Pace, result: Any, evaluations: int, saves: int, grown: dict[str, float]) -> list[str]:
    turn = f"A turn makes {pace.decisions:,.4g} decisions and {pace.updates:,.4g} updates."
    if pace.first[1] > 2 * pace.decisions:
        turn = (
            f"The first turn makes {pace.first[1]:,.0f} decisions and learns from nothing before that; each later one "
            f"makes {pace.decisions:.4g}."
        )
    length = statistics.fmean(result.lengths)
    replay = f", and {grown['rows']:,.0f} rows of replay beside them" if grown["rows"] else ""
    return [
        turn,
        f"{pace.turns:,} turns were measured, as they are; the policy, and so its episodes, were those of the start.",
        f"{evaluations} evaluations of {result.n} episodes, each played twice, of {length:,.0f} steps on average as in "
        f"the one that was measured: where a better policy plays longer episodes, evaluation takes longer.",
        f"{saves} checkpoints, each as long as the one that was measured{replay}.",
        "Starting up and the page at the end, a few seconds, are not counted.",
    ]


def _room(highest: float) -> list[str]:
    free = memory_free()
    if free is None or highest <= (room := free + memory_used()):
        return []
    return [
        f"The run needs about {size_words(int(highest))} of memory, and {size_words(room)} are there: keep fewer "
        "transitions (collect.capacity), collect a shorter horizon, or step fewer environments."
    ]
