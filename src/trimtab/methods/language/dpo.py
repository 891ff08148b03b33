"""DPO: a classifier of preference pairs whose logit is the policy's own log-ratio to a reference."""

from __future__ import annotations

from trimtab.core.copies import frozen
from trimtab.core.errors import MethodError
from trimtab.core.method import Method, Track
from trimtab.core.piece import Schedule
from trimtab.core.registry import method
from trimtab.methods.language.bases import DECAY
from trimtab.stages.annotate import logp_ref
from trimtab.stages.collect import preferences, ranked_pairs, rollouts
from trimtab.stages.terms import preference
from trimtab.stages.update import adamw


@method(
    world="language",
    title="Direct Preference Optimization: Your Language Model is Secretly a Reward Model (DPO)",
    arxiv="2305.18290",
    case="pairs",
    presets={"ipo": {"shape": "ipo"}, "hinge": {"shape": "hinge"}, "online": {"source": "rollouts"}},
)
def dpo(
    *,
    beta: float = 0.1,
    shape: str = "sigmoid",
    smoothing: float = 0.0,
    source: str = "data",
    pairs: int = 16,
    lr: float | Schedule = DECAY,
    clip_norm: float | None = 1.0,
) -> Method:
    """`loss = -log sigma(beta [(logp_w - ref_w) - (logp_l - ref_l)])`, mean over pairs; log-probabilities are sums.

    The reference is the policy as it was when the run began. beta: > 0, 0.1 as in TRL. shape: "sigmoid", "hinge", "ipo"
    (length-averaged, as TRL has it). smoothing: share of labels taken to be wrong, in [0, 0.5). source: "data" reads
    pairs from the environment (fields prompt, chosen, rejected); "rollouts" samples groups and pairs the best response
    of each with its worst, as the environment scores them (online DPO). pairs: pairs per batch, or prompts of rollouts.
    lr, clip_norm: AdamW step size and largest gradient norm. verl has no DPO trainer of its own to differ from.
    """
    if source not in ("data", "rollouts"):
        raise MethodError(f"source={source!r} is not known: pairs come from 'data' or from 'rollouts'")
    loss = preference(beta=beta, shape=shape, smoothing=smoothing)
    made = Method(
        "dpo",
        pieces=(preferences(pairs=pairs) if source == "data" else rollouts(prompts=pairs), logp_ref()),
        tracks=(Track("policy", trains="policy", pieces=(loss,), update=adamw(lr=lr, clip=clip_norm)),),
        copies={"reference": frozen("policy")},
    )
    return made if source == "data" else made.wrap("collect", ranked_pairs())
