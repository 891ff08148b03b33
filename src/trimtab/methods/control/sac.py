"""SAC: an actor that climbs twin critics and keeps its entropy (Haarnoja et al. 2018, 2018b).

    y = r + gamma (1 - terminated) (min_i Q'_i(s', a') - alpha log pi(a'|s')),  a' ~ pi(.|s')
    critic: scale mean sum_i (Q_i(s, a) - y)^2          actor: mean (alpha log pi(a|s) - min_i Q_i(s, a)), a ~ pi(.|s)
    temperature: -mean(log alpha (log pi + H)), H minus the number of action dimensions

Order of an update, as in both libraries: all see alpha as it was before; critic, actor, temperature, target. By default
actor and temperature learn from the same actions, as in Stable-Baselines3. Where the libraries differ:

- CleanRL updates actor and temperature on every second step, twice (`delay`), the temperature from actions that the
  moved actor draws anew; it alternates the two, ours moves the actor twice, then alpha twice;
- CleanRL's temperature loss has alpha in place of log alpha: the same sign, another scale (`log_alpha`);
- Stable-Baselines3 halves the critic's loss, which Adam undoes but for its eps, and clamps log sigma to [-20, 2], which
  CleanRL maps by tanh into [-5, 2].
"""

from __future__ import annotations

from typing import Any

from trimtab.core.copies import polyak
from trimtab.core.method import Method, Track
from trimtab.core.network import Network
from trimtab.core.piece import Piece
from trimtab.core.registry import method
from trimtab.stages.critics import (
    action_noise,
    constant,
    fresh_sample,
    hold_entropy,
    learned,
    shared_sample,
    soft_climb,
    soft_target,
    td_error,
)
from trimtab.stages.explore import uniform_first
from trimtab.stages.replay import replay
from trimtab.stages.update import adamw, repeated

CLEANRL: dict[str, Any] = {"critic_lr": 1e-3, "alpha_lr": 1e-3, "delay": 2, "log_alpha": False}
SB3: dict[str, Any] = {"warmup": 100, "scale": 0.5, "spread": "clamp"}


@method(world="control", title="Soft actor-critic: off-policy maximum entropy reinforcement learning (SAC)",
        arxiv="1801.01290", case="steps", presets={"cleanrl": CLEANRL, "sb3": SB3})  # fmt: skip
def sac(
    *,
    lr: float = 3e-4,
    critic_lr: float | None = None,
    alpha_lr: float | None = None,
    hidden: tuple[int, ...] = (256, 256),
    critics: int = 2,
    batch: int = 256,
    capacity: int = 1_000_000,
    warmup: int = 5_000,
    gamma: float = 0.99,
    tau: float = 0.005,
    alpha: float | None = None,
    entropy: float | None = None,
    delay: int = 1,
    log_alpha: bool = True,
    scale: float = 1.0,
    spread: str = "tanh",
    matmul: str = "float32",
) -> Method:
    """Maximum-entropy actor-critic from replay, one update a step.

    lr: of the actor, and of critic and temperature where theirs are None. critics: how many, at least 1. batch,
    capacity, warmup: decisions drawn for an update, kept, and made at random before the first one. gamma in [0, 1].
    tau in (0, 1]: how far the target moves. alpha: a fixed temperature of at least 0; None learns it from 1 on.
    entropy: what it is to be then; None is minus the number of action dimensions. delay: actor and temperature learn on
    each delay-th update, delay times. log_alpha, scale, spread: see above. matmul: "bfloat16" rounds the factors of the
    products between hidden layers; parameters, optimiser and everything else stay in float32.
    """
    options = {} if matmul == "float32" else {"matmul": matmul}
    temperature = learned() if alpha is None else constant(alpha)
    critic = (soft_target(temperature=temperature, gamma=gamma), td_error(scale=scale))
    shared = [action_noise()] if delay == 1 else []  # with a delay, on most updates nobody would read it
    actor = [] if delay == 1 else [action_noise()]
    actor.append(soft_climb(temperature=temperature))
    tracks = [
        Track("critic", "critic", critic, adamw(lr=lr if critic_lr is None else critic_lr)),
        Track("policy", "policy", tuple(actor), _times(adamw(lr=lr), delay), every=delay),
    ]
    networks = {
        "policy": Network("squashed_gaussian", tuple(hidden), "relu", {"spread": spread, **options}),
        "critic": Network("ensemble", tuple(hidden), "relu", {"critics": critics, **options}),
    }
    if alpha is None:
        own = [hold_entropy(target=entropy, log=log_alpha)]
        if delay == 1:
            shared.append(shared_sample())
        else:
            own.insert(0, fresh_sample())
        update = _times(adamw(lr=lr if alpha_lr is None else alpha_lr), delay)
        tracks.append(Track("temperature", "temperature", tuple(own), update, every=delay))
        networks["temperature"] = Network("temperature", ())
    return Method(
        "sac",
        pieces=(uniform_first(decisions=warmup), replay(batch=batch, capacity=capacity, warmup=warmup), *shared),
        tracks=tuple(tracks),
        copies={"critic_target": polyak("critic", tau)},
        networks=networks,
    )


def _times(update: Piece, times: int) -> Piece:
    return update if times == 1 else repeated(inner=update, times=times)
