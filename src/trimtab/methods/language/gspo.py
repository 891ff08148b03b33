"""GSPO: one ratio per sequence, the geometric mean of its tokens' ratios."""

from __future__ import annotations

from trimtab.core.method import Method
from trimtab.core.registry import Neutral, method
from trimtab.methods.language.bases import grpo
from trimtab.stages.surrogate import clip, sequence_ratio


@method(
    world="language",
    title="Group Sequence Policy Optimization (GSPO)",
    arxiv="2507.18071",
    base=grpo,
    case="text",
    neutral=Neutral(
        {"clip_low": 0.2, "clip_high": 0.2},
        level="rounding",
        base_options={"per": "row"},
        why="with one update per batch the ratio is 1, whether of a token or of its sequence, and both clip nothing",
    ),
)
def gspo(base: Method, *, clip_low: float = 3e-4, clip_high: float = 4e-4) -> Method:
    """Edits to grpo: ratio `s_i = exp(sum_t m (logp_t - logp_old_t) / |y_i|)`; much tighter bounds; mean over rows.

    `loss = mean_i -min(s_i A_i, clip(s_i, 1 - clip_low, 1 + clip_high) A_i)`. With one update per batch the bounds are
    inert; the paper makes four (`grpo(rows=...)`). TRL (importance_sampling_level="sequence" with loss_type="grpo") and
    verl (a token-wise form with the same gradient, its exponent held at 10) agree; their different eps of the credit
    are the base's: gspo+grpo(preset="verl").
    """
    return (
        base.swap("surrogate.ratio", sequence_ratio())
        .swap("surrogate.bound", clip(clip_low, clip_high))
        .swap("surrogate.per", "row")
    )
