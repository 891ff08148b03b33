"""A run as a folder: build what was asked, loop, evaluate, save, show, report; stop and go on exactly."""

from __future__ import annotations

import platform
import time
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from trimtab import __version__
from trimtab.core.errors import CheckpointError, DiskError, TrimtabError
from trimtab.core.loop import Step, run
from trimtab.core.method import show
from trimtab.core.state import State, checkpoints, load, save
from trimtab.report.course import Course
from trimtab.report.folder import RunFolder
from trimtab.report.live import LiveView
from trimtab.report.tensorboard import TensorBoard, needs_tensorboard
from trimtab.report.watchers import Watchers
from trimtab.report.words import about_loss, words_of
from trimtab.runs.commands import command, one_budget
from trimtab.runs.forecast import disk_notes
from trimtab.runs.interrupt import interruptible
from trimtab.runs.request import Request, request_of, settle
from trimtab.runs.salvage import export, saved_if_not_finite, standing
from trimtab.runs.worlds import Experiment, build, usual, world_of


def config(made: Experiment) -> dict[str, Any]:
    """What `config.json` holds: the request, everything resolved, and the versions."""
    request, described = made.request, made.describe()
    return {
        "command": command(request),
        "method": made.method.name,
        "world": world_of(request.method),
        "policy": described["policy"],
        "environment": described["environment"],
        "seed": request.seed,
        "until": request.budget,
        "request": asdict(request),
        "resolved": {k: show(v).strip("'") for k, v in made.method.flatten().items()},
        "fingerprint": made.method.fingerprint(),
        "versions": {
            "trimtab": __version__,
            "torch": torch.__version__,
            **described["versions"],
            "python": platform.python_version(),
        },
    }


# -- running -----------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What the outcome is made of. pending: the turns that no record tells of yet."""

    seconds: float = 0.0
    pending: list[dict[str, float]] = field(default_factory=list)
    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    stopped: bool = False


def train(request: Request, *, mode: str = "auto") -> dict[str, Any]:
    """Run a request in a new folder; returns `{"run", "seconds", "eval": {"before", "after"}, ...}`.

    mode: "auto" (live on a terminal), "plain", or "silent".
    """
    if request.tensorboard:
        needs_tensorboard()
    made = build(settle(request))
    state = made.begin()
    folder = RunFolder(request.out).create(config(made))
    made.keep(folder.path)
    return _guarded(made, state, folder, Tally(), mode, notes=made.notes())


def resume(
    path: str | Path, *, mode: str = "auto", steps: int | None = None, decisions: int | None = None
) -> dict[str, Any]:
    """Go on from the newest checkpoint of a run folder, to the same bits an uninterrupted run would have reached.

    steps, decisions: another total, of turns or of decisions (not both). Raises CheckpointError or
    RunFolderError with the reason when it cannot.
    """
    one_budget(steps, decisions)
    folder = RunFolder(path)
    request = request_of(folder)
    if steps is not None or decisions is not None:
        request = replace(request, steps=request.steps if steps is None else steps, decisions=decisions)
    if request.tensorboard:
        needs_tensorboard()
    made = build(request)
    state = made.begin()
    # A run that was killed before its first checkpoint has lost nothing but its first turns: they are made again.
    differences = load(state, folder.checkpoints) if checkpoints(folder.checkpoints) else []
    if state.seed != request.seed:
        raise CheckpointError(
            f"{folder.path}/config.json asks for seed={request.seed}, and the checkpoint is of seed={state.seed}; "
            f"put {state.seed} back, or start a new run"
        )
    folder.resume(state.clock.turns)
    seen, past = folder.evaluations(), folder.metrics()
    tally = Tally(seconds=past[-1]["seconds"] if past else 0.0)
    if seen:
        stable = ("mean", "low", "high", "n", "unit", "pass_at")
        tally.before, tally.after = ({k: seen[i][k] for k in stable if k in seen[i]} for i in (0, -1))
    return _guarded(made, state, folder, tally, mode, notes=differences)


def _guarded(made: Experiment, state: State, folder: RunFolder, tally: Tally, mode: str, **more: Any) -> dict[str, Any]:
    """Run; a refusal in the middle leaves a report, and says where the run stands and how to go on."""
    try:
        return _go(made, state, folder, tally, mode, **more)
    except (TrimtabError, OSError) as error:  # an environment may fail in ways that are not ours
        error.add_note(standing(folder))
        try:
            _report(folder)
        except DiskError as another:  # what stopped the run may stop the report: say both
            error.add_note(str(another))
        raise
    finally:
        made.close()


def _go(
    made: Experiment, state: State, folder: RunFolder, tally: Tally, mode: str, notes: list[str] | None = None
) -> dict[str, Any]:
    request = made.request
    records = usual(request.method).records
    title, lead = f"{made.method.name} on {request.env}", about_loss(made.method.flatten(), world_of(request.method))
    ((unit, until),) = request.budget.items()
    words, course = words_of(world_of(request.method)), Course.of(folder.metrics(), folder.evaluations())
    view = Watchers(LiveView(until, unit, title=title, mode=mode, lead=lead, words=words, course=course))  # type: ignore[arg-type]
    if request.tensorboard:
        view.add(TensorBoard(folder.tensorboard, turn=state.clock.turns))
    with folder, view, interruptible() as interrupted:
        for text in [*(notes or []), *disk_notes(state, folder.checkpoints, request.keep)]:
            view.note(text)
        if not tally.before:
            _record_evaluation(made, folder, view, tally, state, stage="before")
        loop = run(made.method, made.environment, made.models, until=request.budget, state=state, memory=request.memory)
        state.clock.budget = request.budget  # what is due follows from progress, also in the first turn after a resume
        started, before = time.perf_counter(), state.clock.progress
        for step in saved_if_not_finite(loop, state, folder, request.keep):
            tally.seconds += time.perf_counter() - started
            tally.pending.append(made.measured(step))
            last = state.clock.reached(request.budget)
            evaluating = last or request.evaluations.due(state.clock, before)
            saving = last or request.saves.due(state.clock, before)
            if evaluating or saving or records.due(state.clock, before):
                _record_turn(made, folder, view, tally, step)
            if step.turn == 1 or evaluating:
                folder.write_samples(made.sample(step))
            if evaluating:
                _record_evaluation(made, folder, view, tally, state, "after" if last else f"turn {step.turn}")
            tally.stopped = interrupted() and not last
            if tally.stopped and tally.pending:
                _record_turn(made, folder, view, tally, step)
            if saving or tally.stopped:
                folder.sync()
                save(state, folder.checkpoints, keep=request.keep)
            if tally.stopped:
                break
            started, before = time.perf_counter(), state.clock.progress
        if not tally.stopped:
            export(made, folder, state)
    return _finish(folder, tally, state)


def _report(folder: RunFolder) -> Path:
    from trimtab.report.html import write_report

    return write_report(folder.path)


def _finish(folder: RunFolder, tally: Tally, state: State) -> dict[str, Any]:
    report = _report(folder)
    return {
        "run": str(folder.path),
        "seconds": round(tally.seconds, 3),
        "eval": {"before": tally.before, "after": tally.after},
        "turns": state.clock.turns,
        "finished": not tally.stopped,
        "report": str(report),
        "findings": folder.read_json("findings")["findings"],
    }


def _record_turn(made: Experiment, folder: RunFolder, view: Watchers, tally: Tally, step: Step) -> None:
    """One record of the turns since the last one: the mean of every number over those that logged it."""
    clock = {"seconds": round(tally.seconds, 3), **step.state.clock.counts()}
    known = dict.fromkeys(name for turn in tally.pending for name in turn)
    logs = {name: fmean(turn[name] for turn in tally.pending if name in turn) for name in known}
    tally.pending.clear()
    folder.write_metrics({"turn": step.turn, **{k: v for k, v in clock.items() if k != "turns"}, **logs})
    view.update(logs, clock)


def _record_evaluation(
    made: Experiment, folder: RunFolder, view: Watchers, tally: Tally, state: State, stage: str
) -> None:
    result, turn = made.evaluate(state), state.clock.turns
    clock = {"turn": turn, "decisions": state.clock.decisions, "seconds": round(tally.seconds, 3)}
    folder.write_eval({**clock, **result.record()})
    if stage in ("before", "after"):
        folder.write_samples({"turn": turn, "split": "eval", "stage": stage, **t} for t in result.transcripts)
    tally.after = result.summary()
    tally.before = tally.before or tally.after
    view.evaluated(result.mean, result.low, result.high, result.n)


def evaluate_folder(
    path: str | Path, *, problems: int | None = None, env: str | None = None, **options: Any
) -> dict[str, Any]:
    """Evaluate the policy of a run folder on held-out problems: before (its start) and after (its newest checkpoint).

    env: another environment to be held out on, with its own scorer. options: samples, k ("1,4") and temperature, as in
    `Evaluator`. What is left out (None) is as in training. Nothing in the folder changes.
    """
    folder = RunFolder(path)
    trained = request_of(folder)
    asked = {"eval_problems": problems, **{f"eval_{name}": value for name, value in options.items()}}
    request = replace(trained, **{name: value for name, value in asked.items() if value is not None})
    if env is not None and world_of(trained.method) == "control":  # its networks fit the spaces that it trained in
        request = replace(request, eval_env=env)
    elif env is not None:
        request = replace(request, env=env, eval_env=None, reward=None, prompt=None)
    started = time.perf_counter()
    with closing(build(request)) as made:
        state = made.begin()
        before = after = made.evaluate(state).summary()
        if checkpoints(folder.checkpoints):
            with closing(build(replace(trained, threads=request.threads))) as original:
                state = original.begin()
                load(state, folder.checkpoints)
                after = made.evaluate(state).summary()
    seconds = round(time.perf_counter() - started, 3)
    return {"run": str(folder.path), "seconds": seconds, "eval": {"before": before, "after": after}}
