"""They learn: a short budget on CartPole, beside the same policy untrained."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trimtab.core.loop import run
from trimtab.core.registry import find
from trimtab.core.schedules import linear
from trimtab.environments.gym import GymEnvironment
from trimtab.policies.networks import build_networks

ARMS: dict[str, tuple[dict[str, Any], float]] = {
    "ppo": ({"preset": "cleanrl_discrete", "lr": linear(1e-3, 0.0)}, 120.0),
    "a2c": ({"horizon": 16, "lr": 3e-3, "lam": 0.95}, 120.0),
    "trpo": ({}, 150.0),
}


def returns(name: str, options: dict[str, Any], decisions: int, rate: float = 1.0) -> tuple[float, float]:
    """Mean return of the last quarter of the turns that ended an episode, and of the very first ten episodes."""
    torch.manual_seed(0)
    method = find("trpo")(find("npg")(horizon=256, **options)) if name == "trpo" else find(name)(**options)
    environment = GymEnvironment("CartPole-v1", envs=4, seed=1)
    models = build_networks(method, environment, 1)
    seen = [s.logs["return"] for s in run(method, environment, models, until={"decisions": decisions}, seed=1)
            if "return" in s.logs]  # fmt: skip
    return sum(seen[-len(seen) // 4 :]) / len(seen[-len(seen) // 4 :]), seen[0]


@pytest.mark.parametrize("name", sorted(ARMS))
def test_cartpole_is_learned_within_a_short_budget(name: str) -> None:
    options, threshold = ARMS[name]
    learned, untrained = returns(name, options, 16_000)
    assert untrained < 35, "the base arm: a policy that has not learned holds the pole for about 20 steps"
    assert learned > threshold
