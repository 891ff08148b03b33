"""N-PG-IGT: momentum whose gradients come from a point ahead, so that their average belongs to where we are."""

from __future__ import annotations

from trimtab.core.copies import mix, previous
from trimtab.core.method import Method
from trimtab.core.registry import Neutral, method
from trimtab.core.schedules import inverse, power
from trimtab.methods.control.gpomdp import gpomdp
from trimtab.stages.momentum import follow, transported


@method(
    world="control",
    title="Stochastic Policy Gradient Methods for Fisher-non-degenerate Policies: N-PG-IGT",
    arxiv="2302.01734",
    base=gpomdp,
    case="table",
    neutral=Neutral(
        {"eta_decay": 0.0},
        base_options={"lr": 0.1, "decay": 1.0, "unit": True},
        why="with eta = 1 nothing old is averaged, and the point ahead is the point itself",
    ),
)
def n_pg_igt(base: Method, *, lr: float = 0.1, decay: float = 1.0, eta0: float = 1.0, eta_decay: float = 0.8) -> Method:
    """Edits to gpomdp: episodes and gradients come from a point ahead; their running average is followed, normalised.

    `theta~_t = theta_t + (1 - eta_t) / eta_t (theta_t - theta_{t-1})`, `d_t = (1 - eta_t) d_{t-1} + eta_t g(theta~_t)`,
    `theta_{t+1} = theta_t - lr_t d_t / |d_t|`: no importance weights, one episode a step.
    lr, decay: `lr_t = lr (2 / (t + 2))^decay`. eta0, eta_decay: `eta_t = eta0 (2 / (t + 2))^eta_decay`, at most 1.

    The released code looks ahead with the eta of the step before; the paper, and we, use `eta_t` for both.
    """
    eta = power(eta0, eta_decay, ceiling=1.0)
    return (
        base.swap("collect.policy", "lookahead")
        .swap("update", follow(direction=transported(eta), lr=power(lr, decay), unit=True))
        .but(copies={"previous": previous("policy"), "lookahead": mix("policy", "previous", inverse(eta))})
    )
