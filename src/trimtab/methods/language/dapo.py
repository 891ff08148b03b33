"""DAPO: a wider upper bound, groups with a signal only, a token mean, and a price on overlong responses."""

from __future__ import annotations

from trimtab.core.method import Method
from trimtab.core.registry import Neutral, method
from trimtab.methods.language.bases import grpo
from trimtab.stages.collect import dynamic_sampling
from trimtab.stages.credit import overlong
from trimtab.stages.select import finished_only
from trimtab.stages.surrogate import clip


@method(
    world="language",
    title="DAPO: An Open-Source LLM Reinforcement Learning System at Scale",
    arxiv="2503.14476",
    base=grpo,
    case="text",
    neutral=Neutral(
        {"clip_high": 0.2, "batches": 0, "penalty": 0.0},
        level="exact",
        why="grpo's bound, the first batch as it is, and no price on length",
    ),
    presets={
        "paper": {"penalty": 1.0},
        "trl": {"batches": 0},
        "verl": {"penalty": 1.0, "dual": 10.0, "strict": True},
    },
)
def dapo(
    base: Method,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    batches: int = 10,
    strict: bool = False,
    buffer: float = 0.2,
    penalty: float = 0.5,
    filter_truncated: bool = False,
    dual: float | None = None,
) -> Method:
    """Edits to grpo: clip-higher; dynamic sampling; soft overlong punishment; the mean over all tokens, and no KL.

    `loss = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)`, mean over tokens; all-equal groups are replaced by new
    ones; `R + penalty min(0, (L - L_buffer - |y|) / L_buffer)`, L the longest response allowed, L_buffer a share of it.

    batches, strict: see `dynamic_sampling`. buffer: L_buffer / L; 0.2 is the paper's 4096 of 20480. penalty: 1 in the
    paper, whose rewards are +1 and -1; with rewards of 1 and 0, as environments here pay, 0.5 is the same after
    normalisation. filter_truncated: do not learn from responses that were cut (the paper's overlong filtering, an
    alternative to the punishment). dual: verl's dual clip, 10 in the released script. TRL has no dynamic sampling
    (preset "trl"); verl stops the run when ten batches do not fill an update (preset "verl"), here they are used.
    """
    made = (
        base.swap("surrogate.bound", clip(clip_low, clip_high))
        .swap("surrogate.per", "token")
        .wrap("collect", dynamic_sampling(batches=batches, strict=strict))
        .wrap("credit", overlong(buffer=buffer, penalty=penalty))
    )
    if dual is not None:
        made = made.swap("surrogate.shape.dual", dual)
    return made.then(finished_only()) if filter_truncated else made
