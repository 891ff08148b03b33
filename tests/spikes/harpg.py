"""Normalised HARPG and N-PG-IGT on a tabular MDP: gradients and Hessian-vector products at other parameters.

Fatkhullin, Barakat, Kireeva and He 2023, arXiv 2302.01734. Everything here is in loss space: `d` tracks `-grad J`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.core.batch import Batch
from trimtab.core.closure import Closure
from trimtab.core.copies import mix, previous
from trimtab.core.kit import Kit
from trimtab.core.loop import rows_where
from trimtab.core.method import Method, Track
from trimtab.core.piece import piece
from trimtab.core.registry import Neutral, method
from trimtab.core.schedules import inverse, power
from trimtab.core.terms import SOURCES, Term

Vector = dict[str, Tensor]
CURRENT, MIDPOINT = 0, 1  # values of the column `point`: whose parameters sampled a row

# -- environment and policy ----------------------------------------------------------------------------------------


class RandomMDP:
    """`P(.|s,a)` Dirichlet(0.3), `R(s,a)` uniform on [0, 1], uniform start, a fixed horizon."""

    def __init__(
        self, states: int = 6, actions: int = 3, horizon: int = 20, discount: float = 0.9, seed: int = 0
    ) -> None:
        draw = np.random.default_rng(seed)
        self.states, self.actions, self.horizon, self.discount = states, actions, horizon, discount
        self.transition = torch.from_numpy(draw.dirichlet([0.3] * states, size=(states, actions)))
        self.reward = torch.from_numpy(draw.random((states, actions)))
        self.episodes = 0

    def rollout(self, probs: Tensor, n: int, rng: torch.Generator) -> dict[str, Tensor]:
        """`n` episodes of the policy `probs` [S, A]; all randomness is drawn from `rng`."""
        uniform = torch.rand(n, self.horizon, 2, generator=rng, dtype=torch.float64)
        state = torch.randint(self.states, (n,), generator=rng)
        choose, move = probs.cumsum(-1), self.transition.cumsum(-1)
        seen, done = [], []
        for h in range(self.horizon):
            action = (choose[state] < uniform[:, h, :1]).sum(-1).clamp_max(self.actions - 1)
            seen.append(state)
            done.append(action)
            state = (move[state, action] < uniform[:, h, 1:]).sum(-1).clamp_max(self.states - 1)
        obs, action = torch.stack(seen, 1), torch.stack(done, 1)
        self.episodes += n
        return {"obs": obs, "action": action, "reward": self.reward[obs, action]}

    def objective(self, logits: Tensor) -> Tensor:
        """`J` of a softmax table by dynamic programming, 0-d, differentiable."""
        probs, value = logits.softmax(-1), logits.new_zeros(self.states)
        for _ in range(self.horizon):
            value = (probs * (self.reward + self.discount * self.transition @ value)).sum(-1)
        return value.mean()

    def state_dict(self) -> dict[str, Any]:
        return {"episodes": self.episodes}

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        self.episodes = tree["episodes"]


class TableSoftmax(nn.Module):
    """`pi(a|s) = softmax(logits[s])`, float64."""

    provides = frozenset({"logp"})

    def __init__(self, states: int, actions: int, seed: int | None = None) -> None:
        super().__init__()
        start = torch.zeros(states, actions, dtype=torch.float64)
        if seed is not None:
            start.normal_(generator=torch.Generator().manual_seed(seed))
        self.logits = nn.Parameter(start)

    def evaluate(self, batch: Batch, want: frozenset[str]) -> dict[str, Tensor]:
        logp = self.logits.log_softmax(-1)[batch.obs, batch.action] * batch.mask
        return {"logp": logp} if "logp" in want else {}


# -- collect, credit, loss -----------------------------------------------------------------------------------------

_COLUMNS = ("obs", "action", "mask", "reward", "logp_behavior", "source", "age", "point")


def episodes_of(kit: Kit, name: str, n: int, point: int) -> Batch:
    """`n` episodes of the model or copy `name`; one random stream per point, so a second one changes nothing."""
    policy: Any = kit.models[name]
    made = kit.environment.rollout(policy.logits.softmax(-1), n, kit.rng(f"rollout/{point}"))
    logp = policy.logits.log_softmax(-1)[made["obs"], made["action"]]
    return Batch(
        {
            **made,
            "mask": torch.ones_like(made["obs"], dtype=torch.bool),
            "logp_behavior": logp,
            "source": torch.full((n,), SOURCES.index("policy")),
            "age": torch.zeros(n, dtype=torch.long),
            "point": torch.full((n,), point),
        }
    )


@piece("collect", writes=_COLUMNS)
def trajectories(kit: Kit, *, episodes: int = 1, policy: str = "policy") -> Batch:
    """`episodes` whole episodes sampled by the model or copy named `policy`."""
    batch = episodes_of(kit, policy, episodes, CURRENT)
    kit.log("reward", batch.score().mean())
    return batch


@piece("collect", writes=_COLUMNS, uses=("midpoint",))
def also_at_midpoint(kit: Kit, *, inner: Callable[[], Batch], episodes: int = 1) -> Batch:
    """A wrap: rows of the copy "midpoint" (`point` = 1) after those of the collect inside."""
    return Batch.cat([inner(), episodes_of(kit, "midpoint", episodes, MIDPOINT)])


@piece("credit", reads=("reward", "mask"), writes=("advantage",))
def reward_to_go(batch: Batch, *, discount: float = 0.9) -> Batch:
    """`Psi_h = sum_{t >= h} discount^t r_t`, `[N, T]`: discounted from time 0, no baseline."""
    time = torch.arange(batch.reward.shape[1], dtype=batch.reward.dtype)
    return batch.put(advantage=(discount**time * batch.reward).flip(1).cumsum(1).flip(1) * batch.mask)


@piece("loss", slot="objective", reads=("advantage", "mask"), wants=("logp",), per="row_sum")
def gpomdp_objective(batch: Batch, now: Mapping[str, Tensor]) -> list[Term]:
    """`-Phi = -sum_h Psi_h log pi(a_h|s_h)` per row; the metric `log_prob` carries the rows' scores to a curvature."""
    return [Term(-batch.advantage * now["logp"], "objective"), Term(now["logp"], "log_prob", metric=True)]


# -- update: one step along a direction, and four directions --------------------------------------------------------


@piece("update")
def follow(
    kit: Kit, closure: Closure, *, direction: Callable[[Closure], Vector], lr: float, unit: bool = False
) -> tuple[dict[str, float | Tensor], bool]:
    """`theta <- theta - lr d`, or `- lr d / |d|` with `unit` (global l2 norm); `d = 0` does not move."""
    d = direction(closure)
    norm = torch.nn.utils.get_total_norm(list(d.values()))
    scale = lr / norm if unit and bool(norm > 0) else lr
    with torch.no_grad():
        for name, parameter in closure.params.items():
            parameter.sub_(scale * d[name])
    return {"direction_norm": norm, "lr": lr}, False


def no_estimate(kit: Kit, options: Mapping[str, Any]) -> dict[str, Any]:
    """`d` before the first gradient: zeros, `count` 0."""
    trained = kit.models[kit.model].named_parameters()
    return {"count": 0, "d": {n: torch.zeros_like(p.detach()) for n, p in trained if p.requires_grad}}


def averaged(own: dict[str, Any], moved: Vector | None, gradient: Vector, eta: float) -> dict[str, Any]:
    """`d_t = (1 - eta) (d_{t-1} + moved) + eta g`, and `d_0 = g`."""
    if own["count"] == 0:
        return {"count": 1, "d": dict(gradient)}
    old = own["d"] if moved is None else {n: d + moved[n] for n, d in own["d"].items()}
    return {"count": own["count"] + 1, "d": {n: (1 - eta) * d + eta * gradient[n] for n, d in old.items()}}


def parameters_of(kit: Kit, name: str, closure: Closure) -> Vector:
    """The parameters of a copy, under the names that the closure trains."""
    found = dict(kit.models[name].named_parameters())
    return {n: found[n].detach() for n in closure.params}


@piece("part")
def gradient(closure: Closure) -> Vector:
    """`d = g`."""
    return closure().grads


@piece("part", state={"estimate": no_estimate})
def averaging(kit: Kit, closure: Closure, *, eta: float) -> Vector:
    """`d_t = (1 - eta) d_{t-1} + eta g(theta_t)`: N-SGDM's direction, biased by what theta moved."""
    kit.state["estimate"] = averaged(kit.state["estimate"], None, closure().grads, eta)
    return kit.state["estimate"]["d"]


@piece("part", state={"estimate": no_estimate}, uses=("lookahead",))
def transported(kit: Kit, closure: Closure, *, eta: float) -> Vector:
    """`d_t = (1 - eta) d_{t-1} + eta g(theta~_t)`, rows and log-probs at the copy "lookahead" (N-PG-IGT, step 3)."""
    made = closure(params=parameters_of(kit, "lookahead", closure))
    kit.state["estimate"] = averaged(kit.state["estimate"], None, made.grads, eta)
    return kit.state["estimate"]["d"]


@piece("part", reads=("point",), state={"estimate": no_estimate}, uses=("midpoint", "previous"))
def corrected(kit: Kit, closure: Closure, *, eta: float) -> Vector:
    """`d_t = (1 - eta) (d_{t-1} + B(tau^, theta^) (theta_t - theta_{t-1})) + eta g(tau, theta_t)` (HARPG, step 3)."""
    made = closure(where=rows_where(closure.batch, "point", CURRENT))
    before = parameters_of(kit, "previous", closure)
    moved = {n: p.detach() - before[n] for n, p in closure.params.items()}
    at = parameters_of(kit, "midpoint", closure)
    change = hessian_vector(closure, at, rows_where(closure.batch, "point", MIDPOINT), moved)
    kit.state["estimate"] = averaged(kit.state["estimate"], change, made.grads, eta)
    return kit.state["estimate"]["d"]


def hessian_vector(closure: Closure, at: Vector, where: Tensor, v: Vector) -> Vector:
    """`mean_i [ hess Phi_i v + grad Phi_i <grad log p_i, v> ]` over the chosen rows, sampled at `at` (loss space).

    The scalar product is taken per trajectory: the mean of products is unbiased for `hess J v`, a product of means not.
    """
    leaves = {n: p.detach().clone().requires_grad_() for n, p in at.items()}
    terms = closure.terms(params=leaves, where=where)
    share = (terms["objective"].value * terms["objective"].weight).sum(1)
    along = score_along(terms["log_prob"].value.sum(1), leaves, v)
    first = torch.autograd.grad(share.sum(), list(leaves.values()), create_graph=True)
    slope = torch.stack([(g * u).sum() for g, u in zip(first, v.values())]).sum()
    return dict(zip(leaves, torch.autograd.grad(slope + (share * along).sum(), list(leaves.values()))))


def score_along(log_prob: Tensor, leaves: Vector, v: Vector) -> Tensor:
    """`<grad log p_i, v>` for every row, `[N]`, without gradient: a forward derivative by two backward passes."""
    dummy = torch.ones_like(log_prob, requires_grad=True)
    rows = torch.autograd.grad((dummy * log_prob).sum(), list(leaves.values()), create_graph=True)
    return torch.autograd.grad(torch.stack([(g * u).sum() for g, u in zip(rows, v.values())]).sum(), dummy)[0]


# -- methods -------------------------------------------------------------------------------------------------------


@method(world="control", title="GPOMDP: vanilla policy gradient with reward-to-go", case="mdp", register=False)
def gpomdp(
    *, lr: float = 0.1, decay: float = 2 / 3, unit: bool = False, episodes: int = 1, discount: float = 0.9
) -> Method:
    """`theta <- theta + lr_t grad Phi`, `lr_t = lr (2 / (t + 2))^decay`; unit: divide the step by its norm."""
    return Method(
        "gpomdp",
        pieces=(trajectories(episodes=episodes), reward_to_go(discount=discount)),
        tracks=(
            Track("policy", trains="policy", pieces=(gpomdp_objective(),),
                  update=follow(direction=gradient(), lr=power(lr, decay), unit=unit)),
        ),
    )  # fmt: skip


@method(
    world="control",
    title="Normalised SGD with momentum (N-SGDM)",
    base=gpomdp,
    case="mdp",
    register=False,
    neutral=Neutral({"eta_decay": 0.0}, base_options={"decay": 1.0, "unit": True}),
)
def n_sgdm(base: Method, *, lr: float = 0.1, decay: float = 1.0, eta0: float = 1.0, eta_decay: float = 2 / 3) -> Method:
    """Edits to gpomdp: the direction is a running average; the step is normalised."""
    eta = power(eta0, eta_decay, ceiling=1.0)
    return base.swap("update", follow(direction=averaging(eta), lr=power(lr, decay), unit=True))


@method(
    world="control",
    title="Stochastic Policy Gradient Methods: N-PG-IGT",
    arxiv="2302.01734",
    base=gpomdp,
    case="mdp",
    register=False,
    neutral=Neutral({"eta_decay": 0.0}, base_options={"decay": 1.0, "unit": True}),
)
def n_pg_igt(base: Method, *, lr: float = 0.1, decay: float = 1.0, eta0: float = 1.0, eta_decay: float = 0.8) -> Method:
    """Edits to gpomdp: rows and gradient come from a lookahead point; their running average is followed, normalised.

    `theta~_t = theta_t / eta_t + (1 - 1 / eta_t) theta_{t-1}`. The released code looks ahead with the eta of the step
    before; we use `eta_t` for both.
    """
    eta = power(eta0, eta_decay, ceiling=1.0)
    return (
        base.swap("collect.policy", "lookahead")
        .swap("update", follow(direction=transported(eta), lr=power(lr, decay), unit=True))
        .but(copies={"previous": previous("policy"), "lookahead": mix("policy", "previous", inverse(eta))})
    )


@method(
    world="control",
    title="Stochastic Policy Gradient Methods: (N)-HARPG",
    arxiv="2302.01734",
    base=gpomdp,
    case="mdp",
    register=False,
    neutral=Neutral({"eta_decay": 0.0}, base_options={"decay": 0.5}),
    presets={"normalised": {"unit": True, "decay": 1.0}},
)
def harpg(
    base: Method,
    *,
    lr: float = 0.1,
    decay: float = 0.5,
    unit: bool = False,
    eta0: float = 1.0,
    eta_decay: float = 1.0,
    hessian_episodes: int = 1,
) -> Method:
    """Edits to gpomdp: more rows, from a random point between theta_{t-1} and theta_t; a Hessian-corrected average.

    preset "normalised" is N-HARPG. The released code has the outer product's sign wrong and multiplies batch means; we
    follow the paper.
    """
    eta = power(eta0, eta_decay, ceiling=1.0)
    return (
        base.wrap("collect", also_at_midpoint(episodes=hessian_episodes))
        .swap("update", follow(direction=corrected(eta), lr=power(lr, decay), unit=unit))
        .but(
            copies={
                "previous": previous("policy"),
                "midpoint": mix("policy", "previous", "uniform"),
            }
        )
    )


def case(seed: int = 0) -> tuple[RandomMDP, dict[str, nn.Module]]:
    environment = RandomMDP(states=4, actions=3, horizon=5)
    return environment, {"policy": TableSoftmax(environment.states, environment.actions, seed)}


CASES = {
    "gpomdp": (gpomdp, case),
    "n_sgdm": (n_sgdm, case),
    "n_pg_igt": (n_pg_igt, case),
    "harpg": (harpg, case),
    "n_harpg": (partial(harpg, preset="normalised"), case),
}
