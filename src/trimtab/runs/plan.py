"""What a run will take, from a few of its own turns made small: seconds, memory, disk."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trimtab.core.disk import size_words
from trimtab.core.errors import MethodError
from trimtab.core.loop import run
from trimtab.core.method import Method
from trimtab.core.state import State, save
from trimtab.core.stopwatch import Span, measuring
from trimtab.policies.sampler import ROWS_AT_ONCE
from trimtab.runs.forecast import checkpoint_bytes
from trimtab.runs.linear import Amounts, cost, prices
from trimtab.runs.meters import beside, machine_words, memory_free, memory_used, peak_since
from trimtab.runs.plan_control import planned
from trimtab.runs.profile import REST
from trimtab.runs.request import Request, settle
from trimtab.runs.worlds import Experiment, build, world_of

# Options that say how many problems a batch has. A batch is made small by them alone, so that lengths, groups and
# everything else stay what they will be.
SIZES = ("collect.prompts", "collect.pairs")
# The first turns have this share of a batch, each later one twice as many problems as the one before: until a whole
# batch was measured or the next one would take these seconds. Costs are fitted to the last few, so that little is
# extrapolated: small products are slower, for their size, than large ones.
FIRST, SPEND, FITTED = 1 / 16, 30.0, 3
# What the seconds of a phase are made of; of the others a part is fixed and a part grows with the problems.
MADE_OF = {
    "decode": ("steps", "decisions"),
    "forward": ("passes", "read"),
    "backward": ("passes", "read"),
    "evaluate": ("turns", "read"),
    "optimizer": ("updates",),
}
USUAL = ("turns", "problems")
# Of the memory that is free, a suggested --memory uses so much at most.
SAFE = 0.85

Path_ = tuple[str, ...]


@dataclass(frozen=True)
class Turn:
    """What one turn took. sizes: problems, rows, decisions, width (longest response), updates, batches (collects).

    spent: `(amounts, seconds)` of every phase by path. read: share of rows x passes that a loss read. peaks: bytes
    while collecting and while learning, 0 where not known. at_once: rows that the policy wants to read together, where
    it was asked.
    """

    sizes: dict[str, float]
    spent: dict[Path_, tuple[dict[str, float], float]]
    read: float
    peaks: dict[str, int]
    at_once: float | None = None

    @property
    def seconds(self) -> float:
        return sum(seconds for _, seconds in self.spent.values())


def plan(request: Request) -> dict[str, Any]:
    """Predict a run from turns of it on small batches, one evaluation and one checkpoint; nothing is kept.

    Turns of a control method are taken as they are (`plan_control`).
    Returns seconds_a_turn, turns, seconds (training, evaluation, checkpoints, total), peak_bytes, checkpoint_bytes,
    disk_bytes, what was assumed, notes on what may not fit, the calibration, and whether other work disturbed it.
    Raises what building the request raises.
    """
    made = build(settle(request))
    try:
        with beside() as others:
            found = planned(made) if world_of(request.method) == "control" else _planned(made)
    finally:
        made.close()
    if others["busy"]:
        found["notes"].append(
            f"Other work kept {max(others['before'], others['after']):.1f} cores busy while this was measured: on an "
            f"idle machine the run may be much faster, and beside more work slower. Plan again when it is quiet."
        )
    return {**found, "beside": others, "busy": others["busy"]}


def _planned(made: Experiment) -> dict[str, Any]:
    request, method, started = made.request, made.method, time.perf_counter()
    state, turns, whole = calibrated(made)
    evaluating, evaluation_peak = _timed(lambda: made.evaluate(state))
    with tempfile.TemporaryDirectory() as folder:
        saving, save_peak = _timed(lambda: save(state, Path(folder), keep=1))
    sizes = scaled(turns, whole, method)
    if request.decisions is not None and not sizes["decisions"]:
        raise MethodError(f"{method.name} makes no decisions, so decisions={request.decisions} would never end it")
    memory = request.memory or turns[-1].at_once
    phases = predicted(turns, sizes, method, memory)
    each = sum(phases.values())
    ((unit, most),) = request.budget.items()
    budget = most if unit == "turns" else math.ceil(most / sizes["decisions"])
    evaluations, saves = 1 + request.evaluations.count(budget), request.saves.count(budget)
    seconds = {"training": each * budget, "evaluation": evaluating * evaluations, "checkpoints": saving * saves}
    peaks = peak(turns, sizes, method, memory)
    seen = max((size for t in turns for size in t.peaks.values()), default=0)  # a batch is no smaller than its parts
    highest = max(*peaks.values(), seen, evaluation_peak, save_peak)
    size, model = checkpoint_bytes(state), sum(t.nbytes for m in made.models.values() for t in m.state_dict().values())
    return {
        "method": method.name,
        "policy": made.describe()["policy"],
        "environment": request.env,
        "seconds_a_turn": each,
        "turns": budget,
        "seconds": {**seconds, "total": sum(seconds.values())},
        "phases": {"/".join(path): value for path, value in phases.items()},
        "peak_bytes": highest,
        "checkpoint_bytes": size,
        "disk_bytes": size * min(saves, request.keep + 1) + model,
        "sizes": sizes,
        "assumed": _assumed(turns, sizes, whole, evaluations, saves),
        "notes": _room(turns, sizes, method, memory, highest),
        "calibration": {
            "seconds": time.perf_counter() - started,
            "turns": [{**t.sizes, "seconds": t.seconds, "peaks": t.peaks} for t in turns],
        },
        "machine": machine_words(torch.get_num_threads()),
    }


# -- measuring -----------------------------------------------------------------------------------------------------
def calibrated(made: Experiment) -> tuple[State, list[Turn], int]:
    """The state afterwards, the measured turns, and the problems of a whole batch (0: it cannot be made smaller)."""
    method = made.method
    path = next((p for p in SIZES if p in method.flatten()), "")
    whole = int(method.get(path)) if path else 0
    state = made.begin()
    size, spent, turns = max(1, math.ceil(whole * FIRST)), 0.0, []
    measured(made, state, path, size)  # the first one warms up
    while True:
        turns.append(measured(made, state, path, size))
        last, spent = turns[-1].seconds, spent + turns[-1].seconds
        if size == whole or (not path and len(turns) == FITTED) or (len(turns) > 1 and spent + 2 * last > SPEND):
            break
        size = min(whole, 2 * size) if path else size
    state.fingerprint = method.fingerprint()
    return state, turns[-FITTED:], whole


def measured(made: Experiment, state: State, path: str, size: int) -> Turn:
    """One turn of the method, with so many problems where `path` names the option."""
    method = made.method.set(path, size) if path else made.method
    state.fingerprint = method.fingerprint()  # only the number of problems differs: pieces and their state are the same
    before = state.clock.counts()
    # A budget far above what is measured: schedules stay at their start.
    most = 1000
    loop = run(method, made.environment, made.models, until=most, state=state, memory=made.request.memory)
    with measuring(gauge=peak_since) as watch, watch.phase("turn"):
        step = next(loop)
    spent = {name: n - before[name] for name, n in state.clock.counts().items()}
    prompt = step.batch["prompt_mask"].bool().any(0).sum() if "prompt_mask" in step.batch else 0
    sizes = {
        "problems": float(size),
        "rows": float(len(step.batch)),
        "decisions": float(spent["decisions"]),
        "response": float(step.batch["mask"].sum()),
        "prompt": float(prompt),
        "width": float(step.batch["mask"].sum(1).max()),
        "updates": float(spent["updates"]),
        "batches": step.logs.get("generated_batches", 1.0),
    }
    return turn_of(watch.root.parts["turn"], sizes, method)


def turn_of(span: Span, sizes: dict[str, float], method: Method) -> Turn:
    """A measured turn from the span of its watch."""
    spent, read, asked, at_once = {}, 0.0, 0.0, 0.0
    for path, part in span.walk():
        asked, at_once = asked + part.counts.get("asked", 0.0), at_once + part.counts.get("at_once", 0.0)
        if path[-1:] == ("forward",):
            read += part.counts.get("rows", 0.0)
        own = part.seconds - sum(p.seconds for p in part.parts.values())
        name = (*path, REST.get(path[-1] if path else "turn", "other")) if part.parts else path
        twin = span_at(span, (*path[:-1], "forward")) if path[-1:] == ("backward",) else part
        amounts = _amounts(name, sizes, method, part.calls, twin.counts.get("read", 0.0))
        spent[name] = (amounts, own)
    peaks: dict[str, int] = {name: span.parts[name].peak for name in ("collect", "update") if name in span.parts}
    return Turn(sizes, spent, read / (sizes["rows"] * method.passes), peaks, at_once / asked if asked else None)


def span_at(span: Span, path: Path_) -> Span:
    """The span below at this path; an empty one where there is none."""
    for name in path:
        span = span.parts.get(name, Span())
    return span


def _amounts(path: Path_, sizes: Mapping[str, float], method: Method, passes: float, read: float) -> dict[str, float]:
    """What the seconds of a phase are made of."""
    per = max(1, ROWS_AT_ONCE // int(method.flatten().get("collect.group", 1)))
    parts = math.ceil(sizes["problems"] / per)  # of a batch that is too large to be sampled at once
    known = {
        **sizes,
        "turns": 1.0,
        "steps": sizes["width"] * sizes["batches"] * parts,
        "passes": passes,
        "read": read,
    }
    return {name: known[name] for name in MADE_OF.get(path[-1], USUAL)}


def _timed(work: Any) -> tuple[float, int]:
    """(seconds, peak bytes) of a piece of work."""
    with measuring(gauge=peak_since) as watch, watch.phase("work"):
        work()
    return watch.root.parts["work"].seconds, watch.root.parts["work"].peak


# -- predicting ----------------------------------------------------------------------------------------------------
def scaled(turns: Sequence[Turn], whole: int, method: Method) -> dict[str, float]:
    """The sizes of a turn on a whole batch: what grew with the problems grows on, lengths stay."""
    problems = whole or turns[-1].sizes["problems"]
    total = sum(t.sizes["problems"] for t in turns)
    grown = {name: sum(t.sizes[name] for t in turns) / total * problems for name in ("rows", "decisions")}
    updates = method.passes * (1 if method.rows is None else math.ceil(grown["rows"] / method.rows))
    widest = {name: max(t.sizes[name] for t in turns) for name in ("prompt", "width")}
    batches = statistics.fmean(t.sizes["batches"] for t in turns)
    return {"problems": float(problems), **grown, **widest, "updates": float(updates), "batches": batches}


def predicted(
    turns: Sequence[Turn], sizes: Mapping[str, float], method: Method, memory: float | None
) -> dict[Path_, float]:
    """Seconds of every phase of a turn of these sizes, by the prices fitted to the measured turns."""
    live = statistics.fmean(t.read for t in turns)
    made = {}
    for path in dict.fromkeys(p for t in turns for p in t.spent):
        seen: list[tuple[Amounts, float]] = [t.spent[path] for t in turns if path in t.spent]
        learning = path[-1] in ("forward", "backward")
        rows, passes = sizes["rows"], 1.0
        if learning:
            rows = rows * live * method.passes
            passes = max(sizes["updates"], rows / (memory or math.inf))
        read = passes * read_by(rows / passes, sizes, learning and method.rows is not None)
        made[path] = cost(_amounts(path, sizes, method, passes, read), prices(seen))
    return made


def read_by(rows: float, sizes: Mapping[str, float], shuffled: bool) -> float:
    """Places that one pass over some rows of a batch reads: those of its responses, and of each distinct prompt once.

    Of `P` groups of `g` rows, `n` rows drawn at random (`shuffled`) meet about `P (1 - (1 - n / (P g))^g)`; rows in
    order meet `n / g`, at least one.
    """
    groups, all_rows = sizes["problems"], max(sizes["rows"], 1.0)
    group = all_rows / groups
    share = min(1.0, rows / all_rows)
    prompts = groups * (1 - (1 - share) ** group) if shuffled else max(1.0, rows / group)
    return rows * sizes["width"] + min(prompts, rows) * sizes["prompt"]


def peak(turns: Sequence[Turn], sizes: Mapping[str, float], method: Method, memory: float | None) -> dict[str, float]:
    """Peak bytes while collecting and while learning, on a whole batch."""
    made = {}
    for name in ("collect", "update"):
        if all(name in t.peaks for t in turns):
            price = _memory_price(turns, name, method, memory)
            made[name] = cost({"base": 1.0, "held": held(name, sizes, method, memory)}, price)
    return made or {"turn": 0.0}


def _memory_price(turns: Sequence[Turn], name: str, method: Method, memory: float | None) -> dict[str, float]:
    seen: list[tuple[Amounts, float]] = [
        ({"base": 1.0, "held": held(name, t.sizes, method, memory, t.read)}, t.peaks[name]) for t in turns
    ]
    return prices(seen)


def held(name: str, sizes: Mapping[str, float], method: Method, memory: float | None, read: float = 1.0) -> float:
    """Rows in memory at once: of one part of the sampling, or of one forward and backward pass."""
    if name == "collect":
        return min(sizes["rows"], ROWS_AT_ONCE)
    return min(sizes["rows"] * read, method.rows or math.inf, memory or math.inf)


# -- words ---------------------------------------------------------------------------------------------------------
def _assumed(turns: Sequence[Turn], sizes: Mapping[str, float], whole: int, evaluations: int, saves: int) -> list[str]:
    rows = sum(t.sizes["rows"] for t in turns)
    mean = sum(t.sizes["response"] for t in turns) / rows
    read = statistics.fmean(t.read for t in turns)
    small = ", ".join(f"{t.sizes['problems']:.0f}" for t in turns)
    return [
        f"Responses of {mean:.1f} tokens on average and {sizes['width']:.0f} at most, as in the {rows:.0f} rows that "
        f"were measured; a policy that learns to say more takes longer.",
        f"{read:.0%} of the rows teach something, as in these; rows whose loss is exactly zero are not read.",
        f"Turns of {small} problems were measured" + (f"; a whole one has {whole}." if whole else ", as they are."),
        f"{evaluations} evaluations and {saves} checkpoints, each as long as the one that was measured.",
    ]


_NOTHING = (
    "No row of the measured turns taught anything, so learning is missing from these figures: their problems are all "
    "too easy or all too hard for the policy. Try another --seed, or other problems."
)


def _room(
    turns: Sequence[Turn], sizes: Mapping[str, float], method: Method, memory: float | None, highest: float
) -> list[str]:
    """Sentences: when nothing was learned from, and when the run may not fit into memory, with the rows that would."""
    made = [] if any(t.read for t in turns) else [_NOTHING]
    free = memory_free()
    if free is None or highest <= (room := free + memory_used()):
        return made
    said = f"The run needs about {size_words(highest)} of memory, and {size_words(room)} are there."
    price = _memory_price(turns, "update", method, memory) if all("update" in t.peaks for t in turns) else {}
    rows = int((SAFE * room - price.get("base", 0.0)) / price["held"]) if price.get("held") else 0
    now = held("update", sizes, method, memory)
    if 1 <= rows < now:
        return [*made, f"{said} With --memory {rows} it should fit; that changes nothing beyond rounding."]
    return [*made, f"{said} Fewer rows in memory at once do not help: take shorter responses, or a smaller model."]


def lines(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """A plan as `(what, how much)`."""
    from trimtab.report.words import duration

    seconds = found["seconds"]
    yield "a turn", f"{found['seconds_a_turn']:.3g} s"
    if "first_turn" in found:  # control: what a turn is differs between methods
        first, made = found["first_turn"], found["sizes"]["decisions"]
        yield "a decision", f"{found['seconds_a_turn'] / made:.3g} s" if made else "none are made"
        yield f"the first turn, {first['decisions']:,} decisions", duration(first["seconds"])
    yield f"training, {found['turns']} turns", duration(seconds["training"])
    yield "evaluation", duration(seconds["evaluation"])
    yield "checkpoints", duration(seconds["checkpoints"])
    yield "together", duration(seconds["total"])
    yield "peak memory", size_words(found["peak_bytes"])
    yield "a checkpoint", size_words(found["checkpoint_bytes"])
    if found.get("replay_bytes"):
        yield "replay on disk", size_words(round(found["replay_bytes"]))
    yield "on disk", size_words(round(found["disk_bytes"]))
