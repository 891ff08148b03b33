"""Credit: who gets how much. Each piece writes `advantage` [N, T], constant over the decisions of a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from trimtab.core.batch import Batch, Segments
from trimtab.core.errors import nearest
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
