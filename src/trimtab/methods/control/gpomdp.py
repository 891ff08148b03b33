"""GPOMDP, the vanilla policy gradient, and its version with normalised momentum: the bases of N-PG-IGT and HARPG."""

from __future__ import annotations

from trimtab.core.method import Method, Track
from trimtab.core.network import Network
from trimtab.core.registry import Neutral, method
from trimtab.core.schedules import power
from trimtab.stages.momentum import averaging, follow, gradient
from trimtab.stages.returns import reward_to_go
from trimtab.stages.steps import episodes
from trimtab.stages.surrogate import score_function, surrogate


@method(world="control", title="GPOMDP: the vanilla policy gradient on rewards to go", case="table")
def gpomdp(
    *,
    lr: float = 1e-3,
    decay: float = 2 / 3,
    unit: bool = False,
    count: int = 1,
    discount: float = 0.99,
    from_start: bool = True,
    baseline: float | None = None,
) -> Method:
    """`theta <- theta + lr_t mean_i sum_h Psi_h grad log pi(a_h|s_h)`, `lr_t = lr (2 / (t + 2))^decay`.

    Baxter and Bartlett 2001; step rule of Fatkhullin et al. 2023, arXiv 2302.01734, for vanilla policy gradient. Whole
    episodes, one update a batch; `Psi_h` are the rewards from h on (see `reward_to_go`), and nothing is bootstrapped.
    lr, decay: the first step, and how fast steps shrink (t counts batches); 0 keeps them. The gradient is a sum over
    the decisions of an episode, so long ones need small steps. unit: divide the step by the gradient's norm. count:
    episodes a batch. discount: in [0, 1]. from_start: discount from the start of the episode (the exact gradient of the
    discounted return) or from each decision (common in practice). baseline: memory in [0, 1) of a running mean of
    `Psi_h` at each place h, subtracted; None for none.
    """
    return Method(
        "gpomdp",
        pieces=(episodes(count=count), reward_to_go(discount=discount, from_start=from_start, baseline=baseline)),
        tracks=(
            Track("policy", trains="policy", pieces=(surrogate(shape=score_function(), per="row_sum"),),
                  update=follow(direction=gradient(), lr=power(lr, decay), unit=unit)),
        ),
        networks={"policy": Network("stochastic")},
    )  # fmt: skip


@method(
    world="control",
    title="Normalised SGD with momentum (N-SGDM)",
    base=gpomdp,
    case="table",
    neutral=Neutral({"eta_decay": 0.0}, base_options={"lr": 0.1, "decay": 1.0, "unit": True}),
)
def n_sgdm(base: Method, *, lr: float = 0.1, decay: float = 1.0, eta0: float = 1.0, eta_decay: float = 2 / 3) -> Method:
    """Edits to gpomdp: the step follows a running average of gradients, and is normalised.

    `d_t = (1 - eta_t) d_{t-1} + eta_t g_t`, `theta <- theta - lr_t d_t / |d_t|`: what N-PG-IGT and HARPG are compared
    with in Fatkhullin et al. 2023, arXiv 2302.01734. Old gradients belong to old parameters, so `|d_t - g(theta_t)|`
    falls as `t^(-1/3)` only.
    lr, decay: `lr_t = lr (2 / (t + 2))^decay`. eta0, eta_decay: `eta_t = eta0 (2 / (t + 2))^eta_decay`, at most 1.
    """
    eta = power(eta0, eta_decay, ceiling=1.0)
    return base.swap("update", follow(direction=averaging(eta), lr=power(lr, decay), unit=True))
