"""A run as a folder: build what was asked, loop, evaluate, save, show, report; stop and go on exactly."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from trimtab import __version__
from trimtab.core.batch import Batch
from trimtab.core.errors import CheckpointError, DiskError, MethodError, TrimtabError
from trimtab.core.loop import Step, begin, run
from trimtab.core.method import Method, show
from trimtab.core.registry import parse
from trimtab.core.state import State, checkpoints, load, save
from trimtab.core.terms import rows_of
from trimtab.evaluation import Evaluation, Evaluator, answer_length, whole_numbers
from trimtab.machine import threads_for
from trimtab.report.folder import RunFolder
from trimtab.report.intervals import mean_interval
from trimtab.report.live import LiveView
from trimtab.report.tensorboard import TensorBoard, needs_tensorboard
from trimtab.report.watchers import Watchers
from trimtab.report.words import about_loss
from trimtab.runs.commands import command, one_budget
from trimtab.runs.forecast import disk_notes
from trimtab.runs.interrupt import interruptible
from trimtab.runs.limits import check_numbers, check_written
from trimtab.runs.literals import literal
from trimtab.runs.salvage import export, saved_if_not_finite, standing

SMALL = ("nano", "tiny")


@dataclass(frozen=True)
class Request:
    """What a user asked for; written to `config.json`, and enough to rebuild the run.

    steps: turns of the loop. decisions: instead of steps, stop after the first turn that reaches this many decisions of
    our policy; schedules follow. set: `piece.option=value` pairs. rows, passes: rows per update and passes over a batch
    (None: the method's own). memory: rows in memory at once. eval_every, save_every: turns between evaluations and
    checkpoints. checkpointing: see `load_policy`. eval_env: another environment to be held out on, with the same reward
    and prompt. eval_samples, eval_k ("1,4"), eval_temperature: see `Evaluator`. keep: checkpoints kept. threads: 0
    chooses. tensorboard: also write event files.

    Raises TrimtabError for a count that cannot be, and for options of the evaluation that contradict each other.
    """

    method: str
    policy: str
    env: str
    out: str
    steps: int = 60
    decisions: int | None = None
    seed: int = 0
    set: tuple[str, ...] = ()
    lora: int = 0
    dtype: str = "auto"
    checkpointing: bool = False
    chat: bool | None = None
    reward: str | None = None
    prompt: str | None = None
    rows: int | None = None
    passes: int | None = None
    memory: int | None = None
    eval_every: int = 10
    eval_problems: int = 50
    eval_env: str | None = None
    eval_samples: int = 1
    eval_k: str = ""
    eval_temperature: float = 0.0
    save_every: int = 25
    keep: int = 2
    threads: int = 0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        check_numbers(self)
        self.evaluator()

    @property
    def budget(self) -> dict[str, int]:
        """What the run may use, by counter of the clock."""
        return {"turns": self.steps} if self.decisions is None else {"decisions": self.decisions}

    def evaluator(self, environment: Any = None, new_tokens: int = 16) -> Evaluator:
        """How this request wants its policy evaluated."""
        k = whole_numbers(self.eval_k)
        problems, samples = self.eval_problems, self.eval_samples
        return Evaluator(environment, problems, new_tokens, self.eval_temperature, samples, k)


@dataclass
class Experiment:
    """What a request builds: the method with every setting applied, its environment and its policy.

    exam: the environment that the policy is evaluated on; the training one unless another was asked for.
    """

    request: Request
    method: Method
    environment: Any
    policy: Any
    exam: Any

    def evaluate(self) -> Evaluation:
        return self.request.evaluator(self.exam, answer_length(self.method))(self.policy)

    def close(self) -> None:
        """End the processes of the environments."""
        self.environment.close()
        self.exam.close()


def settle(request: Request) -> Request:
    """The request with its number of threads decided: all idle cores for a real model, one for the small ones."""
    return request if request.threads else replace(request, threads=threads_for(request.policy in SMALL))


def configured(request: Request) -> Method:
    """The method of a request, with its `set` pairs and batch words applied. Raises MethodError with the mistake."""
    method = parse(request.method)
    words = {"rows": request.rows, "passes": request.passes}
    for name, value in words.items():
        if value is not None:
            method = method.but(**{name: value})
    for pair in request.set:
        path, equals, text = pair.partition("=")
        if not equals:
            raise MethodError(f"--set {pair!r} is not of the form piece.option=value, for example update.lr=1e-5")
        method = method.set(path.strip(), literal(text))
    return method


def build(request: Request) -> Experiment:
    """Everything a run needs, fresh. Raises a TrimtabError that says what cannot be had and what can."""
    from transformers.utils import logging as quiet

    from trimtab.environments.text import load_environment
    from trimtab.policies.builtin import load_policy

    quiet.disable_progress_bar()
    torch.set_num_threads(max(1, request.threads))
    method = configured(request)
    rules: dict[str, Any] = {"seed": request.seed, "reward": request.reward, "prompt": request.prompt}
    environment = load_environment(request.env, **rules)
    exam = environment if request.eval_env is None else load_environment(request.eval_env, **rules)
    policy = load_policy(
        request.policy, lora=request.lora, dtype=request.dtype, chat=request.chat, seed=request.seed,
        checkpointing=request.checkpointing,
    )  # fmt: skip
    return Experiment(request, method, environment, policy, exam)


def config(made: Experiment) -> dict[str, Any]:
    """What `config.json` holds: the request, everything resolved, and the versions."""
    import transformers

    request = made.request
    return {
        "command": command(request),
        "method": made.method.name,
        "policy": made.policy.describe(),
        "environment": made.environment.describe(),
        "seed": request.seed,
        "until": request.budget,
        "request": asdict(request),
        "resolved": {k: show(v).strip("'") for k, v in made.method.flatten().items()},
        "fingerprint": made.method.fingerprint(),
        "versions": {
            "trimtab": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


# -- running -----------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What the outcome is made of."""

    seconds: float = 0.0
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
    state = begin(made.method, made.environment, {"policy": made.policy}, seed=request.seed)
    folder = RunFolder(request.out).create(config(made))
    return _guarded(made, state, folder, Tally(), mode)


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
    state = begin(made.method, made.environment, {"policy": made.policy}, seed=request.seed)
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
        stable = ("mean", "low", "high", "n", "pass_at")
        tally.before, tally.after = ({k: seen[i][k] for k in stable if k in seen[i]} for i in (0, -1))
    return _guarded(made, state, folder, tally, mode, notes=differences)


def request_of(folder: RunFolder) -> Request:
    """The request that a run folder was made from."""
    given = check_written(Request, folder.config().get("request"), folder.path / "config.json")
    return Request(**{**given, "set": tuple(given.get("set", ())), "out": str(folder.path)})


def _guarded(made: Experiment, state: State, folder: RunFolder, tally: Tally, mode: str, **more: Any) -> dict[str, Any]:
    """Run; a refusal in the middle leaves a report, and says where the run stands and how to go on."""
    try:
        return _go(made, state, folder, tally, mode, **more)
    except TrimtabError as error:
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
    title, lead = f"{made.method.name} on {request.env}", about_loss(made.method.flatten())
    ((unit, until),) = request.budget.items()
    view = Watchers(LiveView(until, unit, title=title, mode=mode, lead=lead))  # type: ignore[arg-type]
    if request.tensorboard:
        view.add(TensorBoard(folder.tensorboard, turn=state.clock.turns))
    with folder, view, interruptible() as interrupted:
        for text in [*(notes or []), *disk_notes(state, folder.checkpoints, request.keep)]:
            view.note(text)
        if not tally.before:
            _record_evaluation(made, folder, view, tally, state, stage="before")
        models = {"policy": made.policy}
        loop = run(made.method, made.environment, models, until=request.budget, state=state, memory=request.memory)
        started = time.perf_counter()
        for step in saved_if_not_finite(loop, state, folder, request.keep):
            tally.seconds += time.perf_counter() - started
            _record_turn(made, folder, view, tally, step)
            last = state.clock.reached(request.budget)
            if last or step.turn % request.eval_every == 0:
                _record_evaluation(made, folder, view, tally, state, "after" if last else f"turn {step.turn}")
            if last or interrupted() or step.turn % request.save_every == 0:
                folder.sync()
                save(state, folder.checkpoints, keep=request.keep)
            if interrupted() and not last:
                tally.stopped = True
                break
            started = time.perf_counter()
        if not tally.stopped:
            export(made.policy, folder)
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
    }


def _record_turn(made: Experiment, folder: RunFolder, view: Watchers, tally: Tally, step: Step) -> None:
    clock = {"seconds": round(tally.seconds, 3), **step.state.clock.counts()}
    logs = {**of_batch(step.batch, step.logs), **step.logs}
    folder.write_metrics({"turn": step.turn, **{k: v for k, v in clock.items() if k != "turns"}, **logs})
    if step.turn == 1 or step.turn % made.request.eval_every == 0:
        folder.write_samples(group_sample(made, step))
    view.update(logs, clock)


def _record_evaluation(
    made: Experiment, folder: RunFolder, view: Watchers, tally: Tally, state: State, stage: str
) -> None:
    result, turn = made.evaluate(), state.clock.turns
    clock = {"turn": turn, "decisions": state.clock.decisions, "seconds": round(tally.seconds, 3)}
    folder.write_eval({**clock, **result.record()})
    if stage in ("before", "after"):
        folder.write_samples({"turn": turn, "split": "eval", "stage": stage, **t} for t in result.transcripts)
    tally.after = result.summary()
    tally.before = tally.before or tally.after
    view.evaluated(result.mean, result.low, result.high, result.n)


def of_batch(batch: Batch, logs: Mapping[str, float]) -> dict[str, float]:
    """Numbers read off a turn's batch: the reward with its interval, and the mean age.

    A collect that dropped rows (dynamic sampling) has logged the reward of all it made; what is left has another mean,
    and no interval is given then.
    """
    made: dict[str, float] = {}
    played = rows_of(batch, "policy")  # demonstrations and replayed rows are not this policy's outcome
    if "reward" in batch and bool(played.any()):
        mean, low, high = mean_interval(batch.score()[played].tolist())
        made["reward"] = mean
        if abs(mean - logs.get("reward", mean)) < 1e-4:
            made |= {"reward_low": low, "reward_high": high}
    if "age" in batch:
        made["age"] = float(batch.age.double().mean())
    return made


def group_sample(made: Experiment, step: Step) -> Iterator[Mapping[str, Any]]:
    """One group of a batch as transcripts, each token with its credit: the first whose credit is not all zero."""
    batch = step.batch
    if "group" not in batch or "advantage" not in batch:
        return
    taught = (batch.advantage * batch.mask != 0).any(1).nonzero().squeeze(1)
    first = batch.group[int(taught[0]) if len(taught) else 0]
    for i in (batch.group == first).nonzero().squeeze(1).tolist():
        mask = batch.mask[i].bool()
        yield {
            "turn": step.turn,
            "group": int(batch.group[i]),
            "prompt": batch.question[i],
            "response": batch.response[i],
            "reward": float(batch.score()[i]),
            "advantage": float(batch.advantage[i][mask].mean()),
            "tokens": [made.policy.decode([t]) for t in batch.action[i][mask].tolist()],
            "credit": batch.advantage[i][mask].tolist(),
        }


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
    if env is not None:
        request = replace(request, env=env, eval_env=None, reward=None, prompt=None)
    made = build(request)
    started = time.perf_counter()
    before = made.evaluate().summary()
    after = before
    if checkpoints(folder.checkpoints):
        original = build(replace(trained, threads=request.threads))
        state = begin(original.method, original.environment, {"policy": original.policy}, seed=request.seed)
        load(state, folder.checkpoints)
        after = replace(made, policy=original.policy).evaluate().summary()
    seconds = round(time.perf_counter() - started, 3)
    return {"run": str(folder.path), "seconds": seconds, "eval": {"before": before, "after": after}}
