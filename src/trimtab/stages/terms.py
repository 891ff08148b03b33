"""Loss terms other than the surrogate. Each returns un-reduced values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.core.batch import Batch
from trimtab.core.errors import nearest
from trimtab.core.piece import piece
from trimtab.core.terms import Term
from trimtab.stages.surrogate import old_logp

ESTIMATORS = ("k1", "k2", "k3")


@piece("loss", slot="nll", reads=("mask",), wants=("logp",))
def nll(batch: Batch, now: Mapping[str, Tensor]) -> Term:
    """`-log pi(action)`, `[N, T]`: supervised learning of the decisions in the batch."""
    return Term(-now["logp"], "nll")


def _estimator_known(options: Mapping[str, Any]) -> str | None:
    name = options["estimator"]
    return None if name in ESTIMATORS else f"estimator={name!r} is not known. {nearest(str(name), ESTIMATORS)}"


@piece("loss", slot="kl", reads=("logp_ref", "mask"), wants=("logp",), rows="policy", validate=_estimator_known)
def kl_penalty(batch: Batch, now: Mapping[str, Tensor], *, coef: float = 0.04, estimator: str = "k3") -> list[Term]:
    """`coef KL(pi || reference)` per decision, estimated on sampled decisions; `d = logp_ref - logp`.

    k1 = -d, k2 = d^2 / 2, k3 = exp(d) - d - 1 (Schulman 2020). k3 is never negative; as a loss its gradient is
    not that of the KL, k2's is, on policy.
    """
    d = (batch.logp_ref - now["logp"]) * batch.mask
    k = {"k1": lambda: -d, "k2": lambda: d.square() / 2, "k3": lambda: torch.expm1(d) - d}[estimator]()
    return [Term(coef * k, "kl_loss"), Term(k.detach(), "kl", metric=True)]


SHAPES = ("sigmoid", "hinge", "ipo")


def _preference_sane(options: Mapping[str, Any]) -> str | None:
    shape, smoothing = options["shape"], options["smoothing"]
    if shape not in SHAPES:
        return f"shape={shape!r} is not known. {nearest(str(shape), SHAPES)}"
    if not 0 <= smoothing < 0.5:
        return f"smoothing={smoothing} must be in [0, 0.5), the share of labels that are wrong"
    if smoothing and shape != "sigmoid":
        return f"smoothing={smoothing} belongs to shape='sigmoid'; shape={shape!r} would ignore it"
    return None if options["beta"] > 0 else f"beta={options['beta']} must be above 0"


@piece("loss", slot="preference", reads=("logp_ref", "pair", "preferred", "mask"), wants=("logp",),
       validate=_preference_sane, per="pair", unit="pair")  # fmt: skip
def preference(
    batch: Batch, now: Mapping[str, Tensor], *, beta: float = 0.1, shape: str = "sigmoid", smoothing: float = 0.0
) -> list[Term]:
    """One value per pair, at both of its rows; `h = sum_t m (logp - logp_ref)`, `d = h_chosen - h_rejected`.

    "sigmoid": `-(1 - s) log sigma(beta d) - s log sigma(-beta d)`, s = smoothing in [0, 0.5) (Rafailov et al. 2023,
    eq. 7; Mitchell 2023 for s > 0). "hinge": `max(0, 1 - beta d)` (Zhao et al. 2023). "ipo": `(d - 1 / (2 beta))^2`,
    its h divided by the response's length (Azar et al. 2023, eq. 17, length-averaged as in TRL).
    Metrics: `margin`, beta d, and `preferred_right`, the share of pairs with d > 0.
    """
    drift = ((now["logp"] - batch.logp_ref) * batch.mask).sum(1)
    if shape == "ipo":
        drift = drift / batch.mask.sum(1).clamp_min(1)
    d = batch.by("pair").sum(torch.where(batch.preferred.bool(), drift, -drift))
    if shape == "sigmoid":
        value = -(1 - smoothing) * F.logsigmoid(beta * d) - smoothing * F.logsigmoid(-beta * d)
    else:
        value = (1 - beta * d).clamp_min(0) if shape == "hinge" else (d - 1 / (2 * beta)).square()
    d = d.detach()
    right = Term((d > 0).to(d.dtype), "preferred_right", metric=True)
    return [Term(value, "preference"), Term(beta * d, "margin", metric=True), right]


# -- values and entropy --------------------------------------------------------------------------------------------


def _value_sane(options: Mapping[str, Any]) -> str | None:
    clip, coef = options["clip"], options["coef"]
    if clip is not None and not clip > 0:
        return f"clip={clip} must be above 0: how far the value may move; None does not clip"
    return None if coef >= 0 else f"coef={coef} must be at least 0"


@piece("loss", slot="value", reads=("value", "value_target", "mask"), wants=("value",), rows="policy",
       validate=_value_sane)  # fmt: skip
def value_error(batch: Batch, now: Mapping[str, Tensor], *, coef: float = 0.5, clip: float | None = None) -> Term:
    """`coef (V - R)^2`, `R` the column `value_target`; the name "value_loss".

    clip: `coef max((V - R)^2, (V_old + clamp(V - V_old, +-clip) - R)^2)`, `V_old` the column `value`, as PPO's released
    code has it. coef: SB3's is 0.5; CleanRL's 0.5 x 0.5.
    """
    target = batch["value_target"]
    error = (now["value"] - target).square()
    if clip is not None:
        old = batch["value"]
        error = torch.maximum(error, (old + (now["value"] - old).clamp(-clip, clip) - target).square())
    return Term(coef * error, "value_loss")


@piece("loss", slot="entropy", reads=("mask",), wants=("entropy",), rows="policy")
def entropy_bonus(batch: Batch, now: Mapping[str, Tensor], *, coef: float = 0.01) -> list[Term]:
    """`-coef H(pi(.|s))`: a wider policy costs less (Williams and Peng 1991)."""
    return [Term(-coef * now["entropy"], "entropy_loss"), Term(now["entropy"].detach(), "entropy", metric=True)]


@piece("loss", slot="approx_kl", reads=("logp_old", "mask"), wants=("logp",), rows="policy")
def approx_kl(batch: Batch, now: Mapping[str, Tensor]) -> Term:
    """A metric: `KL(pi_old || pi)` estimated on sampled decisions, `(r - 1) - log r` (Schulman 2020, k3)."""
    d = now["logp"].detach() - old_logp(batch, now)
    d = d if batch.same("mask") == 1 else d * batch["mask"]
    return Term(torch.expm1(d) - d, "approx_kl", metric=True)
