"""Natural policy gradients with a learned value: `npg`, `trpo`."""

from __future__ import annotations

import math

from trimtab.core.method import Method, Track
from trimtab.core.network import Network
from trimtab.core.piece import Schedule
from trimtab.core.registry import Neutral, method
from trimtab.stages.advantage import gae, normalised, values
from trimtab.stages.annotate import logp_old
from trimtab.stages.natural import backtracking, distribution_old, kl_from_old, natural
from trimtab.stages.steps import flat, steps
from trimtab.stages.surrogate import pessimistic, surrogate, token_ratio
from trimtab.stages.terms import value_error
from trimtab.stages.update import adamw


@method(world="control", title="Natural policy gradient (NPG)", aliases=("natural_pg",), case="steps")
def npg(
    *,
    horizon: int = 2048,
    rows: int = 128,
    passes: int = 10,
    max_kl: float = 0.01,
    lr: float | Schedule | None = None,
    damping: float = 0.1,
    iterations: int = 15,
    critic_lr: float | Schedule = 1e-3,
    gamma: float = 0.99,
    lam: float = 0.95,
    normalise_advantage: bool = True,
    truncation: str = "bootstrap",
    hidden: tuple[int, ...] = (64, 64),
    activation: str = "tanh",
) -> Method:
    """One step along `F^-1 grad mean(r A)` for each batch, `F` the Fisher matrix; the value by regression.

    Kakade 2001. The step is as long as `max_kl` allows to second order, or has the fixed size `lr`. horizon: steps of
    each environment for one batch. rows, passes: minibatches of the critic (Adam, critic_lr) and its passes over the
    batch; the policy's one step is made on all rows, with the advantages of the value before. damping, iterations: of
    conjugate gradient. normalise_advantage: over the batch. gamma, lam, truncation: of `gae`. hidden, activation: of
    the policy and of the value. Numbers as in sb3-contrib's TRPO.
    """
    objective = surrogate(ratio=token_ratio(), shape=pessimistic())
    scaled = (normalised(),) if normalise_advantage else ()
    return Method(
        "npg",
        pieces=(steps(horizon=horizon), logp_old(), distribution_old(), values(critic="critic"),
                gae(gamma=gamma, lam=lam, truncation=truncation), flat()),
        tracks=(
            Track("policy", trains="policy", pieces=(*scaled, objective, kl_from_old()), on="last",
                  update=natural(max_kl=max_kl, damping=damping, iterations=iterations, lr=lr)),
            Track("critic", trains="critic", pieces=(value_error(coef=1.0),), update=adamw(lr=critic_lr)),
        ),
        networks={
            "policy": Network("stochastic", tuple(hidden), activation),
            "critic": Network("value", tuple(hidden), activation),
        },
    ).but(rows=rows, passes=passes)  # fmt: skip


@method(
    world="control",
    title="Trust region policy optimization (TRPO)",
    arxiv="1502.05477",
    base=npg,
    case="steps",
    neutral=Neutral(
        {"slack": math.inf, "least": -math.inf},
        level="exact",
        why="a search that takes every step takes the whole one",
    ),
)
def trpo(base: Method, *, shrink: float = 0.8, tries: int = 10, slack: float = 1.0, least: float = 0.0) -> Method:
    """Edits to npg: the step is shortened until it keeps the KL and improves the surrogate; otherwise none is made.

    shrink, tries: shares 1, shrink, shrink^2, ... of the step that are looked at. slack: the KL allowed, in multiples
    of `max_kl`. least: how much the surrogate must gain. Where no share will do, the parameters stay exactly as they
    are. Schulman et al. 2015, appendix C; numbers as in sb3-contrib.
    """
    search = backtracking(shrink=shrink, tries=tries, slack=slack, least=least)
    return base.swap("policy:update.search", search)
