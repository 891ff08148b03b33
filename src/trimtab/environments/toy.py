"""The smallest environment of the control world: a point on a line, in float64, with the interface of a real one.

It is there for the laws: episodes of about five steps, some ending by themselves (terminated), some by the clock
(truncated).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from trimtab.environments.transition import Finished, Transition

PUSHES = (-1.0, 0.0, 1.0)  # what the numbered actions do


class PointEnvironment:
    """`x <- 0.9 x + 0.6 push + 0.1 drift`, reward `1 - x^2`; terminated at |x| > 1.5, truncated after `longest` steps.

    An observation is `(x, drift)`; the drift is new at every step. Each environment starts its episodes at a random x.
    """

    def __init__(self, envs: int = 3, discrete: bool = False, longest: int = 6, seed: int = 0) -> None:
        self.envs, self.longest, self.discrete = envs, longest, discrete
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
        self.action_space = spaces.Discrete(3) if discrete else spaces.Box(-1.0, 1.0, (1,), np.float64)
        self._rng = torch.Generator().manual_seed(seed)
        self._time = torch.zeros(envs, dtype=torch.long)
        self.episode = torch.arange(envs)
        self._next, self._return = envs, torch.zeros(envs, dtype=torch.float64)
        self.finished: list[Finished] = []
        self.obs = self._fresh(envs)

    def start(self) -> None:
        """It starts when it is made."""

    def step(self, action: Tensor) -> Transition:
        """Actions `[E]` (numbers) or `[E, 1]` (clipped to the Box)."""
        push = torch.tensor(PUSHES, dtype=torch.float64)[action] if self.discrete else action[:, 0].clamp(-1, 1)
        noise = torch.randn(self.envs, generator=self._rng, dtype=torch.float64)
        x = 0.9 * self.obs[:, 0] + 0.6 * push.double() + 0.1 * self.obs[:, 1]
        after, reward = torch.stack([x, noise], 1), 1 - x.square()
        self._time = self._time + 1
        self._return = self._return + reward
        terminated = x.abs() > 1.5
        truncated = ~terminated & (self._time >= self.longest)
        made = Transition(after, reward, terminated, truncated, self.episode.clone())
        self.obs = self._reset(after, terminated, truncated)
        return made

    def _reset(self, after: Tensor, terminated: Tensor, truncated: Tensor) -> Tensor:
        obs = after.clone()
        for i in (terminated | truncated).nonzero()[:, 0].tolist():
            length, ended = int(self._time[i]), bool(terminated[i])
            self.finished.append(Finished(int(self.episode[i]), float(self._return[i]), length, ended))
            obs[i] = self._fresh(1)[0]
            self.episode[i], self._next = self._next, self._next + 1
            self._time[i], self._return[i] = 0, 0.0
        return obs

    def _fresh(self, n: int) -> Tensor:
        return torch.randn(n, 2, generator=self._rng, dtype=torch.float64) * torch.tensor([0.5, 1.0]).double()

    def state_dict(self) -> dict[str, Any]:
        return {
            "rng": self._rng.get_state(), "obs": self.obs, "time": self._time, "episode": self.episode.clone(),
            "next": self._next, "return": self._return.clone(), "finished": [tuple(f) for f in self.finished],
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rng.set_state(state["rng"])
        self.obs, self._time, self.episode = state["obs"], state["time"], state["episode"].clone()
        self._next, self._return, self.finished = (
            state["next"],
            state["return"].clone(),
            [Finished(*f) for f in state["finished"]],
        )
