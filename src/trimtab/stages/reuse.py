"""Rollouts used more than once: rows of earlier turns beside fresh ones, and a surrogate that says how old they are.

A replayed row has source "replay", `age` in turns, and the `logp_behavior` that its sampler reported. Whole groups are
replayed, so that a credit over groups gives them what it gave them when they were fresh.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.core.batch import Batch
from trimtab.core.errors import MethodError
from trimtab.core.kit import Kit
from trimtab.core.piece import Schedule, piece
from trimtab.core.terms import SOURCES, Term, rows_of, units
from trimtab.stages.surrogate import Bound, Now, old_logp

REPLAY = SOURCES.index("replay")

# -- where they come from ----------------------------------------------------------------------------------------


def empty(kit: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Nothing stored yet: the last turn that stored something, and `(turn, rows)` of each turn that is held."""
    return {"turn": -1, "held": []}


def _window_sane(options: Mapping[str, Any]) -> str | None:
    share, window = options["share"], options["window"]
    if not 0 <= share < 1:
        return f"share={share} must be in [0, 1): the part of the batch that is replayed"
    if window < 0:
        return f"window={window} must be at least 0: the turns whose rollouts are held"
    if share / (1 - share) > window:
        return (
            f"share={share} asks for {share / (1 - share):.3g} replayed rows to each fresh one, and window={window} "
            f"holds {window}, so the buffer is smaller than one update. Raise window or lower share"
        )
    return None


@piece("collect", writes=("source", "age"), state={"replay": empty}, validate=_window_sane, adds_rows=True)
def replayed(kit: Kit, *, inner: Callable[[], Batch], share: float = 0.4, window: int = 2) -> Batch:
    """A wrap: behind the fresh rows come whole groups of earlier turns, so many that they are `share` of the batch.

    Held are the policy's own rows of the last `window` turns, first in first out; the groups are drawn from all of them
    without replacement. While too few are held (the first turns) all of them are taken. share: in [0, 1). window: at
    least share / (1 - share). Logs `replayed`, the part of the batch, and `replay_age`, in turns.

    Raises MethodError when it is asked twice in one turn: a wrap that collects again (dynamic sampling, pairs) belongs
    inside this one, to the right in a method expression.
    """
    store, turn = kit.state["replay"], kit.clock.turns
    if store["turn"] == turn:
        raise MethodError(
            "the replay was asked twice in one turn, so a piece around it collects again and again; put the replay "
            "around that piece"
        )
    rows = kit.counted(inner)
    own = rows_of(rows, "policy")
    fresh = rows if bool(own.all()) else rows.take(own)
    older = [r.put(age=torch.full((len(r),), turn - t)) for t, r in store["held"]]
    last = [*store["held"], (turn, fresh.to("cpu"))]
    kit.state["replay"] = {"turn": turn, "held": last[max(0, len(last) - window) :]}
    old = _drawn(kit, Batch.cat(older), round(_count(fresh) * share / (1 - share)))
    kit.log("replayed", len(old) / max(1, len(rows) + len(old)))
    if not len(old):
        return rows
    kit.log("replay_age", old.age.double().mean())
    old = old.put(source=torch.full((len(old),), REPLAY))
    return Batch.cat([rows, old.to(rows.mask.device)])


def _ids(rows: Batch) -> Tensor:
    return units(rows, "group" if "group" in rows else "row")


def _count(rows: Batch) -> int:
    return len(torch.unique(_ids(rows))) if len(rows) else 0


def _drawn(kit: Kit, rows: Batch, n: int) -> Batch:
    """`n` random groups of these rows (single rows where there are no groups), or all when there are fewer."""
    if not len(rows) or n == 0:
        return Batch()
    ids = _ids(rows)
    picked = torch.randperm(int(ids.max()) + 1, generator=kit.rng("replay"))[:n]
    return rows.take(torch.isin(ids, picked))


# -- parts: ratio and bound --------------------------------------------------------------------------------------


def _against_behavior(batch: Batch, now: Now) -> Batch:
    """The batch with `logp_old` of replayed rows as their behavior policy had it."""
    old = old_logp(batch, now)
    stale = (batch.source == REPLAY)[:, None]
    behavior = torch.where(stale, batch.logp_behavior.to(old.dtype), old)
    return Batch({**batch.columns, "logp_old": behavior}, batch.guard)


@piece("part", reads=("logp_old", "logp_behavior", "source"), wants=("logp",))
def to_behavior(batch: Batch, now: Now, *, inner: Callable[..., Tensor]) -> Tensor:
    """A wrap: the ratio inside, to the policy that made the row: `pi / pi_b` of replayed rows, `pi / pi_old` of others.

    The behavior policy of a fresh row is the policy at the start of the turn, whatever its sampler's rounding.
    """
    return inner(_against_behavior(batch, now), now)


@piece("part", reads=("logp_old", "logp_behavior", "source", "mask"), wants=("logp",))
def recentred(
    kit: Kit,
    batch: Batch,
    now: Now,
    ratio: Tensor,
    *,
    inner: Callable[..., Bound],
    measure: Callable[..., Tensor],
) -> Bound:
    """A wrap: the bound inside moved from 1 to `c = pi_old / pi_b`: `[max(c + low - 1, 0), c + high - 1]`.

    measure: the ratio that is bounded; `c` is its value for the policy at the start of the turn, 1 for fresh rows. The
    bound inside is shown `r - c + 1`. Logs `unbounded_below`, the part of the decisions whose lower bound would be
    negative. Mix-PPG of ReMix, arXiv 2507.06892; Queeney et al. 2021 for the same objective.
    """
    old = old_logp(batch, now).detach()
    c = measure(_against_behavior(batch, now), {**now, "logp": old}).detach()
    low, high = inner(batch, now, ratio - c + 1)
    below = c + (low - 1)
    kit.log("unbounded_below", ((below < 0) * batch.mask).sum() / batch.mask.sum().clamp_min(1))
    return Bound(below.clamp_min(0), c + (high - 1))


# -- two anchors -------------------------------------------------------------------------------------------------


@piece("annotate", reads=("action", "mask"), writes=("logp_previous",), uses=("previous",))
def logp_previous(kit: Kit, batch: Batch, *, share: float = 0.5) -> Batch:
    """`logp_previous` [N, T]: under the copy named "previous"; left out while the other anchor has `share` 1."""
    if share >= 1:
        return batch
    return batch.put(logp_previous=kit.evaluate("previous", batch, {"logp"})["logp"])


def _convex_sane(options: Mapping[str, Any]) -> str | None:
    coef, share = options["coef"], options["share"]
    if not isinstance(coef, Schedule) and not coef >= 0:
        return f"coef={coef} must be at least 0"
    if not isinstance(share, Schedule) and not 0 <= share <= 1:
        return f"share={share} must be in [0, 1]: the part of the KL to the reference"
    return None


@piece("loss", slot="kl", reads=("logp_ref", "logp_previous", "mask"), wants=("logp",), rows="policy",
       validate=_convex_sane)  # fmt: skip
def kl_convex(
    kit: Kit, batch: Batch, now: Mapping[str, Tensor], *, coef: float = 1e-3, share: float = 0.5
) -> list[Term]:
    """`coef (share KL(pi || reference) + (1 - share) KL(pi || previous))` per decision, k3 on the batch's decisions.

    k3 = exp(d) - d - 1, d = logp_anchor - logp. On replayed rows, which pi did not make, it estimates no KL but is as
    ever 0 at the anchor and positive elsewhere. There pi may find a decision nearly impossible by now, and exp(d) would
    outweigh all else: as in verl d is held in [-20, 20] and k3 below 10, beyond which it has no gradient. share: in
    [0, 1], a number or a schedule. ReMix, arXiv 2507.06892.
    """
    if not 0 <= share <= 1:  # a schedule's value is known only now
        raise MethodError(f"kl_convex: share={share} in turn {kit.clock.turns} must be in [0, 1]")
    kit.log("kl_share", share)
    k = _k3(batch.logp_ref, now["logp"], batch.mask)
    if share < 1:
        k = share * k + (1 - share) * _k3(batch.logp_previous, now["logp"], batch.mask)
    return [Term(coef * k, "kl_loss"), Term(k.detach(), "kl", metric=True)]


def _k3(anchor: Tensor, logp: Tensor, mask: Tensor) -> Tensor:
    d = ((anchor - logp) * mask).clamp(-20, 20)
    return (torch.expm1(d) - d).clamp(max=10)
