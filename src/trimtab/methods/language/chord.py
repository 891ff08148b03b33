"""CHORD: expert demonstrations and reinforcement learning in one loss, `(1 - mu) GRPO + mu SFT`, without an SFT stage.

Edits to the base: a share of each batch is demonstrations (collect wrap); every loss of the base is scaled by 1 - mu;
a loss on the demonstrations is added, mu times their token mean, each token weighted by phi = p (1 - p).

Where the paper's own settings and the released code (Trinity-RFT, `chord_policy_loss.py`, `mix_chord.yaml`) differ:

- the paper's CHORD-mu falls from 0.9 to 0.05 without phi, CHORD-phi has a constant 0.1 with phi; the yaml example has
  both at once, rising to 0.5 and falling to 0.02, over PPO's loss with a dual clip of 3. Presets "mu" and
  "official_code"; the default is CHORD-phi, which the paper finds best, as is the code's class default (in ms-swift phi
  is off by default);
- the code reduces inside each micro-batch and weighs micro-batches by their rows; here both parts are means over all
  tokens of the update;
- the step of mu(t) is the turn: the same for all updates of a batch.
"""

from __future__ import annotations

from trimtab.core.errors import MethodError
from trimtab.core.method import Method
from trimtab.core.piece import Schedule
from trimtab.core.registry import Neutral, method
from trimtab.core.schedules import complement, warmup_cosine
from trimtab.methods.language.bases import grpo
from trimtab.stages.expert import imitation, text_experts, with_experts
from trimtab.stages.surrogate import scaled


@method(
    world="language",
    title="On-Policy RL Meets Off-Policy Experts: Controllable Harmonization via Dynamic Weighting (CHORD)",
    arxiv="2508.11408",
    base=grpo,
    case="text",
    neutral=Neutral({"mu": 0.0, "share": 0.0}, level="exact", why="no demonstrations, and the base's loss times 1"),
    presets={
        "mu": {"mu": warmup_cosine(0, 200, 0.9, 0.05, by="turns"), "weight": "none"},
        "official_code": {"mu": warmup_cosine(200, 400, 0.5, 0.02, by="turns"), "dual": 3.0},
        "probability": {"weight": "probability"},
    },
)
def chord(
    base: Method,
    *,
    experts: str | None = None,
    share: float = 0.2,
    mu: float | Schedule = 0.1,
    weight: str = "phi",
    cutoff: float = 1.0,
    dual: float | None = None,
) -> Method:
    """Edits to grpo: expert rows join the batch; the loss is `(1 - mu) base + mu mean(-sg(p (1 - p)) log p)`.

    The second mean is over expert tokens, `p` is their probability under the current policy. phi = p (1 - p) vanishes
    where the policy agrees already (which keeps its entropy) and where the token is nearly impossible for it (which
    keeps its style); a policy that never gives an expert's token hardly learns it: preset "mu" is for a cold start.
    The base's losses and this one are both token means in the paper; with another `per` of the base mu means something
    else.

    experts: a file of prompts with responses, 'FILE.jsonl' or 'datasets:NAME(...)'; None shows the environment's
    reference answers. share: of the batch that is demonstrations, in [0, 1). mu: a number in [0, 1] or a schedule;
    preset "mu" is CHORD-mu, from 0.9 to 0.05 over 200 turns without phi. weight: "phi", "probability" (p, the paper's
    importance-sampled SFT) or "none". cutoff: in (0, 1]; tokens above this probability are left alone (phi alone).
    dual: verl's dual clip, 3 in the released code.
    """
    if not base.has("credit"):
        raise MethodError(
            f"chord shows demonstrations beside responses that earn a reward, and {base.name} gives no credit for any"
        )
    made = base.wrap("collect", with_experts(source=text_experts(file=experts), share=share))
    track = made.tracks[0]
    for p in track.of("loss"):
        made = made.on(track.name).wrap(p.slot, scaled(by=complement(mu)))
    made = made.then(imitation(mu=mu, weight=weight, cutoff=cutoff))
    return made if dual is None else made.swap("surrogate.shape.dual", dual)
