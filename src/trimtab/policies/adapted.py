"""A policy whose decisions are drawn at a temperature of their own: what an `act` wrap hands to collect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trimtab.policies.draws import Sampling
from trimtab.policies.sampler import Rollout


def entropy_of(logits: Tensor) -> Tensor:
    """Entropy in nats of `softmax(logits)` over the last axis; -inf is a probability of 0."""
    return torch.special.entr(logits.softmax(-1)).sum(-1)


class AdaptedPolicy:
    """`policy`, drawing each decision at its temperature times `factor(logits)`; all else is the policy's own.

    factor: logits over the temperature, `[..., V]`, to positive numbers `[...]`. Greedy decisions stay as they are. The
    log-probability that is reported is that of the distribution drawn from.
    """

    def __init__(self, policy: Any, factor: Callable[[Tensor], Tensor]) -> None:
        self._policy, self._factor = policy, factor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    @property
    def sampler(self) -> AdaptedPolicy:
        """Itself: see `sample`."""
        return self

    def sample(self, prompts: list[list[int]], copies: int, seeds: Tensor | None, sampling: Sampling) -> Rollout:
        """As the policy's sampler; factors of several wraps multiply."""
        before, mine = sampling.adapt, self._factor
        adapt = mine if before is None else lambda logits: before(logits) * mine(logits)
        made: Rollout = self._policy.sampler.sample(prompts, copies, seeds, replace(sampling, adapt=adapt))
        return made

    def logits(self, obs: Tensor) -> Tensor:
        """Of a policy that decides by logits alone: those that it draws from."""
        logits: Tensor = self._policy.logits(obs)
        return logits / self._factor(logits)[..., None]
