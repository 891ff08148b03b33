"""What a user asked for, and the method that it means."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from trimtab.core.errors import MethodError
from trimtab.core.method import Method
from trimtab.core.registry import parse
from trimtab.evaluation import Evaluator, whole_numbers
from trimtab.machine import threads_for
from trimtab.report.folder import START, RunFolder
from trimtab.runs.limits import check_numbers, check_written
from trimtab.runs.literals import literal
from trimtab.runs.rhythm import Rhythm
from trimtab.runs.worlds import usual, world_of

SMALL = ("nano", "tiny")


@dataclass(frozen=True)
class Request:
    """What a user asked for; written to `config.json`, and enough to rebuild the run.

    policy: the language policy that is trained; of a control method, whose networks the method names, the folder of an
    earlier run that they begin with, or "". steps: turns of the loop.
    decisions: instead of steps, stop after the first turn that reaches this many decisions of our policy; schedules
    follow. set: `piece.option=value` pairs. envs: environments stepped together. rows, passes: rows per update and
    passes over a batch (None: the method's own). memory: rows in memory at once. eval_every, save_every: turns between
    evaluations and checkpoints. eval_problems: held-out problems, or episodes. checkpointing: see `load_policy`.
    eval_env: another environment to be held out on, with the same reward and prompt. eval_samples, eval_k ("1,4"),
    eval_temperature: see `Evaluator`. keep: checkpoints kept. threads: 0 chooses. tensorboard: also write event files.
    What is None is as usual in the world of the method (`worlds.USUAL`).

    Raises TrimtabError for a count that cannot be, and for options of the evaluation that contradict each other.
    """

    method: str
    policy: str
    env: str
    out: str
    steps: int | None = None
    decisions: int | None = None
    seed: int = 0
    set: tuple[str, ...] = ()
    envs: int | None = None
    lora: int = 0
    dtype: str = "auto"
    checkpointing: bool = False
    chat: bool | None = None
    reward: str | None = None
    prompt: str | None = None
    rows: int | None = None
    passes: int | None = None
    memory: int | None = None
    eval_every: int | None = None
    eval_problems: int | None = None
    eval_env: str | None = None
    eval_samples: int = 1
    eval_k: str = ""
    eval_temperature: float = 0.0
    save_every: int | None = None
    keep: int = 2
    threads: int = 0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        check_numbers(self)
        self.evaluator()

    @property
    def budget(self) -> dict[str, int]:
        """What the run may use, by counter of the clock."""
        if self.decisions is not None:
            return {"decisions": self.decisions}
        return dict(usual(self.method).budget) if self.steps is None else {"turns": self.steps}

    @property
    def evaluations(self) -> Rhythm:
        """When its policy is evaluated, besides before and after."""
        return usual(self.method).evaluations if self.eval_every is None else Rhythm(self.eval_every)

    @property
    def saves(self) -> Rhythm:
        """When it is saved, besides at the end."""
        return usual(self.method).saves if self.save_every is None else Rhythm(self.save_every)

    @property
    def problems(self) -> int:
        """Held-out problems, or episodes, of an evaluation."""
        return usual(self.method).problems if self.eval_problems is None else self.eval_problems

    def evaluator(self, environment: Any = None, new_tokens: int = 16) -> Evaluator:
        """How this request wants its policy evaluated."""
        k = whole_numbers(self.eval_k)
        problems = Evaluator.problems if environment is None else self.problems
        return Evaluator(environment, problems, new_tokens, self.eval_temperature, self.eval_samples, k)


def settle(request: Request) -> Request:
    """The request with its number of threads decided: all idle cores for a real model, one for the small ones."""
    if request.threads:
        return request
    small = request.policy in SMALL or world_of(request.method) == "control"
    return replace(request, threads=threads_for(small))


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
    if request.policy and world_of(request.method) == "control":
        from trimtab.policies.start import read_start, started

        method = started(method, read_start(request.policy))
    return method


def request_of(folder: RunFolder) -> Request:
    """The request that a run folder was made from; what it began with is read from its own copy."""
    given = check_written(Request, folder.config().get("request"), folder.path / "config.json")
    kept = {"policy": str(folder.path / START)} if (folder.path / START).is_dir() else {}
    return Request(**{**given, "set": tuple(given.get("set", ())), "out": str(folder.path), **kept})
