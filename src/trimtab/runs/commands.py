"""A request as the command line that repeats it."""

from __future__ import annotations

import shlex
from dataclasses import MISSING, asdict, fields
from typing import TYPE_CHECKING

from trimtab.core.errors import MethodError

if TYPE_CHECKING:
    from trimtab.runs.request import Request


def command(request: Request) -> str:
    """The command line that repeats this run."""
    return shlex.join(["trimtab", "train", request.method, *options(request)])


def options(request: Request) -> list[str]:
    """The options of a request that are not the usual ones, as words of a command line."""
    words: list[str] = []
    usual = {f.name: "" if f.default is MISSING else f.default for f in fields(request)}
    for name, value in asdict(request).items():
        flag = "--" + name.replace("_", "-")
        if name == "steps" and request.decisions is not None:
            continue
        if name == "method" or value is None or (name != "env" and value == usual[name]):
            continue
        if name == "set":
            for pair in value:
                words += ["--set", pair]
        elif name == "tensorboard":
            words.append(flag)
        else:
            words += [flag, str(value)]
    return words


def one_budget(steps: int | None, decisions: int | None) -> None:
    """Raise MethodError for two budgets: turns and decisions."""
    if steps is not None and decisions is not None:
        raise MethodError(f"--steps {steps} and --decisions {decisions} are two budgets; give one of them")
