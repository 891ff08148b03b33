"""DQN: a greedy policy over learned action values (Mnih et al. 2015), as CleanRL and Stable-Baselines3 have it.

    y = r + gamma (1 - terminated) max_a Q'(s', a)           Q' a hard copy of Q, made now and then
    loss = mean (Q(s, a) - y)^2, or the smooth L1 loss with its corner at 1

The network is the policy itself: it acts greedily, and explores by a uniform action with probability epsilon.
No double Q-learning in either library, so none here.
"""

from __future__ import annotations

from typing import Any

from trimtab.core.copies import every
from trimtab.core.method import Method, Track
from trimtab.core.network import Network
from trimtab.core.registry import method
from trimtab.core.schedules import ramp
from trimtab.stages.critics import greedy_target, td_error
from trimtab.stages.explore import epsilon_greedy, uniform_first
from trimtab.stages.replay import replay
from trimtab.stages.update import adamw

SB3: dict[str, Any] = {
    "huber": 1.0, "clip": 10.0, "lr": 1e-4, "hidden": (64, 64), "capacity": 1_000_000, "batch": 32, "warmup": 100,
    "train_every": 4, "target_every": 10_000, "explore": 0.1,
}  # fmt: skip


@method(world="control", title="Human-level control by deep Q-learning (DQN)", case="choices",
        presets={"cleanrl": {}, "sb3": SB3})  # fmt: skip
def dqn(
    *,
    huber: float | None = None,
    clip: float | None = None,
    lr: float = 2.5e-4,
    hidden: tuple[int, ...] = (120, 84),
    capacity: int = 10_000,
    batch: int = 128,
    warmup: int = 10_000,
    train_every: int = 10,
    target_every: int = 500,
    explore: float = 0.5,
    epsilon: float = 0.05,
    gamma: float = 0.99,
) -> Method:
    """Q-learning from replay with a target network; the defaults, and the preset "cleanrl", are CleanRL's.

    huber: where the loss turns linear, None squares the error. clip: largest gradient norm, None for no clipping.
    capacity, batch, warmup: decisions kept, drawn for an update, and made before the first one, at random. train_every:
    steps of every environment between updates. target_every: such steps between copies of the target, in whole updates.
    explore: the share of the run in which epsilon falls from 1 to `epsilon`. gamma: the discount, in [0, 1].
    """
    act = epsilon_greedy(epsilon=ramp(1.0, epsilon, explore)), uniform_first(decisions=warmup)
    collect = replay(steps=train_every, batch=batch, capacity=capacity, warmup=warmup)
    pieces = (greedy_target(gamma=gamma), td_error(huber=huber))
    return Method(
        "dqn",
        pieces=(*act, collect),
        tracks=(Track("policy", "policy", pieces, adamw(lr=lr, clip=clip)),),
        copies={"policy_target": every("policy", max(1, target_every // train_every))},
        networks={"policy": Network("q_values", tuple(hidden), "relu")},
    )
