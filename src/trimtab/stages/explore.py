"""Exploration: `act` wraps that change what the policy decided while it collects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor

from trimtab.core.contracts import Decision
from trimtab.core.errors import MethodError
from trimtab.core.kit import Kit
from trimtab.core.piece import Schedule, piece


class Exploring:
    """An actor whose decisions are made from those of the one inside: `decide(obs, carry, rng)`.

    Everything else (`mode`, `see`, `learn`) is the inner actor's: an evaluation without chance does not explore.
    """

    def __init__(self, inner: Any, decide: Callable[[Tensor, Any, torch.Generator], tuple[Decision, Any]]) -> None:
        self._inner, self.act = inner, decide

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def uniform(space: Any, count: int, rng: torch.Generator, dtype: torch.dtype) -> Tensor:
    """`count` actions drawn uniformly from a space, `[count, *A]`. Raises MethodError for a Box without sides."""
    if isinstance(space, spaces.Discrete):
        return torch.randint(int(space.n), (count,), generator=rng)
    if isinstance(space, spaces.MultiDiscrete):
        drawn = torch.rand(count, *space.shape, generator=rng, dtype=torch.float64)
        return (drawn * torch.as_tensor(space.nvec)).long()
    low, high = _sides(space, dtype)
    return low + (high - low) * torch.rand(count, *space.shape, generator=rng, dtype=dtype)


def _sides(space: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if not isinstance(space, spaces.Box):
        raise MethodError(f"this exploration is for real-valued actions in a Box, and the action space is {space}")
    if not space.is_bounded():
        raise MethodError(f"exploring needs a Box with finite sides, and the action space is {space}")
    return torch.as_tensor(space.low).to(dtype), torch.as_tensor(space.high).to(dtype)


def none_yet(kit: Any, options: Mapping[str, Any]) -> int:
    """No decision was made."""
    return 0


def _not_negative(options: Mapping[str, Any]) -> str | None:
    return None if options["decisions"] >= 0 else f"decisions={options['decisions']} must be at least 0"


@piece("act", state={"uniform_made": none_yet}, validate=_not_negative)
def uniform_first(kit: Kit, policy: Any, *, decisions: int) -> Any:
    """The first `decisions` decisions of the run are drawn uniformly from the action space; then the policy decides."""
    if kit.state["uniform_made"] >= decisions:
        return policy
    state, space = kit.state, kit.environment.action_space

    def decide(obs: Tensor, carry: Any, rng: torch.Generator) -> tuple[Decision, Any]:
        if state["uniform_made"] >= decisions:
            made: tuple[Decision, Any] = policy.act(obs, carry, rng)
            return made
        state["uniform_made"] += len(obs)
        return Decision(uniform(space, len(obs), rng, obs.dtype)), carry

    return Exploring(policy, decide)


def _share(options: Mapping[str, Any]) -> str | None:
    epsilon = options["epsilon"]
    good = isinstance(epsilon, Schedule) or 0 <= epsilon <= 1
    return None if good else f"epsilon={epsilon} must be in [0, 1]: the share of decisions that are random"


@piece("act", validate=_share)
def epsilon_greedy(kit: Kit, policy: Any, *, epsilon: float = 0.05) -> Exploring:
    """With probability `epsilon` (a number or a schedule) a uniform action instead of the policy's; each environment
    draws for itself."""
    space = kit.environment.action_space

    def decide(obs: Tensor, carry: Any, rng: torch.Generator) -> tuple[Decision, Any]:
        decision, carry = policy.act(obs, carry, rng)
        lots = torch.rand(len(obs), generator=rng) < epsilon
        other = uniform(space, len(obs), rng, obs.dtype)
        along = lots.reshape(-1, *[1] * (other.dim() - 1))
        return Decision(torch.where(along, other, decision.action)), carry

    return Exploring(policy, decide)


def _spread(options: Mapping[str, Any]) -> str | None:
    scale = options["scale"]
    good = isinstance(scale, Schedule) or 0 <= scale < float("inf")
    return None if good else f"scale={scale} must be at least 0 and finite: the noise's deviation, in half widths"


@piece("act", validate=_spread)
def gaussian_noise(kit: Kit, policy: Any, *, scale: float = 0.1) -> Exploring:
    """`a <- clip(a + scale c N(0, 1), low, high)`, c half the width of the Box; scale: a number or a schedule."""
    space = kit.environment.action_space

    def decide(obs: Tensor, carry: Any, rng: torch.Generator) -> tuple[Decision, Any]:
        (action, _), carry = policy.act(obs, carry, rng)
        low, high = _sides(space, action.dtype)
        noise = torch.empty_like(action).normal_(generator=rng)
        return Decision(torch.clamp(action + scale * ((high - low) / 2) * noise, low, high)), carry

    return Exploring(policy, decide)
