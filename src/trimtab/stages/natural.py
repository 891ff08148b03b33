"""Steps along the natural gradient: conjugate gradient on the curvature of the KL, and a line search that checks it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.core.batch import Batch
from trimtab.core.closure import Closure
from trimtab.core.kit import Kit
from trimtab.core.piece import Schedule, piece
from trimtab.core.terms import Term

Logs = dict[str, float | Tensor]
Vector = list[Tensor]  # one tensor for each trained parameter, in order


# -- the KL to the policy before the step ----------------------------------------------------------------------------


@piece("annotate", reads=("obs", "action", "mask"), writes=("distribution_old",))
def distribution_old(kit: Kit, batch: Batch) -> Batch:
    """The parameters of the policy's distribution at each decision before this batch's updates, `[N, T, P]`."""
    return batch.put(distribution_old=kit.evaluate("policy", batch, {"distribution"})["distribution"])


@piece("loss", slot="kl", reads=("distribution_old", "mask"), wants=("distribution",), rows="policy")
def kl_from_old(kit: Kit, batch: Batch, now: Mapping[str, Tensor]) -> Term:
    """A metric: `KL(pi || pi_old)` at each decision, exact; never summed: a trust region and its curvature."""
    policy: Any = kit.models[kit.model]
    return Term(policy.divergence(now["distribution"], batch["distribution_old"]), "kl", metric=True)


# -- the update ----------------------------------------------------------------------------------------------------


def _sane(options: Mapping[str, Any]) -> str | None:
    if not options["max_kl"] > 0:
        return f"max_kl={options['max_kl']} must be above 0: the mean KL that a step may cost"
    if not (options["damping"] >= 0 and options["iterations"] >= 1):
        return f"damping={options['damping']} must be at least 0, and iterations={options['iterations']} at least 1"
    lr = options["lr"]
    return None if lr is None or isinstance(lr, Schedule) or lr > 0 else f"lr={lr} must be above 0, or None"


@piece("update", validate=_sane)
def natural(
    kit: Kit,
    closure: Closure,
    *,
    max_kl: float = 0.01,
    damping: float = 0.1,
    iterations: int = 15,
    tolerance: float = 1e-10,
    lr: float | None = None,
    search: Callable[..., float] | None = None,
) -> tuple[Logs, bool]:
    """`theta <- theta - s x` with `(F + damping) x = g`, `g` the gradient of the loss, `F` the Hessian of the mean KL.

    `s = sqrt(2 max_kl / (x^T (F + damping) x))`, so that the KL is max_kl to second order; or `lr`, where that is
    given. iterations: of conjugate gradient, fewer once the squared residual is below `tolerance`. search: what makes
    sure of the KL and of an improvement, and may shorten the step; None takes it as it is. The loss needs a metric `kl`
    (`kl_from_old`). A zero gradient makes no step.
    Kakade 2001; Schulman et al. 2015, arXiv 1502.05477, appendix C.
    """
    made = closure()
    logs: Logs = {"loss": made.loss, "grad_norm": made.norm, **made.terms}
    if not bool(made.norm > 0):
        return {**logs, "step": 0.0}, False
    product = fisher_product(closure, damping)
    gradient = list(made.grads.values())
    direction = conjugate_gradient(product, gradient, iterations, tolerance)
    curvature = dot(direction, product(direction))
    if not bool(curvature > 0):  # nothing but rounding is left of a direction
        return {**logs, "step": 0.0}, False
    size = lr if lr is not None else float((2 * max_kl / curvature).sqrt())
    full = [-size * d for d in direction]
    share = 1.0 if search is None else search(closure, made.loss, full, max_kl)
    if share:
        with torch.no_grad():
            for parameter, d in zip(closure.params.values(), full):
                parameter.add_(share * d)
    return {**logs, "step": share, "step_size": size}, False


def _sane_search(options: Mapping[str, Any]) -> str | None:
    if not 0 < options["shrink"] < 1:
        return f"shrink={options['shrink']} must be in (0, 1): by how much a step that failed is shortened"
    if not options["tries"] >= 1:
        return f"tries={options['tries']} must be at least 1"
    return None if options["slack"] > 0 else f"slack={options['slack']} must be above 0"


@piece("part", validate=_sane_search)
def backtracking(
    closure: Closure,
    loss: Tensor,
    full: Vector,
    max_kl: float,
    *,
    shrink: float = 0.8,
    tries: int = 10,
    slack: float = 1.0,
    least: float = 0.0,
) -> float:
    """The first share 1, shrink, shrink^2, ... of the step that is good enough; 0, which is no step at all, if none is.

    Good enough: the mean KL is at most `slack max_kl`, and the loss fell by more than `least`. The parameters are not
    touched while looking. tries: how many shares.
    """
    old = {name: p.detach() for name, p in closure.params.items()}
    for k in range(tries):
        share = shrink**k
        candidate = {name: p + share * d for (name, p), d in zip(old.items(), full)}
        after, kl = measured(closure, candidate)
        if math.isfinite(after) and kl <= slack * max_kl and float(loss) - after > least:
            return share
    return 0.0


def measured(closure: Closure, params: Mapping[str, Tensor]) -> tuple[float, float]:
    """The loss and the mean KL at other parameters."""
    loss, kl = 0.0, 0.0
    with torch.no_grad():
        for terms in closure.micro(params=params):
            kl += float(terms["kl"].sum())
            loss += float(sum(t.sum() for t in terms.values() if not t.metric))
    return loss, kl


def dot(a: Vector, b: Vector) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b)]).sum()


def fisher_product(closure: Closure, damping: float) -> Callable[[Vector], Vector]:
    """`v -> F v + damping v`, `F` the Hessian of the mean KL at the current parameters, `memory` rows at a time."""
    at = {name: p.detach().clone().requires_grad_() for name, p in closure.params.items()}
    leaves = list(at.values())

    def slopes() -> Iterator[tuple[Tensor, ...]]:
        for terms in closure.micro(params=at):
            kl = terms["kl"].sum()
            yield torch.autograd.grad(kl, leaves, create_graph=True, materialize_grads=True)

    # With all rows in memory the first derivative is made once, else anew for every product.
    held = list(slopes()) if closure.kit.memory is None else None

    def product(v: Vector) -> Vector:
        total = [damping * x for x in v]
        for first in held if held is not None else slopes():
            along = dot(list(first), v)
            made = torch.autograd.grad(along, leaves, retain_graph=held is not None, materialize_grads=True)
            total = [t + m for t, m in zip(total, made)]
        return total

    return product


def conjugate_gradient(product: Callable[[Vector], Vector], b: Vector, iterations: int, tolerance: float) -> Vector:
    """`x` with `product(x) = b`, from 0; stops early where the squared residual is below `tolerance`."""
    x = [torch.zeros_like(v) for v in b]
    r, p, left = list(b), list(b), dot(b, b)
    for _ in range(iterations):
        ap = product(p)
        along = dot(p, ap)
        if not bool(along > 0):
            break
        alpha = left / along
        x = [v + alpha * d for v, d in zip(x, p)]
        r = [v - alpha * a for v, a in zip(r, ap)]
        left, before = dot(r, r), left
        if bool(left < tolerance):
            break
        p = [v + (left / before) * d for v, d in zip(r, p)]
    return x
