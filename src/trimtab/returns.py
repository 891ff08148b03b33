"""Evaluation of a policy in environments: whole episodes with fixed starts, decided by its mode and by its draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trimtab.core.errors import MethodError
from trimtab.core.kit import Kit
from trimtab.core.method import Method
from trimtab.core.state import State
from trimtab.environments.transition import Finished

HELD_OUT = -1  # the seed of every evaluation; that of a run is never negative, so no episode is shared with training
MOST_AT_ONCE = 10


@dataclass(frozen=True)
class Returns:
    """The mean return with its 95% interval over `n` episodes, and each episode's return and length, in order.

    measure: of what. sampled: the mean of as many episodes with drawn actions, from the same starts; `drawn` are their
    returns. A policy without a mode is evaluated by its draws alone.
    """

    mean: float
    low: float
    high: float
    n: int
    measure: str
    sampled: float
    returns: list[float]
    lengths: list[int]
    drawn: list[float]
    transcripts: tuple[Mapping[str, Any], ...] = ()

    def summary(self) -> dict[str, Any]:
        """The stable part: mean, low, high, n, and of what."""
        return {"mean": self.mean, "low": self.low, "high": self.high, "n": self.n, "unit": "return"}

    def record(self) -> dict[str, Any]:
        """Everything, for `eval.jsonl`."""
        more = {"measure": self.measure, "sampled": self.sampled}
        return {**self.summary(), **more, "returns": self.returns, "lengths": self.lengths, "drawn": self.drawn}


def evaluated(state: State, method: Method, environment: Any, episodes: int) -> Returns:
    """Play `episodes` whole episodes of an environment of its own, as the policy of a run would now.

    Episode i begins from the same seed and gets the same noise in every evaluation, of every run, so evaluations are
    paired. The running moments of a normaliser are read and do not move, and nothing else of the run does.
    """
    kit = Kit(state, current(state, method), None, False)
    with kit.aside(), torch.no_grad():
        actor = kit.actor("policy")
        drawn = play(actor, environment, episodes, torch.Generator().manual_seed(0))
        best = play(actor, environment, episodes) if hasattr(actor, "mode") else drawn
    totals = [f.total for f in best]
    mean, low, high = interval(totals)
    kind = "deterministic" if hasattr(actor, "mode") else "with drawn actions"
    return Returns(
        mean, low, high, len(best), f"mean return ({kind})", interval([f.total for f in drawn])[0], totals,
        [f.length for f in best], [f.total for f in drawn],
    )  # fmt: skip


def current(state: State, method: Method) -> Method:
    """The method of the phase that a run is in."""
    return method.phases[max(0, state.phases.index)].method if method.phases else method


def play(actor: Any, environment: Any, episodes: int, rng: torch.Generator | None = None) -> list[Finished]:
    """The first `episodes` to begin, in order: of those that end first the short ones would be too many.

    rng: draws the actions; without one the actor's mode decides.
    """
    if episodes < 1:
        raise MethodError(f"episodes={episodes} must be at least 1")
    environment.load_state_dict({"started": False})
    made: dict[int, Finished] = {}
    missing, carry = set(range(episodes)), None
    while missing:
        if rng is None:
            action = actor.mode(environment.obs)
        else:
            decision, carry = actor.act(environment.obs, carry, rng)
            action = decision.action
        environment.step(action)
        made |= {f.episode: f for f in environment.finished}
        missing -= {f.episode for f in environment.finished}
        environment.finished.clear()
    return [made[i] for i in range(episodes)]


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 95% interval: a percentile bootstrap, of width 0 where all values are equal."""
    from trimtab.report.intervals import bootstrap_mean

    mean, low, high = bootstrap_mean(values)
    return (mean, low, high) if math.isfinite(low) else (mean, mean, mean)
