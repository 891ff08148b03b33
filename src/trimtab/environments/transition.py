"""What a step of an environment gives, whatever the environment is."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from torch import Tensor


class Transition(NamedTuple):
    """One step of E environments.

    next_obs `[E, *O]`: the observation that the action led to, also where the episode ended there. reward `[E]`.
    terminated, truncated bool `[E]`: the episode ended by its own rules, or was cut by a limit; never both. episode
    long `[E]`: the id, unique in the run, of the episode that the step belongs to.
    """

    next_obs: Tensor
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    episode: Tensor


class Finished(NamedTuple):
    """An episode that ended: its id, the sum of its rewards, its number of steps, and whether it terminated."""

    episode: int
    total: float
    length: int
    terminated: bool


def episode_seed(seed: int, episode: int) -> int:
    """The seed that an episode is reset with, in [0, 2^31): made from the run's seed and the episode's id alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}/episode/{episode}".encode()).digest()[:4], "big") >> 1
