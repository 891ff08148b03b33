"""The worlds that methods live in: what a run in each of them builds, and what it does where nothing was asked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from trimtab.core.errors import MethodError, nearest
from trimtab.core.loop import Step
from trimtab.core.method import Method
from trimtab.core.registry import find, parse
from trimtab.core.state import State
from trimtab.runs.rhythm import Rhythm

if TYPE_CHECKING:
    from trimtab.runs.request import Request


@dataclass(frozen=True)
class Usual:
    """What a run is where its request leaves it open. foreign: options of a request that this world does not read."""

    budget: Mapping[str, int]
    records: Rhythm
    evaluations: Rhythm
    saves: Rhythm
    problems: int
    foreign: tuple[str, ...]


# A turn of language is a batch of rollouts and takes seconds; one of control may be a single step, so what is done now
# and then is spread over the budget.
USUAL = {
    "language": Usual({"turns": 60}, Rhythm(1), Rhythm(10), Rhythm(25), 50, ("envs",)),
    "control": Usual(
        {"decisions": 100_000}, Rhythm(None, 500), Rhythm(None, 20), Rhythm(None, 10), 10,
        ("lora", "dtype", "checkpointing", "chat", "reward", "prompt", "eval_samples", "eval_k",
         "eval_temperature"),
    ),
}  # fmt: skip


class Result(Protocol):
    """An evaluation, whatever was evaluated."""

    @property
    def mean(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...
    @property
    def n(self) -> int: ...
    @property
    def transcripts(self) -> Iterable[Mapping[str, Any]]: ...
    def summary(self) -> dict[str, Any]: ...
    def record(self) -> dict[str, Any]: ...


class Experiment(Protocol):
    """What a request builds. numbers, device: in what, and where, its models compute."""

    request: Request
    method: Method
    environment: Any

    @property
    def models(self) -> dict[str, nn.Module]: ...
    @property
    def numbers(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    def begin(self) -> State:
        """The state before the first turn, with everything that the policy was given."""
        ...

    def notes(self) -> list[str]:
        """Sentences that a user should read when the run begins."""
        ...

    def keep(self, folder: Path) -> None:
        """Put into a new run folder what the run could not be built again without."""
        ...

    def evaluate(self, state: State) -> Result:
        """The policy as it is in this state; nothing of the run moves."""
        ...

    def describe(self) -> dict[str, Any]:
        """policy, environment and versions, for `config.json`."""
        ...

    def measured(self, step: Step) -> dict[str, float]:
        """Numbers of a turn: its logs, and what is read off its batch."""
        ...

    def sample(self, step: Step) -> Iterator[Mapping[str, Any]]:
        """Transcripts of a turn worth keeping, for `samples.jsonl`."""
        ...

    def export(self, folder: Path, state: State) -> None:
        """What was trained, as files, into a folder that does not exist yet."""
        ...

    def close(self) -> None:
        """End the processes of the environments."""
        ...


@lru_cache(maxsize=256)
def world_of(expression: str) -> str:
    """The world of a method expression: that of what it stands on, so `bapo+ppo` acts in an environment.

    Raises MethodError when there is no such method.
    """
    return find(parse(expression).name.rpartition("+")[2]).world


def usual(expression: str) -> Usual:
    """What a run of this method is where nothing was asked; no method, as in an empty request, is a language one."""
    world = world_of(expression) if expression else "language"
    if world not in USUAL:
        raise MethodError(f"{expression} is of the world {world!r}, which cannot be run yet. {nearest(world, USUAL)}")
    return USUAL[world]


def build(request: Request) -> Experiment:
    """Everything a run needs, fresh. Raises a TrimtabError that says what cannot be had and what can."""
    from trimtab.runs.request import Request, configured

    method = configured(request)
    world, empty = world_of(request.method), Request("", "", "", "")
    for name in usual(request.method).foreign:
        if getattr(request, name) != getattr(empty, name):
            others = [w for w, u in USUAL.items() if name not in u.foreign]
            raise MethodError(
                f"--{name.replace('_', '-')} is an option of {' and '.join(others)} methods, and {request.method} is a "
                f"{world} method, which does not read it; leave it out"
            )
    torch.set_num_threads(max(1, request.threads))
    if world == "control":
        from trimtab.runs.control import build_control

        return build_control(request, method)
    from trimtab.runs.language import build_language

    return build_language(request, method)
