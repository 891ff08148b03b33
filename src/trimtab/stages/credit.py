"""Credit: who gets how much. Each piece writes `advantage` [N, T], constant over the decisions of a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from trimtab.core.batch import Batch
from trimtab.core.errors import nearest
from trimtab.core.piece import piece

SCALES = ("none", "group", "batch")
_READS = ("reward", "group", "mask")


def spread(batch: Batch, credit: Tensor) -> Batch:
    """Give one credit per row, `[N]`, to each of its decisions."""
    return batch.put(advantage=credit[:, None] * batch.mask)


@piece("credit", reads=_READS, writes=("advantage",))
def group_mean(batch: Batch) -> Batch:
    """`A_i = R_i - mean_g(R)`, the mean including the row itself; a group of one gets 0 (REINFORCE with baseline)."""
    score = batch.score()
    return spread(batch, score - batch.by("group").mean(score))


@piece("credit", reads=_READS, writes=("advantage",))
def leave_one_out(batch: Batch) -> Batch:
    """`A_i = R_i - mean_{j != i}(R_j) = n/(n-1) (R_i - mean_g(R))`; a group of one gets 0.

    Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740, eq. 6.
    """
    score, group = batch.score(), batch.by("group")
    n = group.count().to(score.dtype)
    return spread(batch, n / (n - 1).clamp_min(1) * (score - group.mean(score)))


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
    centred = score - group.mean(score)
    centred = centred.masked_fill(group.same(score), 0.0)  # not left to rounding: all-equal means no signal
    if scale == "none":
        return spread(batch, centred)
    if scale == "group":
        return spread(batch, centred / (group.std(score, ddof) + eps))
    everyone = score.std(correction=ddof) if len(score) > ddof else score.new_zeros(())
    return spread(batch, centred / (everyone + eps))
