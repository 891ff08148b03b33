"""HARPG and N-HARPG: momentum corrected by a Hessian-vector product at a random point of the last step."""

from __future__ import annotations

from trimtab.core.copies import mix, previous
from trimtab.core.method import Method
from trimtab.core.registry import Neutral, method
from trimtab.core.schedules import complement, power
from trimtab.methods.control.gpomdp import gpomdp
from trimtab.stages.momentum import beside, corrected, follow, with_log_prob


@method(
    world="control",
    title="Stochastic Policy Gradient Methods for Fisher-non-degenerate Policies: HARPG and N-HARPG",
    base=gpomdp,
    case="table",
    neutral=Neutral(
        {"eta_decay": 0.0},
        base_options={"decay": 0.5},
        why="with eta = 1 nothing old is kept, so there is nothing to correct and no second episode is played",
    ),
    presets={"normalised": {"lr": 0.1, "unit": True, "decay": 1.0}},
)
def harpg(
    base: Method,
    *,
    lr: float = 1e-3,
    decay: float = 0.5,
    unit: bool = False,
    eta0: float = 1.0,
    eta_decay: float = 1.0,
    count: int = 1,
    outer: float = 1.0,
) -> Method:
    """Edits to gpomdp: more episodes, from a random point between theta_{t-1} and theta_t; a corrected running average.

    `theta^ = q theta_t + (1 - q) theta_{t-1}`, `q ~ U[0, 1]`;
    `d_t = (1 - eta_t) (d_{t-1} + B(tau^, theta^) (theta_t - theta_{t-1})) + eta_t g(tau, theta_t)`,
    `B = grad Phi (grad log p)^T + hess Phi` per trajectory. Fatkhullin et al. 2023, arXiv 2302.01734.

    lr, decay: `lr_t = lr (2 / (t + 2))^decay`. unit: divide the step by |d_t|; the preset "normalised" is N-HARPG.
    eta0, eta_decay: `eta_t = eta0 (2 / (t + 2))^eta_decay`, at most 1. count: episodes from theta^ a batch; none are
    played while eta_t is 1. outer: factor of the outer product `grad Phi (grad log p)^T`; only 1 is unbiased.

    Without unit a step is `lr_t |d_t|` long, and |d| grows with the length of episodes and their rewards: it begins at
    2e4 on Pendulum-v1, where an lr of 1e-6 holds and the default does not.
    Needs a policy that can be differentiated twice with effect: tanh layers, not ReLU. The released code has the sign
    of the outer product wrong, multiplies batch means instead of averaging products, and averages log-probabilities
    over steps; we follow the paper.
    """
    eta = power(eta0, eta_decay, ceiling=1.0)
    also = base.get("collect").core.assign(["policy"], "midpoint").assign(["count"], count)
    return (
        base.wrap("collect", beside(also=also, weight=complement(eta)))
        .wrap("surrogate", with_log_prob())
        .swap("update", follow(direction=corrected(eta, outer), lr=power(lr, decay), unit=unit))
        .but(copies={"previous": previous("policy"), "midpoint": mix("policy", "previous", "uniform")})
    )
