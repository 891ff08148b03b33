"""They learn: on problems whose optimum is known, within a second or two, beside arms that have not learned."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from trimtab.core.loop import run
from trimtab.core.registry import find
from trimtab.environments.toy import PointEnvironment
from trimtab.environments.transition import Transition
from trimtab.policies.networks import build_networks
from trimtab.stages.explore import uniform

torch.set_num_threads(1)
FAST = {"lr": 3e-3, "hidden": (32, 32), "batch": 64, "warmup": 150, "capacity": 5000}


def mean_reward(decide: Any) -> float:
    """Over 200 steps of three points, which start anew every six steps; 1 is what cannot be surpassed."""
    world = PointEnvironment(seed=99)
    return sum(float(world.step(decide(world.obs)).reward.mean()) for _ in range(200)) / 200


def test_sac_holds_a_point_still() -> None:
    method, world = find("sac")(**FAST, gamma=0.8, tau=0.05), PointEnvironment(seed=0)
    models = build_networks(method, world, 0, dtype=torch.float64)
    for _ in run(method, world, models, until={"updates": 400}):
        pass
    rng, policy = torch.Generator().manual_seed(0), models["policy"]
    random = mean_reward(lambda obs: uniform(world.action_space, len(obs), rng, obs.dtype))
    still = mean_reward(lambda obs: torch.zeros(len(obs), 1, dtype=obs.dtype))
    assert random < 0.65 < still < 0.86, "the arms that have not learned"
    assert mean_reward(policy.mode) > 0.92


class Chain:
    """Five places in a row; 1 at the right end and 0.3 at the left one, which both end the episode; cut after 15 steps.

    With gamma 0.9 the best is to walk right from everywhere but the place beside the left end.
    """

    envs = 1
    observation_space = spaces.Box(0.0, 1.0, (5,), np.float64)
    action_space = spaces.Discrete(2)

    def __init__(self) -> None:
        self.finished: list[Any] = []
        self._rng = torch.Generator().manual_seed(0)
        self._begin()

    def _begin(self) -> None:
        self.at, self.time = int(torch.randint(5, (), generator=self._rng)), 0
        self.obs = self.shown(self.at)

    def shown(self, at: int) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor([min(max(at, 0), 4)]), 5).double()

    def start(self) -> None:
        """It starts when it is made."""

    def step(self, action: Tensor) -> Transition:
        self.at, self.time = self.at + (1 if int(action) else -1), self.time + 1
        ended = not 0 <= self.at <= 4
        cut = not ended and self.time >= 15
        reward = torch.tensor([1.0 if self.at > 4 else 0.3 if self.at < 0 else 0.0], dtype=torch.float64)
        after = self.shown(self.at)
        self.obs = after
        if ended or cut:
            self._begin()
        return Transition(after, reward, torch.tensor([ended]), torch.tensor([cut]), torch.tensor([0]))


def test_dqn_finds_the_values_of_a_chain() -> None:
    gamma, right = 0.9, [0.9 ** (4 - i) for i in range(5)]  # of walking right from each place
    options = {**FAST, "lr": 1e-3, "train_every": 1, "target_every": 25, "epsilon": 1.0, "gamma": gamma}
    method, world = find("dqn")(**options), Chain()
    models = build_networks(method, world, 0, dtype=torch.float64)
    for _ in run(method, world, models, until={"updates": 1200}):
        pass
    policy: Any = models["policy"]
    values = policy.net(torch.eye(5, dtype=torch.float64))
    best = [max(0.3 if i == 0 else 0.0, v) for i, v in enumerate(right)]
    left = [0.3, *(gamma * best[i - 1] for i in range(1, 5))]
    expected = torch.tensor([left, right], dtype=torch.float64).t()
    assert float((values - expected).detach().abs().max()) < 0.05
    assert policy.mode(torch.eye(5, dtype=torch.float64)).tolist() == [1, 1, 1, 1, 1]
