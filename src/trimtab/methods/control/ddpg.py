"""DDPG: a deterministic actor that climbs a learned critic (Lillicrap et al. 2016), in the form that TD3 stands on.

    y = r + gamma (1 - terminated) Q'(s', pi'(s'))            critic: mean (Q(s, a) - y)^2
    actor: -mean Q(s, pi(s))                                  targets: theta' <- (1 - tau) theta' + tau theta

Both targets move when the actor does, after it. Exploration is Gaussian, not the paper's Ornstein-Uhlenbeck process, as
in CleanRL and Stable-Baselines3. Those libraries' DDPG are their TD3 with one critic, no smoothing and, in
Stable-Baselines3, no delay; the presets follow the card's rows of TD3, so that a comparison changes the method alone.
"""

from __future__ import annotations

from typing import Any

from trimtab.core.copies import polyak
from trimtab.core.method import Method, Track
from trimtab.core.network import Network
from trimtab.core.registry import method
from trimtab.stages.critics import climb, smoothed_target, td_error
from trimtab.stages.explore import gaussian_noise, uniform_first
from trimtab.stages.replay import replay
from trimtab.stages.update import adamw

SB3: dict[str, Any] = {"lr": 1e-3, "hidden": (400, 300), "warmup": 100, "exploration": 0.0}


@method(world="control", title="Continuous control with deep reinforcement learning (DDPG)", case="steps",
        presets={"cleanrl": {}, "sb3": SB3})  # fmt: skip
def ddpg(
    *,
    lr: float = 3e-4,
    hidden: tuple[int, ...] = (256, 256),
    batch: int = 256,
    capacity: int = 1_000_000,
    warmup: int = 25_000,
    exploration: float = 0.1,
    gamma: float = 0.99,
    tau: float = 0.005,
    matmul: str = "float32",
) -> Method:
    """Deterministic policy gradient from replay, one update a step; the defaults, and "cleanrl", are CleanRL's.

    batch, capacity, warmup: decisions drawn for an update, kept, and made at random before the first one. exploration:
    deviation of the noise while collecting, in half widths of the action's box; 0 leaves it to those first decisions.
    tau in (0, 1]: how far targets move. gamma in [0, 1]. matmul: "bfloat16" rounds the factors of the products between
    hidden layers; parameters, optimiser and everything else stay in float32.
    """
    options = {} if matmul == "float32" else {"matmul": matmul}
    actor = Track("policy", "policy", (climb(),), adamw(lr=lr))
    critic = Track("critic", "critic", (smoothed_target(gamma=gamma), td_error()), adamw(lr=lr))
    return Method(
        "ddpg",
        pieces=(gaussian_noise(scale=exploration), uniform_first(decisions=warmup),
                replay(batch=batch, capacity=capacity, warmup=warmup)),
        tracks=(critic, actor),
        copies={"critic_target": polyak("critic", tau, after="policy"), "policy_target": polyak("policy", tau)},
        networks={
            "policy": Network("deterministic", tuple(hidden), "relu", options),
            "critic": Network("ensemble", tuple(hidden), "relu", {"critics": 1, **options}),
        },
    )  # fmt: skip
