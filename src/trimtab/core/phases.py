"""What entering a phase may do to the state: `copy, fresh, freeze, clear`; and how a phased method is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trimtab.core.errors import MethodError, nearest
from trimtab.core.loop import make_state
from trimtab.core.method import Method, Phase
from trimtab.core.state import COUNTERS, State

# Copies that follow their source all the time: they start anew with it. Others keep what they were taken for.
FOLLOWERS = ("polyak", "every", "previous", "pool", "best")


@dataclass(frozen=True)
class Action:
    """One thing done on entering a phase."""

    kind: str
    name: str
    to: str = ""

    @property
    def models(self) -> tuple[str, ...]:
        """The models it names."""
        return () if self.kind == "clear" else tuple(filter(None, (self.name, self.to)))

    def __str__(self) -> str:
        return f"{self.kind}({self.name}{' -> ' + self.to if self.to else ''})"

    def __call__(self, state: State, method: Method) -> None:
        models = state.lookup()
        if self.kind == "copy":
            with torch.no_grad():
                models[self.to].load_state_dict(models[self.name].state_dict())
        elif self.kind == "fresh":
            for module in models[self.name].modules():
                reset = getattr(module, "reset_parameters", None)
                if callable(reset):
                    reset()
            make_state(state, method, only=self.name)
            for kept in state.copies.values():
                if kept.rule.source == self.name and kept.rule.kind in FOLLOWERS:
                    kept.restart(models[self.name])
        elif self.kind == "freeze":
            state.phases.frozen = sorted({*state.phases.frozen, self.name})
        elif self.kind == "thaw":
            state.phases.frozen = [n for n in state.phases.frozen if n != self.name]
        else:
            if self.name not in state.pieces:
                raise MethodError(f"{self}: no piece keeps {self.name!r}; kept: {sorted(state.pieces)}")
            del state.pieces[self.name]
            make_state(state, method)


def copy(source: str, to: str) -> Action:
    """The parameters of one model into another of the same shape."""
    return Action("copy", source, to)


def fresh(model: str) -> Action:
    """New random parameters (`reset_parameters` of every module), and new optimiser state for its tracks."""
    return Action("fresh", model)


def freeze(model: str) -> Action:
    """Skip every track that trains this model, until it is thawed."""
    return Action("freeze", model)


def thaw(model: str) -> Action:
    """Undo `freeze`."""
    return Action("thaw", model)


def clear(key: str) -> Action:
    """Make a piece's state anew; `key` is "track/key", or "/key" for shared pieces."""
    return Action("clear", key)


def phased(name: str, phases: Sequence[Phase]) -> Method:
    """A method that runs other methods one after another over one state tree; the last one goes on to the end."""
    if not phases:
        raise MethodError(f"{name} has no phases")
    for phase in phases:
        for counter in phase.until:
            if counter not in COUNTERS:
                known = nearest(counter, COUNTERS)
                raise MethodError(f"phase {phase.name!r}: until={counter!r} is not counted. {known}")
    return Method(name, phases=tuple(phases))
