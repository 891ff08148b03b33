"""Sub-networks: measure which weights a method changes, and train only those.

Mukherjee et al. compare checkpoints: as stored in bfloat16, most weights of a language model come out of RL as they
went in. They then train anew from the start with the changed ones alone, `g <- m g` before every step, and reach the
same scores and nearly the same weights. `trimtab sparsity RUN --mask FILE` makes the mask of a run, and this uses it.

Where the paper leaves it open: gradients are clipped by their whole norm and masked then, so that the factor is that of
the full run; and weights off the mask are put back after each step, since a decoupled decay would move them. The
paper's masks count a change above 1e-5; ours count any that shows in bfloat16 (`--mask-tol 1e-5` is the paper's). An
update that differentiates terms itself (npg, trpo, harpg) is masked by its step alone.
"""

from __future__ import annotations

from trimtab.core.method import Method
from trimtab.core.registry import Neutral, method
from trimtab.methods.language.bases import grpo
from trimtab.stages.sparsity import update_sparsity
from trimtab.stages.subnetwork import subnetwork as only


@method(
    world="language",
    title="Reinforcement Learning Finetunes Small Subnetworks in Large Language Models",
    arxiv="2505.11711",
    base=grpo,
    case="text",
    neutral=Neutral(
        {"every": 1}, level="exact", why="every weight is chosen: gradients pass through the mask and nothing is undone"
    ),
)
def subnetwork(base: Method, *, mask: str | None = None, every: int | None = None) -> Method:
    """Edits to the base: in every track, gradients are zero off the mask, and weights off it keep their bits.

    mask: a file written by `trimtab sparsity RUN --mask FILE`, for the same networks at the same start; None trains
    every weight. every: log `sparsity` and `unchanged_float32`, against the start of the run, every so many turns;
    None does not. Stands on any method, of control too: `subnetwork(mask="m.mask")+sac`.
    """
    made = base
    for track in base.tracks:
        made = made.on(track.name).wrap("update", only(mask))
        if every is not None:
            made = made.on(track.name).then(update_sparsity(every=every))
    return made
