"""Parts and terms for data that the current policy did not make: hard masks, detached weights, penalties on drift.

Ratio, mask and weight are constants here: the only gradient is that of `log pi`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.core.batch import Batch
from trimtab.core.errors import nearest
from trimtab.core.kit import Kit
from trimtab.core.piece import piece
from trimtab.core.terms import Term
from trimtab.stages.credit import centred
from trimtab.stages.surrogate import Bound, Now, old_logp

LEVELS = ("token", "sequence")

# -- parts: shape ------------------------------------------------------------------------------------------------
# What the surrogate reports as `clip_high` and `clip_low` is what the bound takes out on the side that `pessimistic`
# would clip; `two_side` takes out more.


def _held(keep: Tensor, advantage: Tensor, now: Now) -> Tensor:
    return torch.where(keep, -advantage * now["logp"], 0.0)


@piece("part", wants=("logp",))
def one_side(batch: Batch, now: Now, advantage: Tensor, ratio: Tensor, bound: Bound) -> Tensor:
    """`-A log pi` where `A >= 0 and r <= high` or `A <= 0 and r >= low`, else 0: where `pessimistic` has a gradient.

    Weighted by the detached ratio, its gradient is that of `pessimistic`. REC-OneSide, arXiv 2509.24203.
    """
    low, high = bound
    return _held(((advantage >= 0) & (ratio <= high)) | ((advantage <= 0) & (ratio >= low)), advantage, now)


@piece("part", wants=("logp",))
def two_side(batch: Batch, now: Now, advantage: Tensor, ratio: Tensor, bound: Bound) -> Tensor:
    """`-A log pi` where `low <= r <= high`, whatever the sign of A, else 0. REC-TwoSide, arXiv 2509.24203."""
    low, high = bound
    return _held((ratio >= low) & (ratio <= high), advantage, now)


def _outer_sane(options: Mapping[str, Any]) -> str | None:
    low, high = options["outer_low"], options["outer_high"]
    if isinstance(low, (int, float)) and not 0 <= low <= 1:
        return f"outer_low={low} must be in [0, 1]: decisions come back in where the ratio is at most 1 - outer_low"
    if isinstance(high, (int, float)) and not high >= 0:
        return f"outer_high={high} must be at least 0: decisions come back in where the ratio is 1 + outer_high or more"
    return None


@piece("part", wants=("logp",), validate=_outer_sane)
def ring(
    batch: Batch,
    now: Now,
    advantage: Tensor,
    ratio: Tensor,
    bound: Bound,
    *,
    outer_low: float = 0.6,
    outer_high: float = 2.0,
) -> Tensor:
    """`two_side`, and decisions that went far the wrong way come back in. REC-Ring, arXiv 2509.24203.

    That is `A >= 0 and r <= 1 - outer_low`, or `A <= 0 and r >= 1 + outer_high`.
    """
    low, high = bound
    inside = (ratio >= low) & (ratio <= high)
    wrong = ((advantage >= 0) & (ratio <= 1 - outer_low)) | ((advantage <= 0) & (ratio >= 1 + outer_high))
    return _held(inside | wrong, advantage, now)


# -- parts: weight -----------------------------------------------------------------------------------------------


@piece("part")
def importance(
    batch: Batch, now: Now, bounded: Tensor | None, bound: Bound | None, *, ratio: Callable[..., Tensor]
) -> Tensor:
    """`sg(r)`: importance sampling by a ratio of its own, which need not be the one that is bounded."""
    return ratio(batch, now).detach()


def _temp_sane(options: Mapping[str, Any]) -> str | None:
    temp = options["temp"]
    return f"temp={temp} must be above 0" if isinstance(temp, (int, float)) and not temp > 0 else None


@piece("part", reads=("advantage",), validate=_temp_sane)
def exp_advantage(batch: Batch, now: Now, bounded: Tensor | None, bound: Bound | None, *, temp: float = 1.0) -> Tensor:
    """`exp(A / temp)`: better decisions weigh more (RED-Weight, arXiv 2509.24203); temp -> inf is no weight."""
    return (batch.advantage / temp).exp()


# -- credit ------------------------------------------------------------------------------------------------------


@piece("credit", reads=("reward", "group", "mask"), writes=("advantage",))
def balanced_rows(kit: Kit, batch: Batch, *, inner: Callable[[Batch], Batch]) -> Batch:
    """A wrap: drop random negatives of each group until it has no more of them than positives, then the credit inside.

    Positive is `R_i >= mean_g(R)`. The credit inside sees the rows kept; a dropped one gets exactly 0, and still counts
    in a loss's denominator. All-equal groups and groups of one drop nothing. Draws one uniform number per row.
    RED-Drop, arXiv 2509.24203.
    """
    score, group = batch.score(), batch.by("group")
    positive = centred(score, group) >= 0
    extra = group.sum(~positive) - group.sum(positive)
    lot = torch.rand(len(batch), generator=kit.rng("drop"), dtype=torch.float64).to(score.device)
    dropped = ~positive & (group.rank(lot + positive) < extra)  # in this order the negatives of a group stand first
    kit.log("dropped", dropped.double().mean())
    credit = inner(batch.take(~dropped))["advantage"]
    return batch.put(
        advantage=credit.new_zeros(len(batch), *credit.shape[1:]).masked_scatter(~dropped[:, None], credit)
    )


# -- terms -------------------------------------------------------------------------------------------------------


def _drift_sane(options: Mapping[str, Any]) -> str | None:
    level = options["level"]
    if level not in LEVELS:
        return f"level={level!r} is not known. {nearest(str(level), LEVELS)}"
    return _coef_sane(options)


def _coef_sane(options: Mapping[str, Any]) -> str | None:
    coef = options["coef"]
    return f"coef={coef} must be at least 0" if isinstance(coef, (int, float)) and not coef >= 0 else None


@piece("loss", slot="regulariser", reads=("logp_old", "mask"), wants=("logp",), rows="policy", validate=_drift_sane)
def drift(batch: Batch, now: Now, *, coef: float = 0.1, level: str = "token") -> list[Term]:
    """`coef (log pi - log pi_old)^2`: a squared penalty on leaving the old policy; its gradient is 0 there.

    level: "token", each decision's own square; or "sequence", the square of the row's sum, spread over its decisions so
    that it stands to `-A log pi` of the row as in theory, whatever `per`. Kimi's OPMD has coef = tau / 2.
    """
    d = (now["logp"] - old_logp(batch, now)) * batch.mask
    square = d.square()
    if level == "sequence":
        length = batch.mask.sum(1, keepdim=True).clamp_min(1)
        square = d.sum(1, keepdim=True).square() / length * batch.mask
    return [Term(coef * square, "drift_loss"), Term(square.detach(), "drift", metric=True)]


@piece("loss", slot="regulariser", reads=("mask",), wants=("logp",), rows="policy", validate=_coef_sane)
def forward_kl(batch: Batch, now: Now, *, coef: float = 0.1) -> Term:
    """`-coef log pi` on the old policy's decisions: coef KL(pi_old || pi) in expectation, but for a constant.

    The same as adding `coef` to every advantage of `-A log pi` (AsymRE's baseline shift).
    """
    return Term(-coef * now["logp"], "forward_kl_loss")
