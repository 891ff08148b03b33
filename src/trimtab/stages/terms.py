"""Loss terms other than the surrogate. Each returns un-reduced values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.core.batch import Batch
from trimtab.core.errors import nearest
from trimtab.core.piece import piece
from trimtab.core.terms import Term

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
