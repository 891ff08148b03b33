"""The loop. It never names a method."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.core.batch import Batch
from trimtab.core.check import check, pieces_of
from trimtab.core.closure import Closure
from trimtab.core.copies import Kept
from trimtab.core.errors import MethodError, nearest
from trimtab.core.kit import Kit
from trimtab.core.method import Method, Track
from trimtab.core.state import COUNTERS, State
from trimtab.core.stopwatch import NOTHING, phase
from trimtab.core.terms import split, units


@dataclass(frozen=True)
class Step:
    """What one turn gives: its batch, its averaged numbers, and the whole state (`save(step.state, folder)`)."""

    turn: int
    batch: Batch
    logs: dict[str, float]
    state: State


def begin(method: Method, environment: Any, models: Mapping[str, nn.Module], *, seed: int = 0) -> State:
    """The state before the first turn. Raises MethodError when method, models and environment do not fit."""
    check(method, models)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    named = dict(models)
    rules = {k: rule for m in (method, *(p.method for p in method.phases)) for k, rule in m.copies.items()}
    copies: dict[str, Kept] = {}
    for name, rule in rules.items():
        source = rule.source
        while source not in named:  # a copy of a copy: at the start they are all the model
            source = rules[source].source
        copies[name] = Kept.of(name, rule, named[source])
    state = State(seed, method.fingerprint(), method.name, named, copies, environment)
    for m in [p.method for p in method.phases] or [method]:  # a maker sees the method that its piece stands in
        make_state(state, m)
    return state


def make_state(state: State, method: Method, *, only: str | None = None) -> None:
    """Build what the pieces declared; `only` rebuilds that of tracks that train one model."""
    kit = Kit(state, method, None, False)
    for track, piece in pieces_of(method):
        scope = track.name if track else ""
        for key, make in piece.state.items():
            name = f"{scope}/{key}"
            if name not in state.pieces or (only and track and track.trains == only):
                kit.scope, kit.model = scope, track.trains if track else "policy"
                state.pieces[name] = make(kit, piece.options)


def run(
    method: Method,
    environment: Any,
    models: Mapping[str, nn.Module] | nn.Module,
    *,
    until: Mapping[str, int] | int,
    seed: int = 0,
    state: State | None = None,
    memory: int | None = None,
    debug: bool = False,
) -> Iterator[Step]:
    """Run `method`, yielding after every turn: `for step in run(...)` is the extension API.

    until: turns, or budgets by counter: `{"decisions": 100_000}` (turns, updates, decisions, rows; first one reached).
    memory: rows per forward and backward pass; changes nothing beyond rounding. None: all of them, or as many as the
    policy reads well at once (`rows_at_once`). state: go on from here.
    debug: hold every piece to its declared columns and forbid it to change parameters.
    """
    budget = {"turns": until} if isinstance(until, int) else dict(until)
    for name in budget:
        if name not in COUNTERS:
            raise MethodError(f"until={name!r} is not counted. {nearest(name, COUNTERS)}")
    if memory is not None and (not isinstance(memory, int) or memory < 1):
        raise MethodError(
            f"memory={memory!r} must be a whole number of rows, at least 1, or None to leave it to the policy"
        )
    named = {"policy": models} if isinstance(models, nn.Module) else models
    state = state if state is not None else begin(method, environment, named, seed=seed)
    if state.fingerprint != method.fingerprint():
        raise MethodError(f"this state is of {state.method} ({state.fingerprint}), not of {method.name}; begin anew")
    state.clock.budget = budget
    while not state.clock.reached(budget):
        kit = Kit(state, enter(state, method), memory, debug)
        refresh(state, kit, "turn")
        batch = collected(kit)
        updates(state, kit, batch)
        state.clock.turns += 1
        state.clock.rows += len(batch)
        state.clock.decisions += kit.decisions(batch)
        for track in kit.method.tracks:
            kit.scope, kit.model = track.name, track.trains
            for p in track.of("probe"):
                with phase("probe"):
                    kit.annotate(p, batch)
        kit.scope, kit.model = "", "policy"
        logs = kit.drain()
        refresh(state, kit, "end", logs)
        yield Step(state.clock.turns, batch, logs, state)


def collected(kit: Kit) -> Batch:
    """Collect one batch and run the shared batch-scope pieces on it, stage by stage."""
    shared = kit.method.pieces
    with torch.no_grad(), phase("collect"):
        (collect,) = (p for p in shared if p.stage == "collect")
        batch = collect(kit)
    if "mask" in batch and "keep" not in batch:
        batch = batch.put(keep=batch["mask"])
    per_batch = kit.method.passes * (1 if kit.method.rows is None else -(-len(batch) // kit.method.rows))
    learners = [t for t in kit.method.tracks if t.trains == "policy"]
    kit.single = per_batch == 1 and len(learners) == 1 and _one_gradient(learners[0])
    for stage in ("annotate", "credit", "select"):
        for p in shared:
            if p.stage == stage and p.at == "batch":
                with phase(stage):
                    batch = kit.annotate(p, batch)
    return batch


def updates(state: State, kit: Kit, batch: Batch) -> None:
    """All updates of one batch: passes x parts, each with its shared update-scope pieces, then its tracks."""
    method = kit.method
    ids = None if method.rows is None else units(batch, _unit(method))
    if method.rows is not None:  # what holds for the batch need not be asked of each of its parts
        for name in ("source", "mask", "keep"):
            batch.same(name)
    stopped: set[str] = set()
    for sweep in range(method.passes):
        parts: list[Any] = [None] if ids is None else split(ids, method.rows, kit.rng("shuffle"))
        cuts = [batch] if len(parts) == 1 else batch.pick(torch.cat(parts)).cuts([len(part) for part in parts])
        for i, rows in enumerate(cuts):
            last = sweep == method.passes - 1 and i == len(parts) - 1
            rows = scoped(kit, rows, method.pieces, "policy")
            for track in method.tracks:
                due = state.clock.updates % track.every == 0 if track.on == "update" else last
                if due and track.name not in stopped and track.trains not in state.phases.frozen:
                    step(state, kit, track, rows if track.on == "update" else batch, stopped)
            state.clock.updates += 1
            if stopped and stopped >= {t.name for t in method.tracks}:
                return


def step(state: State, kit: Kit, track: Track, rows: Batch, stopped: set[str]) -> None:
    """One optimiser step of one track."""
    kit.scope, kit.model = track.name, track.trains
    with phase(track.name) if len(kit.method.tracks) > 1 else NOTHING:
        rows = scoped(kit, rows, track.pieces, track.trains)
        with phase("update"):
            closure = Closure(kit, track, rows)
            logs, stop = track.update(kit, closure)
    prefix = "" if len(kit.method.tracks) == 1 and state.phases.index < 0 else f"{track.name}/"
    for name, value in logs.items():
        kit.log(prefix + name, value)
    if stop:
        stopped.add(track.name)
    refresh(state, kit, "after", source=track.trains)
    kit.scope, kit.model = "", "policy"


def scoped(kit: Kit, rows: Batch, pieces: tuple[Any, ...], model: str) -> Batch:
    """Run the update-scope annotate, credit and select pieces: they see all rows of the update, without gradient."""
    now: Any = None
    for stage in ("annotate", "credit", "select"):
        for p in pieces:
            if p.stage != stage or (p.at == "batch" and not kit.scope):
                continue
            with phase(stage):
                if p.union("wants"):
                    wants = frozenset().union(*(q.union("wants") for q in pieces if q.stage in _NO_GRAD))
                    now = kit.evaluate_ahead(model, rows, wants) if now is None or len(now) == 0 else now
                    rows = kit.annotate(p, rows, now)
                else:
                    rows = kit.annotate(p, rows, *([{}] if p.at == "update" else []))
    return rows


_NO_GRAD = ("annotate", "credit", "select")


def refresh(state: State, kit: Kit, moment: str, logs: dict[str, float] | None = None, source: str = "") -> None:
    """Let the copies that follow their source at this moment catch up; those made of other copies come last."""
    due = [k for k in state.copies.values() if k.rule.moment == moment and source in ("", k.rule.follows)]
    if not due:
        return
    with phase("copies", brief=True):
        for kept in sorted(due, key=lambda k: k.rule.kind == "mix"):
            if any(kept.rule == rule for rule in kit.method.copies.values()):
                kept.refresh(state.lookup(), kit, logs)


def enter(state: State, method: Method) -> Method:
    """The method of the current phase; entering one runs its actions and its `at_phase` copies, once."""
    if not method.phases:
        return method
    phases = state.phases
    while phases.index < 0 or (
        phases.index + 1 < len(method.phases) and state.clock.reached(method.phases[phases.index].until, phases.since)
    ):
        phases.index += 1
        phases.since = state.clock.counts()
        phase = method.phases[phases.index]
        refresh(state, Kit(state, phase.method, None, False), "phase")  # first: an action may make the source new
        for action in phase.enter:
            action(state, phase.method)
    return method.phases[phases.index].method


def _one_gradient(track: Track) -> bool:
    """Whether its update, with every wrap around it, asks for one gradient at the current parameters."""
    return all(p.one_gradient for p in track.update.walk() if p.stage == "update")


def _unit(method: Method) -> str:
    losses = [p for t in method.tracks for p in t.of("loss")]
    return next((p.core.options["unit"] for p in losses if p.core.options["unit"] != "row"), "row")


def rows_where(batch: Batch, column: str, value: float) -> Tensor:
    """Rows whose `[N]` column equals `value`, as a bool mask: for an update that needs part of its rows."""
    made: Tensor = batch[column] == value
    return made
