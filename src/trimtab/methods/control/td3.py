"""TD3: DDPG with two critics, a smoothed target and a delayed actor (Fujimoto et al. 2018).

    a' = clip(pi'(s') + c clip(0.2 N(0, 1), -0.5, 0.5), low, high)
    y = r + gamma (1 - terminated) min_i Q'_i(s', a')

Edits to ddpg: two critics and the smaller of their targets; noise on the target's action; actor and all targets move on
every second update. The actor climbs Q_1. The first update moves the actor, the second does not; the released code has
them the other way round. Stable-Baselines3 explores by its first 100 decisions alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trimtab.core.method import Method
from trimtab.core.registry import Neutral, method
from trimtab.methods.control.ddpg import ddpg

SB3: dict[str, Any] = {"lr": 1e-3, "hidden": (400, 300), "warmup": 100, "exploration": 0.0}


@method(world="control", title="Addressing function approximation error in actor-critic methods (TD3)",
        arxiv="1802.09477", base=ddpg, case="steps", presets={"cleanrl": {}, "sb3": SB3},
        neutral=Neutral({"delay": 1, "smoothing": 0.0, "critics": 1}, level="exact"))  # fmt: skip
def td3(
    base: Method,
    *,
    delay: int = 2,
    smoothing: float = 0.2,
    clip: float = 0.5,
    critics: int = 2,
    lr: float | None = None,
    hidden: tuple[int, ...] | None = None,
    warmup: int | None = None,
    exploration: float | None = None,
) -> Method:
    """Edits to ddpg: the least of several critics as target, noise on the target's action, a delayed actor.

    delay: the actor and the targets move on each delay-th update. smoothing, clip: deviation and bound of the noise on
    the target's action, in half widths of its box. critics: how many, at least 1. lr, hidden, warmup, exploration: see
    ddpg; None leaves the base's. The base's own settings, and the preset "cleanrl", are CleanRL's.
    """
    made = base.swap("critic:target.smoothing", smoothing).swap("critic:target.clip", clip)
    values = {"policy:update.lr": lr, "critic:update.lr": lr, "uniform_first.decisions": warmup,
              "collect.warmup": warmup, "gaussian_noise.scale": exploration}  # fmt: skip
    for path, value in values.items():
        made = made if value is None else made.swap(path, value)
    networks = {
        n: network if hidden is None else replace(network, hidden=hidden) for n, network in base.networks.items()
    }
    critic = networks["critic"]
    networks["critic"] = replace(critic, options={**critic.options, "critics": critics})
    return made.but(networks=networks, every={"policy": delay})
