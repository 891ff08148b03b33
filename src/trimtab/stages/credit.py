"""Credit: who gets how much. Each piece writes `advantage` [N, T], constant over the decisions of a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.core.batch import Batch, Segments
from trimtab.core.errors import nearest
from trimtab.core.kit import Kit
from trimtab.core.piece import piece

SCALES = ("none", "group", "batch")
_READS = ("reward", "group", "mask")


def centred(score: Tensor, group: Segments) -> Tensor:
    """`R_i - mean_g(R)`; exactly 0 where all of a group are equal, which is not left to rounding: no signal."""
    return (score - group.mean(score)).masked_fill(group.same(score), 0.0)


def spread(batch: Batch, credit: Tensor) -> Batch:
    """Give one credit per row, `[N]`, to each of its decisions."""
    return batch.put(advantage=credit[:, None] * batch.mask)


@piece("credit", reads=_READS, writes=("advantage",))
def group_mean(batch: Batch) -> Batch:
    """`A_i = R_i - mean_g(R)`, the mean including the row itself (REINFORCE with baseline).

    All-equal groups and groups of one get exactly 0.
    """
    return spread(batch, centred(batch.score(), batch.by("group")))


@piece("credit", reads=_READS, writes=("advantage",))
def leave_one_out(batch: Batch) -> Batch:
    """`A_i = R_i - mean_{j != i}(R_j) = n/(n-1) (R_i - mean_g(R))`.

    All-equal groups and groups of one get exactly 0.
    Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740, eq. 6.
    """
    score, group = batch.score(), batch.by("group")
    n = group.count().to(score.dtype)
    return spread(batch, n / (n - 1).clamp_min(1) * centred(score, group))


def _scale_known(options: Mapping[str, Any]) -> str | None:
    scale = options["scale"]
    return None if scale in SCALES else f"scale={scale!r} is not known. {nearest(str(scale), SCALES)}"


@piece("credit", reads=_READS, writes=("advantage",), validate=_scale_known)
def group_normalised(batch: Batch, *, scale: str = "group", ddof: int = 1, eps: float = 1e-4) -> Batch:
    """`A_i = (R_i - mean_g(R)) / (s + eps)`; all-equal groups and groups of one get exactly 0.

    scale: `s` is the std of the row's group ("group"), of all rows ("batch"), or there is no division ("none").
    ddof: 1 is the unbiased std of TRL and verl; 0 the population std. eps: 1e-4 in TRL, 1e-6 in verl.
    Shao et al. 2024 (GRPO), arXiv 2402.03300, section 4.1.2.
    """
    score, group = batch.score(), batch.by("group")
    credit = centred(score, group)
    if scale == "group":
        credit = credit / (group.std(score, ddof) + eps)
    elif scale == "batch":
        everyone = score.std(correction=ddof) if len(score) > ddof else score.new_zeros(())
        credit = credit / (everyone + eps)
    return spread(batch, credit.masked_fill(group.same(score), 0.0))  # again: with eps = 0 it was 0 / 0


ALPHAS = ("none", "valid", "nonzero")


def _alpha_known(options: Mapping[str, Any]) -> str | None:
    alpha = options["alpha"]
    return None if alpha in ALPHAS else f"alpha={alpha!r} is not known. {nearest(str(alpha), ALPHAS)}"


@piece("credit", reads=_READS, writes=("advantage",), validate=_alpha_known)
def group_rescaled(kit: Kit, batch: Batch, *, alpha: str = "valid") -> Batch:
    """`A_i = alpha (R_i - mean_g(R))`: the batch's signal is not diluted by groups that have none.

    alpha: "valid" is `B / (B - M)`, M rows in all-equal groups out of B; "nonzero" is `B / #{R_i != 0}` (verl's GPG);
    "none" is 1. All-equal groups and groups of one get exactly 0.
    Chu et al. 2025 (GPG), arXiv 2504.02546, section 3.
    """
    score, group = batch.score(), batch.by("group")
    learning = {"none": torch.ones_like(score), "valid": (~group.same(score)).to(score.dtype),
                "nonzero": (score != 0).to(score.dtype)}[alpha]  # fmt: skip
    factor = len(score) / learning.sum().clamp_min(1)
    kit.log("alpha", factor)
    return spread(batch, factor * centred(score, group))


# -- wraps that change what a credit is paid; the reward column itself stays as the environment gave it ----------


def paid(batch: Batch, extra: Tensor) -> Batch:
    """The batch that a wrapped credit sees: `extra` [N] on top of the reward of each row's last decision."""
    mask = batch.mask.bool()
    last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
    return Batch({**batch.columns, "reward": batch.reward + last * extra[:, None]}, batch.guard)


def _overlong_sane(options: Mapping[str, Any]) -> str | None:
    if not 0 < options["buffer"] <= 1:
        return f"buffer={options['buffer']} must be in (0, 1], a share of the longest response"
    return None if options["penalty"] >= 0 else f"penalty={options['penalty']} must be at least 0"


@piece("credit", reads=_READS, writes=("advantage",), validate=_overlong_sane)
def overlong(
    kit: Kit, batch: Batch, *, inner: Callable[[Batch], Batch], buffer: float = 0.2, penalty: float = 1.0,
    limit: int | None = None,
) -> Batch:  # fmt: skip
    """A wrap: `R_i + penalty min(0, (limit - buffer limit - |y_i|) / (buffer limit))`, soft overlong punishment.

    limit: the longest response; None is what collect allows (`collect.new_tokens`). buffer: the share of it, (0, 1],
    over which the punishment grows from 0 to `penalty`.
    Yu et al. 2025 (DAPO), arXiv 2503.14476, eq. 13.
    """
    longest = float(kit.method.get("collect.new_tokens")) if limit is None else float(limit)
    length = batch.mask.sum(1).to(batch.reward.dtype)
    over = ((length - (1 - buffer) * longest) / (buffer * longest)).clamp_min(0)
    kit.log("overlong", (over > 0).double().mean())
    return batch.put(advantage=inner(paid(batch, -penalty * over)).advantage)


@piece("credit", reads=(*_READS, "logp_old", "logp_ref"), writes=("advantage",))
def kl_in_reward(kit: Kit, batch: Batch, *, inner: Callable[[Batch], Batch], coef: float = 0.05) -> Batch:
    """A wrap: `R_i - coef sum_t m (logp_old_t - logp_ref_t)`, the KL to the reference (k1) as a price on the reward."""
    drift = ((batch.logp_old - batch.logp_ref) * batch.mask).sum(1)
    kit.log("kl", drift.sum() / batch.mask.sum().clamp_min(1))
    return batch.put(advantage=inner(paid(batch, -coef * drift)).advantage)
