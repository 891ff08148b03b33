"""A run as a folder: build what was asked, loop, evaluate, save, show, report; stop and go on exactly."""

from __future__ import annotations

import platform
import shlex
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
from trimtab.evaluation import Evaluation, evaluate
from trimtab.interrupt import interruptible
from trimtab.limits import check_numbers, check_written
from trimtab.machine import threads_for
from trimtab.report.folder import RunFolder
from trimtab.report.intervals import mean_interval
from trimtab.report.live import LiveView
from trimtab.report.tensorboard import TensorBoard, needs_tensorboard
from trimtab.report.watchers import Watchers
from trimtab.report.words import about_loss
from trimtab.salvage import export, saved_if_not_finite, standing

SMALL = ("nano", "tiny")


@dataclass(frozen=True)
class Request:
    """What a user asked for; written to `config.json`, and enough to rebuild the run.

    steps: turns of the loop. set: `piece.option=value` pairs. rows, passes: rows per update and passes over a batch
    (None: the method's own). memory: rows in memory at once. eval_every, save_every: turns between evaluations and
    checkpoints. keep: checkpoints kept. threads: 0 chooses. tensorboard: also write event files.
    """

    method: str
    policy: str
    env: str
    out: str
    steps: int = 60
    seed: int = 0
    set: tuple[str, ...] = ()
    lora: int = 0
    dtype: str = "auto"
    chat: bool | None = None
    reward: str | None = None
    prompt: str | None = None
    rows: int | None = None
    passes: int | None = None
    memory: int | None = None
    eval_every: int = 10
    eval_problems: int = 50
    save_every: int = 25
    keep: int = 2
    threads: int = 0
    tensorboard: bool = False


@dataclass
class Experiment:
    """What a request builds: the method with every setting applied, its environment and its policy."""

    request: Request
    method: Method
    environment: Any
    policy: Any

    @property
    def new_tokens(self) -> int:
        """Length of an evaluated answer: that of the method's rollouts, else 16."""
        known = self.method.flatten()
        return int(known.get("collect.new_tokens", 16))

    def evaluate(self) -> Evaluation:
        return evaluate(self.policy, self.environment, problems=self.request.eval_problems, new_tokens=self.new_tokens)


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


def literal(text: str) -> Any:
    """A value given on the command line: a Python literal, a schedule such as linear(1e-5, 0), else text."""
    import ast

    from trimtab.core import schedules
    from trimtab.core.piece import Schedule

    known = {n: v for n, v in vars(schedules).items() if isinstance(v, type) and issubclass(v, Schedule)}
    try:
        node = ast.parse(text.strip(), mode="eval").body
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in known:
            named = {k.arg: ast.literal_eval(k.value) for k in node.keywords if k.arg}
            return known[node.func.id](*[ast.literal_eval(a) for a in node.args], **named)
        return ast.literal_eval(node)
    except (SyntaxError, ValueError):
        return text.strip()
    except TypeError as e:
        raise MethodError(f"{text!r} is not a schedule that can be made: {e}") from None


def build(request: Request) -> Experiment:
    """Everything a run needs, fresh. Raises a TrimtabError that says what cannot be had and what can."""
    from transformers.utils import logging as quiet

    from trimtab.environments.text import load_environment
    from trimtab.policies.builtin import load_policy

    quiet.disable_progress_bar()
    torch.set_num_threads(max(1, request.threads))
    method = configured(request)
    environment = load_environment(request.env, seed=request.seed, reward=request.reward, prompt=request.prompt)
    policy = load_policy(request.policy, lora=request.lora, dtype=request.dtype, chat=request.chat, seed=request.seed)
    return Experiment(request, method, environment, policy)


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
        "until": {"turns": request.steps},
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


def command(request: Request) -> str:
    """The command line that repeats this run."""
    words = ["trimtab", "train", request.method]
    fresh = Request("", "", "", "")
    for name, value in asdict(request).items():
        flag = "--" + name.replace("_", "-")
        if name == "method" or value is None or (name not in ("policy", "env") and value == getattr(fresh, name)):
            continue
        if name == "set":
            for pair in value:
                words += ["--set", pair]
        elif name == "tensorboard":
            words.append(flag)
        else:
            words += [flag, str(value)]
    return shlex.join(words)


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
    check_numbers(request)
    if request.tensorboard:
        needs_tensorboard()
    made = build(settle(request))
    state = begin(made.method, made.environment, {"policy": made.policy}, seed=request.seed)
    folder = RunFolder(request.out).create(config(made))
    return _guarded(made, state, folder, Tally(), mode)


def resume(path: str | Path, *, mode: str = "auto", steps: int | None = None) -> dict[str, Any]:
    """Go on from the newest checkpoint of a run folder, to the same bits an uninterrupted run would have reached.

    steps: another total number of turns. Raises CheckpointError or RunFolderError with the reason when it cannot.
    """
    folder = RunFolder(path)
    request = request_of(folder)
    request = request if steps is None else replace(request, steps=steps)
    check_numbers(request)
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
        tally.before = {k: seen[0][k] for k in ("mean", "low", "high", "n")}
        tally.after = {k: seen[-1][k] for k in ("mean", "low", "high", "n")}
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
        made.environment.close()


def _go(
    made: Experiment, state: State, folder: RunFolder, tally: Tally, mode: str, notes: list[str] | None = None
) -> dict[str, Any]:
    request = made.request
    title, lead = f"{made.method.name} on {request.env}", about_loss(made.method.flatten())
    view = Watchers(LiveView(request.steps, "turns", title=title, mode=mode, lead=lead))  # type: ignore[arg-type]
    if request.tensorboard:
        view.add(TensorBoard(folder.tensorboard, turn=state.clock.turns))
    with folder, view, interruptible() as interrupted:
        for text in notes or []:
            view.note(text)
        if not tally.before:
            _record_evaluation(made, folder, view, tally, turn=0, stage="before")
        models = {"policy": made.policy}
        loop = run(made.method, made.environment, models, until=request.steps, state=state, memory=request.memory)
        started = time.perf_counter()
        for step in saved_if_not_finite(loop, state, folder, request.keep):
            tally.seconds += time.perf_counter() - started
            _record_turn(made, folder, view, tally, step)
            last = step.turn >= request.steps
            if last or step.turn % request.eval_every == 0:
                _record_evaluation(made, folder, view, tally, step.turn, "after" if last else f"turn {step.turn}")
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
    logs = {**step.logs, **of_batch(step.batch)}
    folder.write_metrics({"turn": step.turn, **{k: v for k, v in clock.items() if k != "turns"}, **logs})
    if step.turn == 1 or step.turn % made.request.eval_every == 0:
        folder.write_samples(group_sample(made, step))
    view.update(logs, clock)


def _record_evaluation(
    made: Experiment, folder: RunFolder, view: Watchers, tally: Tally, turn: int, stage: str
) -> None:
    result = made.evaluate()
    folder.write_eval({"turn": turn, "seconds": round(tally.seconds, 3), **result.record(), "temperature": 0})
    if stage in ("before", "after"):
        folder.write_samples({"turn": turn, "split": "eval", "stage": stage, **t} for t in result.transcripts)
    tally.after = result.summary()
    tally.before = tally.before or tally.after
    view.evaluated(result.mean, result.low, result.high, result.n)


def of_batch(batch: Batch) -> dict[str, float]:
    """Numbers read off a turn's batch: the reward's interval, and the sampled tokens' mean surprise.

    The mean of -log pi over sampled tokens estimates the entropy without bias, at no cost (temperature 1, no top-k/p).
    """
    made: dict[str, float] = {}
    if "reward" in batch:
        mean, low, high = mean_interval(batch.score().tolist())
        made |= {"reward": mean, "reward_low": low, "reward_high": high}
    if "logp_behavior" in batch:
        made["entropy"] = float(-(batch.logp_behavior * batch.mask).sum() / batch.mask.sum().clamp_min(1))
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


def evaluate_folder(path: str | Path, *, problems: int | None = None, env: str | None = None) -> dict[str, Any]:
    """Evaluate the policy of a run folder on held-out problems: before (its start) and after (its newest checkpoint).

    env: another environment to be held out on; the interval is Wilson's. Nothing in the folder changes.
    """
    folder = RunFolder(path)
    request = request_of(folder)
    if env is not None:
        request = replace(request, env=env, reward=None, prompt=None)
    if problems is not None:
        request = replace(request, eval_problems=problems)
    check_numbers(request)
    made = build(request)
    started = time.perf_counter()
    before = made.evaluate().summary()
    after = before
    if checkpoints(folder.checkpoints):
        original = build(replace(request_of(folder), threads=request.threads))
        state = begin(original.method, original.environment, {"policy": original.policy}, seed=request.seed)
        load(state, folder.checkpoints)
        after = Experiment(request, made.method, made.environment, original.policy).evaluate().summary()
    seconds = round(time.perf_counter() - started, 3)
    return {"run": str(folder.path), "seconds": seconds, "eval": {"before": before, "after": after}}
