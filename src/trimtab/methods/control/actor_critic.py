"""Policy gradients with a learned value: `a2c`, `ppo`."""

from __future__ import annotations

from trimtab.core.errors import MethodError
from trimtab.core.method import Method, Track
from trimtab.core.network import Network
from trimtab.core.piece import Piece, Schedule
from trimtab.core.registry import method
from trimtab.core.schedules import linear
from trimtab.stages.advantage import gae, normalised, values
from trimtab.stages.annotate import logp_old
from trimtab.stages.normalise import normalised_obs, scaled_reward
from trimtab.stages.steps import flat, steps
from trimtab.stages.surrogate import clip, pessimistic, score_function, surrogate, token_ratio
from trimtab.stages.terms import approx_kl, entropy_bonus, value_error
from trimtab.stages.update import adamw, rmsprop, stopped_at

Rate = float | Schedule
DECAY = linear(3e-4, 0.0)


def entropy_pieces(coef: float) -> tuple[Piece, ...]:
    """No piece at all where entropy costs nothing: it would only be computed."""
    if not coef >= 0:
        raise MethodError(f"entropy_coef={coef} must be at least 0")
    return (entropy_bonus(coef=coef),) if coef else ()


@method(world="control", title="Advantage actor-critic (A2C)", aliases=("actor_critic",), case="steps")
def a2c(
    *,
    horizon: int = 5,
    lr: Rate = 7e-4,
    gamma: float = 0.99,
    lam: float = 1.0,
    entropy_coef: float = 0.0,
    value_coef: float = 0.5,
    clip_norm: float | None = 0.5,
    truncation: str = "bootstrap",
    hidden: tuple[int, ...] = (64, 64),
    activation: str = "tanh",
) -> Method:
    """`loss = -mean(A log pi) + value_coef mean (R - V)^2 - entropy_coef mean H`, one RMSprop step for each rollout.

    Mnih et al. 2016, arXiv 1602.01783, in its synchronous form; numbers as in Stable-Baselines3. horizon: steps of each
    environment for one update. gamma, lam: of `gae`. clip_norm: largest gradient norm of policy and value together.
    truncation: see `gae`. hidden, activation: of the policy and, separately, of the value.
    """
    losses = (surrogate(shape=score_function()), value_error(coef=value_coef), *entropy_pieces(entropy_coef))
    return Method(
        "a2c",
        pieces=(steps(horizon=horizon), values(), gae(gamma=gamma, lam=lam, truncation=truncation), flat()),
        tracks=(Track("policy", trains="policy", pieces=losses, update=rmsprop(lr=lr, clip=clip_norm)),),
        networks={"policy": Network("actor_critic", tuple(hidden), activation)},
    )


@method(
    world="control",
    title="Proximal policy optimization (PPO)",
    arxiv="1707.06347",
    case="steps",
    presets={
        "cleanrl": {"truncation": "done"},
        "cleanrl_discrete": {
            "horizon": 128, "rows": 128, "passes": 4, "lr": linear(2.5e-4, 0.0), "entropy_coef": 0.01,
            "normalise_obs": False, "scale_reward": False, "truncation": "done",
        },
        "sb3": {
            "lr": 3e-4, "value_coef": 0.5, "value_clip": None, "normalise_obs": False, "scale_reward": False,
        },
    },
)  # fmt: skip
def ppo(
    *,
    horizon: int = 2048,
    rows: int | None = 64,
    passes: int = 10,
    lr: Rate = DECAY,
    gamma: float = 0.99,
    lam: float = 0.95,
    clip_at: float = 0.2,
    value_clip: float | None = 0.2,
    value_coef: float = 0.25,
    entropy_coef: float = 0.0,
    normalise_advantage: bool = True,
    normalise_obs: bool = True,
    scale_reward: bool = True,
    target_kl: float | None = None,
    clip_norm: float | None = 0.5,
    truncation: str = "bootstrap",
    hidden: tuple[int, ...] = (64, 64),
    activation: str = "tanh",
    init: str = "orthogonal",
    action_map: str = "none",
) -> Method:
    """`-mean min(r A, clip(r, 1 +- clip_at) A) + value_coef mean e - entropy_coef mean H`, `r = pi / pi_old`.

    `e` is `(V - R)^2` or, with value_clip, `max((V - R)^2, (V_old + clip(V - V_old, +-value_clip) - R)^2)`.

    The default is CleanRL's continuous one, but for two things: value_coef 0.25 is its 0.5 x 0.5 written as one number,
    and a cut episode is bootstrapped (`truncation`), which CleanRL does not do. Preset "cleanrl" takes a cut for an
    end; "cleanrl_discrete" has its numbers for numbered actions (with 4 environments); "sb3" those of
    Stable-Baselines3, where a cut is bootstrapped too.
    horizon: steps of each environment for one batch. rows, passes: decisions in a minibatch, and passes over the batch
    in a new random order each time. lr: Adam's (eps 1e-5); a schedule stands still within a batch where the budget of
    the run is in turns or decisions. gamma, lam, truncation: of `gae`. clip_at: how far from 1 the ratio counts.
    entropy_coef: what a unit of entropy is worth; at 0 it is not computed. normalise_advantage: by the mean and
    deviation of each minibatch. normalise_obs: by running moments, clipped to +-10 (`normalised_obs`); not for numbered
    observations. scale_reward: by the running deviation of the discounted return, clipped to +-10 (`scaled_reward`).
    target_kl: leave the batch once the estimated KL of a minibatch is above 1.5 times this, before its step, as in
    Stable-Baselines3 (CleanRL looks at the end of a pass, which is not offered). clip_norm: largest gradient norm of
    policy and value together. hidden, activation: of the policy and, separately, of the value. init: "orthogonal"
    (gains sqrt 2, policy 0.01, value 1) or "torch". action_map: "tanh" keeps actions inside their bounds by the policy
    itself; "none" leaves that to the environment, which clips.
    """
    ratio = surrogate(ratio=token_ratio(), bound=clip(clip_at, clip_at), shape=pessimistic())
    losses = (ratio, approx_kl(), value_error(coef=value_coef, clip=value_clip), *entropy_pieces(entropy_coef))
    credit = (gae(gamma=gamma, lam=lam, truncation=truncation), *((normalised(),) if normalise_advantage else ()))
    seeing = (normalised_obs(),) if normalise_obs else ()
    made = Method(
        "ppo",
        pieces=(*seeing, steps(horizon=horizon), logp_old(), values(), *credit, flat()),
        tracks=(Track("policy", trains="policy", pieces=losses, update=adamw(lr=lr, eps=1e-5, clip=clip_norm)),),
        networks={
            "policy": Network("actor_critic", tuple(hidden), activation, {"init": init, "action_map": action_map})
        },
    ).but(rows=rows, passes=passes)
    if scale_reward:
        made = made.wrap("credit", scaled_reward(gamma=gamma))
    return made if target_kl is None else made.wrap("update", stopped_at(limit=1.5 * target_kl))
