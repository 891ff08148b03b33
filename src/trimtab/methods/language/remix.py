"""ReMix: reuse the last turns' rollouts, keep the clip where the policy is now, then start over on policy.

Edits to the base, in a first phase of `reincarnate` turns:

- of each batch a part `share` is rollouts of the last `window` turns (collect wrap), and (1 - share) of the base's
  prompts are asked anew;
- the ratio of a replayed row is to the policy that made it, `r = pi / pi_b`, and the base's clip is moved from 1 to
  `c = pi_k / pi_b`, `pi_k` the policy at the start of the turn: Mix-PPG. For fresh rows c = 1, the base's clip;
- each batch is gone through `passes` times;
- the KL penalty is a convex mix of one to the reference and one to the policy a turn ago.

Then the policy is reincarnated: the reference becomes the policy as it is, the buffer is cleared, and training goes on
on policy, one pass a batch, with the same optimiser state and the same penalty.

The released repository holds no training code; this follows a detailed note on the paper and an independent
implementation of the clip (arXiv 2507.06892). Left open there, and decided here: the penalty's coefficient (1e-3) and
estimator (k3); whole groups are replayed and their credit is computed again, which gives the same for a credit over
groups and, for one with a critic, that of the present critic, as the paper has it; the first batch, with nothing to
replay, holds the fresh rows alone (the note fills it up); an entropy bonus has minus sign in the loss.
"""

from __future__ import annotations

from trimtab.core.copies import at_phase, previous
from trimtab.core.errors import MethodError
from trimtab.core.method import Method, Phase
from trimtab.core.phases import clear, phased
from trimtab.core.piece import Schedule
from trimtab.core.registry import Neutral, method
from trimtab.core.schedules import staircase
from trimtab.methods.language.bases import grpo
from trimtab.stages.annotate import logp_ref
from trimtab.stages.reuse import kl_convex, logp_previous, recentred, replayed, to_behavior
from trimtab.stages.terms import entropy_bonus

ROWS = ("policy", "replay")


@method(
    world="language",
    title="Squeeze the Soaked Sponge: Reincarnating Mix-policy Proximal Policy Gradient (ReMix)",
    arxiv="2507.06892",
    base=grpo,
    case="text",
    neutral=Neutral(
        {"share": 0.0, "passes": 1, "kl_floor": 1.0, "reincarnate": None},
        level="exact",
        why="nothing is replayed, one pass, and the KL is that to the start",
        base_options={"kl": 1e-3},
    ),
    presets={
        "long": {"reincarnate": 100},
        "no_reincarnation": {"reincarnate": None},
        "no_utd": {"passes": 1},
        "no_kl_convex": {"kl_floor": 1.0},
    },
)
def remix(
    base: Method,
    *,
    share: float = 0.4,
    window: int = 2,
    passes: int = 2,
    reincarnate: int | None = 50,
    kl: float = 1e-3,
    kl_wait: int = 50,
    kl_floor: float = 0.5,
    entropy: float = 0.0,
) -> Method:
    """Edits to grpo: replayed groups, a clip centred at `pi_k / pi_b`, two passes, two KL anchors; later on policy.

    `loss = -min(r A, clip(r, max(c - 0.2, 0), c + 0.2) A) + kl (l k3(reference) + (1 - l) k3(previous))`, mean over
    tokens; `r = pi / pi_b`, `c = pi_k / pi_b`, both relative to the policy that made the row.

    share: of the batch that is replayed, in [0, 1). window: turns whose rollouts are held, at least share /
    (1 - share). passes: update-to-data ratio of the first phase. reincarnate: turns of the first phase, 50 (ReMix-GRPO)
    or 100 (preset "long"); None never leaves it. kl: coefficient of both anchors together. kl_wait, kl_floor: the
    reference's part l is 1 for so many turns, then falls by 0.1 each 10 turns to this. entropy: coefficient of an
    entropy bonus.
    """
    _fits(base)
    if not 0 <= kl_floor <= 1:
        raise MethodError(f"remix: kl_floor={kl_floor} must be in [0, 1], the least part of the KL to the reference")
    mixed = (
        base.wrap("collect", replayed(share=share, window=window))
        .wrap("surrogate.bound", recentred(measure=base.get("surrogate.ratio")))
        .wrap("surrogate.ratio", to_behavior())
        .but(passes=passes)
    )
    prompts = base.flatten().get("collect.prompts")
    fresh = None if prompts is None else max(1, round((1 - share) * prompts))
    if fresh not in (None, prompts):
        mixed = mixed.set("collect.prompts", fresh)
    for name, slot, p in base.places():
        if p.core.options.get("rows") == "policy":
            mixed = mixed.set(f"{name}:{slot}.rows" if name else f"{slot}.rows", ROWS)
    weight = staircase(start=1.0, end=kl_floor, step=0.1, wait=kl_wait, every=10)
    mixed, plain = (anchored(m, kl, weight, entropy) for m in (mixed, base))
    if reincarnate is None:
        return mixed
    if reincarnate < 1:
        raise MethodError(f"remix has reincarnate={reincarnate}; the first phase lasts at least 1 turn, or None")
    return phased(
        base.name,
        [
            Phase("mix", mixed, {"turns": reincarnate}),
            Phase("on policy", plain, {}, (clear("/replay"),)),
        ],
    )


def _fits(base: Method) -> None:
    places = {slot: p.core for _, slot, p in base.places()}
    if "kl" in places:
        raise MethodError(
            f"remix has a KL penalty of its own, and {base.name} has one already; give remix(kl=...) alone"
        )
    if any(p.name == "kept" for p in base.get("collect").stack()):
        raise MethodError(
            f"remix replays what is collected, and {base.name} collects what was collected before too (kept), which "
            f"would then be replayed twice over; use one of the two"
        )
    parts = places["surrogate"].options if "surrogate" in places else {}
    if parts.get("ratio") is None or parts.get("bound") is None:
        raise MethodError(
            f"remix moves the bound of a ratio to old data, and {base.name} has no surrogate with both; use grpo, or a "
            f"method that changes it"
        )
    dual = parts["shape"].core.options.get("dual")
    if dual is not None:
        raise MethodError(
            f"remix+{base.name} has dual={dual}: it holds ratios above a constant, and a replayed row may begin above "
            f"it, so that it would never learn. Leave dual out."
        )


def anchored(made: Method, kl: float, weight: float | Schedule, entropy: float = 0.0) -> Method:
    """With both anchors of the KL, and the bonus; for all rows that the surrogate concerns."""
    rows, per = made.get("surrogate.rows"), made.get("surrogate.per")
    made = made.then(logp_ref(), logp_previous(share=weight), kl_convex(coef=kl, share=weight, rows=rows, per=per))
    if entropy:
        made = made.then(entropy_bonus(coef=entropy, rows=rows, per=per))
    return made.but(copies={"reference": at_phase("policy"), "previous": previous("policy", by="turn")})
