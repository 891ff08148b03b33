"""Directions that track the gradient while the parameters move, and one step along them.

`g` is the gradient of the track's losses, so everything here is in loss space: `d` tracks `-grad J`. The directions
need gradients at another point and Hessian-vector products, one trajectory a row; none needs importance weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.core.batch import Batch
from trimtab.core.closure import Closure
from trimtab.core.errors import NonFiniteError
from trimtab.core.kit import Kit
from trimtab.core.loop import rows_where
from trimtab.core.piece import Schedule, piece
from trimtab.core.terms import Term, rows_of

Vector = dict[str, Tensor]
CURRENT, ELSEWHERE = 0, 1  # values of the column `point`: whose parameters sampled a row


# -- rows from two points, and what their curvature needs ---------------------------------------------------------


def _weight_sane(options: Mapping[str, Any]) -> str | None:
    weight = options["weight"]
    return None if isinstance(weight, Schedule) or weight >= 0 else f"weight={weight} must be at least 0"


@piece("collect", writes=("point",), validate=_weight_sane)
def beside(kit: Kit, *, inner: Callable[[], Batch], also: Callable[[], Batch], weight: float = 1.0) -> Batch:
    """A wrap: the rows of another collect (`point` = 1) after those of the one inside (`point` = 0).

    weight: of what the other rows are for, a number or a schedule; where it is 0 they are not collected.
    """
    rows = kit.counted(inner)
    rows = rows.put(point=torch.full((len(rows),), CURRENT))
    if weight <= 0:
        return rows
    others = kit.counted(also)
    return Batch.cat([rows, others.put(point=torch.full((len(others),), ELSEWHERE))])


@piece("loss", reads=("mask",), wants=("logp",), idle=lambda batch: rows_of(batch, None))
def with_log_prob(batch: Batch, now: Mapping[str, Tensor], *, inner: Callable[..., Any]) -> list[Term]:
    """A wrap: the loss inside, and beside it the metric `log_prob`, whose gradient is each row's score."""
    made = inner(batch, now)
    return [*([made] if isinstance(made, Term) else made), Term(now["logp"], "log_prob", metric=True)]


# -- one step along a direction ----------------------------------------------------------------------------------


def _step_sane(options: Mapping[str, Any]) -> str | None:
    lr = options["lr"]
    return None if isinstance(lr, Schedule) or lr >= 0 else f"lr={lr} must be at least 0"


_LONG_STEPS = (
    "Steps are lr |d| long here, and d is a sum over the decisions of an episode: long episodes or large rewards make "
    "them long. Look at direction_norm of the turns before: lr times it is how far the parameters moved. Lower "
    "update.lr, or set update.unit=True (harpg's preset 'normalised' does) for steps of length lr whatever the rewards."
)


@piece("update", validate=_step_sane)
def follow(
    kit: Kit, closure: Closure, *, direction: Callable[[Closure], Vector], lr: float, unit: bool = False
) -> tuple[dict[str, float | Tensor], bool]:
    """`theta <- theta - lr d`, or `theta - lr d / |d|` with `unit`; `d = 0` does not move.

    `|d|` is the l2 norm over all parameters of the track. Raises NonFiniteError, before anything moves, when it or what
    it is made of is nan or infinite.
    """
    remedy = "" if unit else f" {_LONG_STEPS}"
    try:
        d = direction(closure)
    except NonFiniteError as error:
        raise NonFiniteError(f"{error}{remedy}") from error
    norm = float(torch.nn.utils.get_total_norm(list(d.values())))
    if not norm < float("inf"):
        raise NonFiniteError(
            f"the direction of track {closure.track.name!r} is not finite at update {kit.clock.updates}; no parameter "
            f"was changed. A step that is too large for its curvature gives this: lower lr.{remedy}"
        )
    scale = (lr / norm if norm > 0 else 0.0) if unit else lr
    with torch.no_grad():
        for name, parameter in closure.params.items():
            parameter.sub_(scale * d[name])
    return {"direction_norm": norm, "lr": lr}, False


# -- directions --------------------------------------------------------------------------------------------------


def no_estimate(kit: Kit, options: Mapping[str, Any]) -> dict[str, Any]:
    """`d` before the first gradient: zeros, `count` 0."""
    trained = kit.models[kit.model].named_parameters()
    return {"count": 0, "d": {n: torch.zeros_like(p.detach()) for n, p in trained if p.requires_grad}}


def averaged(own: Mapping[str, Any], moved: Vector | None, gradient: Vector, eta: float) -> dict[str, Any]:
    """`d_t = (1 - eta) (d_{t-1} + moved) + eta g`, and `d_0 = g`; all by name."""
    if own["count"] == 0:
        return {"count": 1, "d": dict(gradient)}
    old = own["d"] if moved is None else {n: d + moved[n] for n, d in own["d"].items()}
    return {"count": own["count"] + 1, "d": {n: (1 - eta) * d + eta * gradient[n] for n, d in old.items()}}


def parameters_of(kit: Kit, name: str, closure: Closure) -> Vector:
    """The parameters of a copy, detached, under the names that the closure trains."""
    found = dict(kit.models[name].named_parameters())
    return {n: found[n].detach() for n in closure.params}


@piece("part")
def gradient(closure: Closure) -> Vector:
    """`d = g`."""
    return closure().grads


def _eta_sane(options: Mapping[str, Any]) -> str | None:
    eta = options["eta"]
    return None if isinstance(eta, Schedule) or 0 < eta <= 1 else f"eta={eta} must be in (0, 1]"


@piece("part", state={"estimate": no_estimate}, validate=_eta_sane)
def averaging(kit: Kit, closure: Closure, *, eta: float) -> Vector:
    """`d_t = (1 - eta) d_{t-1} + eta g(theta_t)`: plain momentum, biased by what theta moved since."""
    kit.state["estimate"] = averaged(kit.state["estimate"], None, closure().grads, eta)
    return dict(kit.state["estimate"]["d"])


@piece("part", state={"estimate": no_estimate}, uses=("lookahead",), validate=_eta_sane)
def transported(kit: Kit, closure: Closure, *, eta: float) -> Vector:
    """`d_t = (1 - eta) d_{t-1} + eta g(theta~_t)`: rows and log-probabilities at the copy "lookahead".

    With `theta~_t = theta_t + (1 - eta) / eta (theta_t - theta_{t-1})` the average is `g(theta_t)` up to second order
    (implicit gradient transport; Fatkhullin et al. 2023, arXiv 2302.01734, algorithm N-PG-IGT). eta: in (0, 1].
    """
    made = closure(params=parameters_of(kit, "lookahead", closure))
    kit.state["estimate"] = averaged(kit.state["estimate"], None, made.grads, eta)
    return dict(kit.state["estimate"]["d"])


@piece("part", reads=("point",), state={"estimate": no_estimate}, uses=("midpoint", "previous"), validate=_eta_sane)
def corrected(kit: Kit, closure: Closure, *, eta: float, outer: float = 1.0) -> Vector:
    """`d_t = (1 - eta) (d_{t-1} + B(tau^, theta^) (theta_t - theta_{t-1})) + eta g(tau, theta_t)`.

    `tau^` are the rows with `point` = 1, sampled at the copy "midpoint", a uniform point of the last step, so the
    second term is an unbiased estimate of what the gradient changed (Fatkhullin et al. 2023, arXiv 2302.01734, HARPG).
    eta: in (0, 1]. outer: factor of the curvature's outer product; only 1 is unbiased, the released code has its sign
    wrong.
    """
    made = closure(where=rows_where(closure.batch, "point", CURRENT))
    elsewhere = rows_where(closure.batch, "point", ELSEWHERE)
    change: Vector | None = None
    if bool(elsewhere.any()):
        before = parameters_of(kit, "previous", closure)
        moved = {n: p.detach() - before[n] for n, p in closure.params.items()}
        change = hessian_vector(closure, parameters_of(kit, "midpoint", closure), elsewhere, moved, outer)
    kit.state["estimate"] = averaged(kit.state["estimate"], change, made.grads, eta)
    return dict(kit.state["estimate"]["d"])


# -- curvature ---------------------------------------------------------------------------------------------------


def hessian_vector(closure: Closure, at: Vector, where: Tensor, v: Vector, outer: float = 1.0) -> Vector:
    """`sum_i [ hess L_i v + outer grad L_i <grad log p_i, v> ]` over the chosen rows, which were sampled at `at`.

    `L_i` is the row's share of the loss. In expectation over rows this is the Hessian of the expected loss times `v`.
    The scalar product is taken per row: a mean of products is unbiased, a product of means is not.
    at, v: by name, like the trained parameters. Needs the metric `log_prob` (`with_log_prob`).
    """
    leaves = {n: p.detach().clone().requires_grad_() for n, p in at.items()}
    total = {n: torch.zeros_like(p) for n, p in at.items()}
    for terms in closure.micro(params=leaves, where=where):
        shares = [(t.value * t.weight).sum(1) for t in terms.values() if not t.metric]
        share = torch.stack(shares).sum(0)
        along = score_along(terms["log_prob"].value.sum(1), leaves, v)
        first = torch.autograd.grad(share.sum(), list(leaves.values()), create_graph=True)
        slope = torch.stack([(g * u).sum() for g, u in zip(first, v.values())]).sum()
        made = torch.autograd.grad(slope + outer * (share * along).sum(), list(leaves.values()))
        total = {n: t + m for (n, t), m in zip(total.items(), made)}
    return total


def score_along(log_prob: Tensor, leaves: Vector, v: Vector) -> Tensor:
    """`<grad log p_i, v>` for every row, `[N]`, without gradient: a forward derivative by two backward passes."""
    dummy = torch.ones_like(log_prob, requires_grad=True)
    rows = torch.autograd.grad((dummy * log_prob).sum(), list(leaves.values()), create_graph=True)
    return torch.autograd.grad(torch.stack([(g * u).sum() for g, u in zip(rows, v.values())]).sum(), dummy)[0]
