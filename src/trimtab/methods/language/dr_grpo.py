"""Dr. GRPO: no division by the group's std, and a constant number of tokens as divisor."""

from __future__ import annotations

from trimtab.core.method import Method
from trimtab.core.registry import Neutral, method
from trimtab.core.terms import fixed
from trimtab.methods.language.bases import grpo
from trimtab.stages.credit import group_normalised


@method(
    world="language",
    title="Understanding R1-Zero-Like Training: A Critical Perspective (Dr. GRPO)",
    arxiv="2503.20783",
    base=grpo,
    case="text",
    aliases=("drgrpo",),
    neutral=Neutral(
        {"length": 1.0},
        level="exact",
        base_options={"scale": "none", "per": "row_sum"},
        why="with L = 1 what is left is grpo without the std, summed over each row",
    ),
    presets={"trl": {}, "verl": {"mean": False}},
)
def dr_grpo(base: Method, *, length: float | None = None, mean: bool = True) -> Method:
    """Edits to grpo: credit `R_i - mean_g(R)` without the std; tokens summed and divided by a constant L.

    `loss = sum(l m) / (N L)`: neither a response's own length nor the spread of its group weighs its gradient.
    length: L > 0; None is the longest response that collect allows (`collect.new_tokens`) when the method is built. It
    only scales the loss, so a later `--set collect.new_tokens` changes nothing else. mean: divide by the rows N too, as
    the paper and TRL do (TRL needs both loss_type="dr_grpo" and scale_rewards="none"); verl's seq-mean-token-sum-norm
    sums over rows (preset "verl"), which is N times as much.
    """
    if length is None:
        length = float(base.get("collect.new_tokens"))
    return base.swap("credit", group_normalised(scale="none")).swap("surrogate.per", fixed(length, mean))
