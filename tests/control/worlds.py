"""Small Gymnasium environments for tests: one that is well, and one for each fault."""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class Counter(gym.Env[Any, Any]):
    """Observes how far it has counted; an episode terminates at `end`. What else it does is asked of it by name."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 30}
    observation_space: Any = spaces.Box(-10.0, 10.0, (2,), np.float64)
    action_space: Any = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, end: int = 5, fault: str = "", at: int = 3, render_mode: str | None = None) -> None:
        self.end, self.fault, self.at, self.render_mode = end, fault, at, render_mode
        self.acts: list[Any] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.n, self.start = 0, float(self.np_random.normal())
        return self._seen(), {}

    def _seen(self) -> Any:
        value = float("nan") if self.fault == "nan observation" and self.n == self.at else self.start
        value = float(np.random.rand()) if self.fault == "not deterministic" else value
        return np.array([self.n / 10, value])

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.n += 1
        self.acts.append(action)
        self.start += float(np.asarray(action).sum()) * 0.1
        reward = 1.0
        if self.n == self.at:
            if self.fault == "raises":
                raise RuntimeError("the arm fell off")
            if self.fault == "os error":
                raise OSError(5, "the camera is gone")
            reward = {"nan reward": float("nan"), "infinite reward": float("-inf")}.get(self.fault, 1.0)
        return self._seen(), reward, self.n >= self.end and self.fault != "never ends", False, {}

    def render(self) -> Any:
        if self.fault == "no picture":
            raise RuntimeError("there is no display")
        return np.full((64, 48, 3), 8 * min(self.n, 31), np.uint8)


class Choice(Counter):
    """The same with discrete actions, which begin at 2."""

    action_space: Any = spaces.Discrete(3, start=2)


class Worded(Counter):
    """Observations that are words."""

    observation_space: Any = spaces.Text(10)


class Tangled(Counter):
    """Actions that are a dictionary."""

    action_space: Any = spaces.Dict({"a": spaces.Discrete(2)})


def register() -> None:
    """Make them known; asking again changes nothing."""
    for kind in (Counter, Choice, Worded, Tangled):
        name = f"Trimtab{kind.__name__}-v0"
        if name not in gym.registry:
            gym.register(name, entry_point=kind)
