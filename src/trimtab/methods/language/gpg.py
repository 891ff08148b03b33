"""GPG: the plain policy gradient, its advantage rescaled for the groups that have no signal."""

from __future__ import annotations

from trimtab.core.method import Method
from trimtab.core.registry import Neutral, method
from trimtab.methods.language.bases import reinforce
from trimtab.stages.credit import group_rescaled


@method(
    world="language",
    title="GPG: A Simple and Strong Reinforcement Learning Baseline for Model Reasoning",
    arxiv="2504.02546",
    base=reinforce,
    case="text",
    neutral=Neutral({"alpha": "none"}, level="exact", why="without the factor it is reinforce"),
    presets={"paper": {"alpha": "valid"}, "verl": {"alpha": "nonzero"}},
)
def gpg(base: Method, *, alpha: str = "valid") -> Method:
    """Edits to reinforce: `A_i = alpha (R_i - mean_g(R))`. No ratio, no clip, no KL, no reference.

    alpha: "valid", `B / (B - M)` with M rows in all-equal groups out of B (paper); "nonzero", `B / #{R != 0}` (verl:
    it counts rewards, not groups, so a batch of mostly wrong answers is scaled up); "none", 1. The paper also waits for
    a least share of valid rows before it updates; dapo's dynamic sampling is that and more.
    """
    return base.swap("credit", group_rescaled(alpha=alpha))
