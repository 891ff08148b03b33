"""What the columns of a batch say about learning: no forward pass, no gradient, a fraction of a millisecond.

Pure functions of columns that a turn has anyway, and the probe that logs them. A run of the command line measures them
without being asked; in a loop of your own they are `method.then(signals())`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.core.batch import Batch
from trimtab.core.kit import Kit
from trimtab.core.piece import piece
from trimtab.core.terms import mask_of, rows_of

FEWEST = 64  # decisions; a variance or a covariance of fewer says nothing


def mismatch(logp: Tensor, reported: Tensor) -> dict[str, Tensor]:
    """How far a sampler's log-probabilities of some decisions are from the trainer's, both `[M]`, M >= 1.

    With d = logp - reported: `gap` = mean |d|, `max` = max |d|, `kl` = mean(exp(d) - 1 - d) >= 0, an estimate of
    KL(sampler || trainer) in nats a decision (Schulman 2020, k3). All are 0 where the two agree.
    """
    d = (logp - reported).double()
    return {"gap": d.abs().mean(), "max": d.abs().max(), "kl": (torch.expm1(d) - d).mean()}


def entropy_push(logp: Tensor, advantage: Tensor) -> dict[str, Tensor]:
    """Which way an update pushes the entropy, to first order, and which side of the advantages does; both `[M]`.

    A step from pi to pi' ~ pi exp(eta A) changes the entropy by `dH/deta = -Cov(log pi(a), A(a))` at eta = 0, the
    covariance under pi; policy gradients approximate that step (Cui et al. 2025, arXiv 2505.22617, theorem 1, for
    natural gradients). Over the M decisions of a batch, with c = logp - mean(logp):

        both      -mean(c A)              = -Cov(logp, A)
        positive  -mean(c A [A > 0])        likely decisions made likelier: below 0
        negative  -mean(c A [A < 0])        unlikely decisions made unlikelier: below 0

    and both = positive + negative. Above 0 the entropy rises. It is a sign to go by, in nats times the unit of A, not
    a prediction: parameters are shared, one mean stands for that of every state, and clipping is not seen.
    """
    pushed = -(logp - logp.mean()) * advantage
    positive, negative = (torch.where(side, pushed, 0.0).mean() for side in (advantage > 0, advantage < 0))
    return {"both": positive + negative, "positive": positive, "negative": negative}


def explained_variance(value: Tensor, target: Tensor) -> Tensor:
    """`1 - Var(target - value) / Var(target)` over `[M]` decisions, M >= 2: 1 is a perfect critic, 0 one that knows
    the mean alone; below 0 it is worse than that. nan where the targets are all equal.
    """
    return 1 - (target - value).var() / target.var()


def silent_groups(advantage: Tensor, on: Tensor, group: Tensor) -> Tensor:
    """The share of groups whose decisions that may learn (`on`, bool `[N, T]`) all have one advantage `[N, T]`: they
    prefer no response to another. Groups without such a decision count. group: ids `[N]`.
    """
    where = torch.unique(group, return_inverse=True)[1]
    size = int(where.max()) + 1
    ends = []
    for how, least in (("amax", -math.inf), ("amin", math.inf)):
        each = advantage.masked_fill(~on, least)
        each = each.amax(1) if how == "amax" else each.amin(1)
        ends.append(each.new_full((size,), least).scatter_reduce_(0, where, each, how))
    return (ends[0] <= ends[1]).double().mean()


@torch.no_grad()
def measured(batch: Batch) -> dict[str, Tensor]:
    """Everything above that the columns of a batch allow, as 0-d tensors; {} where it has no advantages.

    `entropy_push`, `entropy_push_positive`, `entropy_push_negative`: of log pi at the start of this batch's updates
    (`logp_old`; where that was left out, what the sampler reported). `silent_groups`. `sampler_kl`, `sampler_max`:
    where both log-probabilities are there. `explained_variance`: where there are values and their targets. Rows of our
    policy alone, and decisions that may learn.
    """
    batch = batch.guarded(None)
    if "advantage" not in batch or "mask" not in batch:
        return {}
    mine = rows_of(batch, "policy")
    on = mask_of(batch).bool() & mine[:, None]
    made: dict[str, Tensor] = {}
    advantage = batch["advantage"]
    if "group" in batch and bool(mine.any()):
        made["silent_groups"] = silent_groups(advantage[mine], on[mine], batch["group"][mine])
    if int(on.sum()) < FEWEST:
        return made
    logp = batch.get("logp_old", batch.get("logp_behavior"))
    if logp is not None:
        for side, push in entropy_push(logp[on], advantage[on]).items():
            made["entropy_push" if side == "both" else f"entropy_push_{side}"] = push
    if "logp_old" in batch and "logp_behavior" in batch:
        far = mismatch(batch["logp_old"][on], batch["logp_behavior"][on])
        made |= {"sampler_kl": far["kl"], "sampler_max": far["max"]}
    if "value" in batch and "value_target" in batch:
        made["explained_variance"] = explained_variance(batch["value"][on], batch["value_target"][on])
    return made


def numbers(made: Mapping[str, Tensor]) -> dict[str, float]:
    """0-d tensors as numbers, with one transfer from the device; those that are not finite are left out."""
    if not made:
        return {}
    values = torch.stack([value.double() for value in made.values()]).tolist()
    return {name: value for name, value in zip(made, values) if math.isfinite(value)}


def _sane(options: Mapping[str, Any]) -> str | None:
    every = options["every"]
    return None if isinstance(every, int) and every >= 1 else f"every={every!r} must be a whole number, at least 1"


@piece("probe", validate=_sane)
def signals(kit: Kit, batch: Batch, *, every: int = 1) -> Batch:
    """Every so many turns, log what the batch's columns say about learning (see `measured`)."""
    if kit.clock.turns % every == 0:
        for name, value in numbers(measured(batch)).items():
            kit.log(name, value)
    return batch
