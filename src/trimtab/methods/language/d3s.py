"""D3S: down-sampling at two levels, rows by the variance of their advantages, tokens by |A| x entropy, relaxed in time.

Edits to the base: after the credit, `keep` shrinks to the `share` of the batch's rows whose (already normalised)
advantages have the largest variance, then to the `tokens` of their decisions with the largest |A| x entropy; both grow
linearly with the run's progress. Rollouts, advantages and loss stay as they are, and nothing is normalised again.

There is no released code. What the paper leaves open, and what is done here:

- the four numbers of the schedule were not found; rows 1/4 to 3/4 and tokens 1/10 to 1/2 are ours;
- the entropy is that of the policy at the start of the batch's updates;
- the loss is divided by what was kept: tokens for a token mean, rows for a mean over rows;
- with a ratio of whole sequences (`d3s+gspo`) the ratio is taken over all tokens; only the loss is restricted.

Selecting makes gradients longer by design: with plain gradient descent it is a larger step as well. Compare at equal
step norms too (the claim does).
"""

from __future__ import annotations

from trimtab.core.errors import MethodError, nearest
from trimtab.core.method import Method
from trimtab.core.piece import Schedule
from trimtab.core.registry import Neutral, method
from trimtab.core.schedules import linear
from trimtab.methods.language.bases import grpo
from trimtab.stages.downsample import down_sample, down_sample_groups, entropy_old, over_kept, over_rows, rows_per_kept

SCOPES = {"batch": down_sample, "group": down_sample_groups}
ROWS, TOKENS = linear(0.25, 0.75), linear(0.1, 0.5)


@method(
    world="language",
    title="Learning More with Less: Dynamic Dual-Level Down-Sampling (D3S)",
    arxiv="2509.22115",
    base=grpo,
    case="text",
    neutral=Neutral({"share": 1.0, "tokens": 1.0}, level="exact", why="all rows and all tokens are kept"),
    presets={
        "d1s": {"share": 0.5, "tokens": 1.0, "scope": "group"},
        "d1s_cross": {"share": 0.5, "tokens": 1.0},
        "d2s": {"share": 0.25, "tokens": 0.1},
    },
)
def d3s(
    base: Method, *, share: float | Schedule = ROWS, tokens: float | Schedule = TOKENS, scope: str = "batch"
) -> Method:
    """Edits to grpo: learn from the rows of largest advantage variance and their tokens of largest |A| x entropy.

    `S = argmax_{|S| = share N} Var({A_i : i in S})` over the batch, then the `tokens` of all their decisions with the
    largest `|A| H`, ranked together. It stands on any base with a credit and a policy that gives entropies: a row may
    as well be a trajectory or a single action.

    share: of the rows that is kept, in (0, 1], a number or a schedule; at least 2 rows. tokens: of the kept rows'
    decisions, likewise. scope: "batch" compares rows of all groups (the paper's), "group" those of one. Presets "d1s",
    "d1s_cross" and "d2s" are the paper's ablations without tokens, or without a schedule.
    """
    if scope not in SCOPES:
        raise MethodError(f"d3s has scope={scope!r}. {nearest(str(scope), SCOPES)}")
    rows = base.get("credit.rows")  # whoever is given credit is chosen among
    made = base.then(entropy_old(), SCOPES[scope](share=share, tokens=tokens, rows=rows))
    for name, slot, p in base.places():
        per = p.core.options.get("per") if slot == "surrogate" else None
        if over_rows(per):
            made = made.on(name).wrap(slot, over_kept(factor=rows_per_kept()))
    return made
