"""The policy-gradient surrogate as a small pipeline: ratio -> bound -> shape -> weight -> per.

GRPO is `surrogate(ratio=token_ratio(), bound=clip(0.2, 0.2), shape=pessimistic())`; a paper that changes one of these
swaps that part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.core.batch import Batch
from trimtab.core.errors import nearest
from trimtab.core.kit import Kit
from trimtab.core.piece import Piece, piece
from trimtab.core.terms import Term, mask_of, rows_of

Now = Mapping[str, Tensor]
HARD = ("one_side", "two_side", "ring")  # shapes that leave decisions out where the ratio is out of bounds


class Bound(NamedTuple):
    """Limits of the ratio, broadcastable to `[N, T]`; constants for autograd."""

    low: float | Tensor
    high: float | Tensor


# -- parts: ratio ------------------------------------------------------------------------------------------------


def old_logp(batch: Batch, now: Now) -> Tensor:
    """`logp_old`, or the current log-probability, detached, where `annotate.logp_old` left it out as the same thing."""
    return batch["logp_old"] if "logp_old" in batch else now["logp"].detach()


@piece("part", reads=("logp_old", "mask"), wants=("logp",))
def token_ratio(batch: Batch, now: Now, *, limit: float = 20.0) -> Tensor:
    """`r_t = exp(clamp(logp_t - logp_old_t, -limit, limit))`, `[N, T]`; 1 where `mask` is 0."""
    drift = now["logp"] - old_logp(batch, now)
    return (drift if batch.same("mask") == 1 else drift.mul(batch.mask)).clamp(-limit, limit).exp()


@piece("part", reads=("logp_old", "mask"), wants=("logp",))
def sequence_ratio(batch: Batch, now: Now, *, mean: bool = True, limit: float = 20.0) -> Tensor:
    """`s_i = exp(clamp(sum_t m (logp_t - logp_old_t) / |y_i|, -limit, limit))`, the same at each decision, `[N, T]`.

    mean: divide by the number of decisions (GSPO, Zheng et al. 2025, arXiv 2507.18071, eq. 7) and reduce per="row";
    without, the ratio of the whole sequence (RLOO as TRL has it), to be reduced per="row_sum". Each decision's gradient
    goes through its own log-probability, `s_i grad logp_t`, so that these reductions give the gradient of `s_i`
    itself: `s_i / |y_i| sum_t grad logp_t`, and `s_i sum_t grad logp_t`.
    """
    mask, logp = batch.mask, now["logp"]
    drift = (logp.detach() - old_logp(batch, now)).mul(mask).sum(1, keepdim=True)
    if mean:
        drift = drift / mask.sum(1, keepdim=True).clamp_min(1)
    return drift.clamp(-limit, limit).exp() * (logp - logp.detach()).mul(mask).exp()


# -- parts: bound ------------------------------------------------------------------------------------------------


def _clip_sane(options: Mapping[str, Any]) -> str | None:
    low = options["low"]
    if isinstance(low, (int, float)) and not 0 <= low <= 1:
        return f"low={low} must be in [0, 1]: the ratio is bounded below by 1 - low"
    high = options["high"]
    if isinstance(high, (int, float)) and not high >= 0:
        return f"high={high} must be at least 0: the ratio is bounded above by 1 + high"
    return None


@piece("part", validate=_clip_sane)
def clip(batch: Batch, now: Now, ratio: Tensor, *, low: float = 0.2, high: float = 0.2) -> Bound:
    """`[1 - low, 1 + high]` (PPO, Schulman et al. 2017, eq. 7; clip-higher when `high > low`, DAPO)."""
    return Bound(1 - low, 1 + high)


# -- parts: shape ------------------------------------------------------------------------------------------------


@piece("part", wants=("logp",))
def score_function(batch: Batch, now: Now, advantage: Tensor, ratio: None, bound: None) -> Tensor:
    """`-A log pi`: REINFORCE (Williams 1992). Needs no ratio."""
    return -advantage * now["logp"]


def _dual_sane(options: Mapping[str, Any]) -> str | None:
    dual = options["dual"]
    return None if dual is None or dual > 1 else f"dual={dual} must be above 1: it holds ratios that are too large"


@piece("part", validate=_dual_sane)
def pessimistic(
    batch: Batch, now: Now, advantage: Tensor, ratio: Tensor, bound: Bound | None, *, dual: float | None = None
) -> Tensor:
    """`-min(r A, clip(r, low, high) A)` (PPO, eq. 7); without a bound, `-r A`.

    dual: where A < 0 the value is at most `-dual A` (dual clip, Ye et al. 2020, arXiv 1912.09729, eq. 5; 3 in verl).
    """
    if bound is None:
        value = -ratio * advantage
    else:
        # min(r A, clip(r) A) is A times r held from above where A > 0 and from below where A < 0.
        below = torch.where(advantage < 0, bound.low, -math.inf)
        above = torch.where(advantage > 0, bound.high, math.inf)
        value = ratio.clamp(below, above) * -advantage
    return value if dual is None else torch.where(advantage < 0, value.clamp(max=-dual * advantage), value)


# -- the surrogate -----------------------------------------------------------------------------------------------


def idle(batch: Batch) -> Tensor:
    """Rows whose every decision has zero advantage or is not kept: their surrogate and its gradient are exactly 0."""
    return (batch.advantage * mask_of(batch) == 0).all(1)


def _consistent(options: Mapping[str, Any]) -> str | None:
    shape, ratio, bound = options["shape"], options["ratio"], options["bound"]
    if not isinstance(shape, Piece):
        return f"shape={shape!r} must be one of {nearest('', ('score_function', 'pessimistic', *HARD))}"
    if shape.core.name == "score_function" and (ratio is not None or bound is not None):
        return "shape=score_function() uses no ratio and no bound, so they would be ignored; leave them out"
    if shape.core.name != "score_function" and ratio is None:
        return f"shape={shape.name}() needs a ratio, for example ratio=token_ratio()"
    measured = bound.options.get("measure") if isinstance(bound, Piece) else None
    if isinstance(measured, Piece) and isinstance(ratio, Piece) and measured.core != ratio.core:
        return (
            f"the bound was moved to where {measured.core.name} is, and the ratio is {ratio.core.name}; change the "
            f"ratio before the bound is moved"
        )
    if shape.core.name in HARD and bound is None:
        return f"shape={shape.name}() needs a bound, for example bound=clip(0.2, 0.2)"
    return None


@piece("loss", slot="surrogate", reads=("advantage", "mask", "logp_behavior"), wants=("logp",),
       validate=_consistent, idle=idle, rows="policy")  # fmt: skip
def surrogate(
    batch: Batch,
    now: Now,
    *,
    ratio: Callable[..., Tensor] | None = None,
    bound: Callable[..., Bound] | None = None,
    shape: Callable[..., Tensor],
    weight: Callable[..., Tensor] | None = None,
) -> list[Term]:
    """`shape(A, r, bound(r)) * weight`, un-reduced `[N, T]`; `per` reduces it.

    At the old parameters its gradient is `sum(weight A grad log pi)` under the reduction. Metrics: the share of
    decisions held by the upper bound with A > 0 (`clip_high`) and by the lower one with A < 0 (`clip_low`), and
    `sampler_gap`, the mean of |logp_old - logp_behavior|.
    """
    advantage = batch.advantage
    r = ratio(batch, now) if ratio else None
    b = bound(batch, now, r) if bound else None
    value = shape(batch, now, advantage, r, b)
    if weight is not None:
        value = value * weight(batch, now, r, b).detach()
    terms = [Term(value, "surrogate")]
    with torch.no_grad():
        if b is not None and r is not None:
            terms.append(Term((advantage > 0) & (r > b.high), "clip_high", metric=True))
            terms.append(Term((advantage < 0) & (r < b.low), "clip_low", metric=True))
        if "logp_behavior" in batch:
            # Unguarded: `logp_old` is looked at where another piece asked for it, and is no need of this one.
            gap = (old_logp(batch.guarded(None), now) - batch.logp_behavior).abs()
            terms.append(Term(gap.to(value.dtype), "sampler_gap", metric=True))
    return terms


@piece("loss", idle=lambda batch: rows_of(batch, None))
def scaled(kit: Kit, batch: Batch, now: Now, *, inner: Callable[..., Any], by: float = 1.0) -> list[Term]:
    """A wrap: every term of the loss inside, times `by` (a number or a schedule)."""
    made = inner(batch, now)
    return [term * by for term in ([made] if isinstance(made, Term) else made)]
