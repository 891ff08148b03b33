"""REC, REP and RED: group-relative REINFORCE as an off-policy algorithm, and its named members (arXiv 2509.24203).

Token loss, with `r = pi / pi_old` and everything but the single `log pi` detached:

    l = - w A log pi M  +  regulariser,        loss = sum(l m) / sum(m)

    A   R_i - mean_g(R)                           std_normalize: over (population std + 1e-6)
    M   1                                         mask "none"
        [A >= 0, r <= 1 + eps_high] or [A <= 0, r >= 1 - eps_low]           "one_side", where PPO-clip has a gradient
        1 - eps_low <= r <= 1 + eps_high                                    "two_side"
        two_side, or [A >= 0, r <= 1 - outer_low] or [A <= 0, r >= 1 + outer_high]   "ring"
        one_side of s = exp(mean_t log r_t), one value per response         "sequence_one_side"
    w   1, r, s, exp(A / temp)                    weight "none", "ratio", "sequence_ratio", "advantage"
    regulariser   coef (log pi - log pi_old)^2    "k2"; outside M, so it holds masked decisions too
                  -coef log pi                    "forward_kl"; the same as A + coef wherever M = 1

A decision with A = 0 is active on both sides; `R_i = mean` counts as positive. Where paper and released code
(Trinity-RFT, `rec_policy_loss.py`, `rec_advantage.py`) differ, or the code is open to doubt:

- the theory squares the log-ratio of the whole response, the code that of each token: `level`, "token" as in the code;
- a group of one is a NameError in the code, whose intention (mean 0, std 1) would learn from the bare reward; here it
  has advantage 0, as an all-equal group has, and is moved by a regulariser only;
- the code's constructor has outer bounds (0.4, 0.4), its default arguments and examples (0.6, 2.0), which are ours;
- the code uses `exp(log pi - log pi_old)` as it is; here its logarithm is clamped to [-20, 20], beyond every bound;
- with the sequence mask the reduction becomes per="row", as in the code;
- no dual clip, and the population std: do not mix with verl's GRPO when comparing;
- the repository's separate `opmd` loss, token mean over (1 + tau), is half of `reinforce`'s step and left out.

The data must be older than the policy for all of this to matter: with one update per batch (the default) r = 1,
nothing is masked, and k2 is 0. Make it stale with the base's `rows` and `passes`, for example `rec+grpo(rows=64)`:
a batch then serves `passes * batch / rows` updates, the paper's sync_interval.
"""

from __future__ import annotations

from typing import Any

from trimtab.core.errors import MethodError, nearest
from trimtab.core.method import Method
from trimtab.core.piece import Piece
from trimtab.core.registry import Neutral, method
from trimtab.methods.language.bases import grpo
from trimtab.stages.annotate import logp_old
from trimtab.stages.credit import group_normalised
from trimtab.stages.offpolicy import (
    balanced_rows,
    drift,
    exp_advantage,
    forward_kl,
    importance,
    one_side,
    ring,
    two_side,
)
from trimtab.stages.surrogate import score_function, sequence_ratio, surrogate, token_ratio

CHOICES: dict[str, tuple[str, ...]] = {
    "mask": ("none", "one_side", "two_side", "ring", "sequence_one_side"),
    "weight": ("none", "ratio", "sequence_ratio", "advantage"),
    "drop": ("none", "balance"),
    "regulariser": ("none", "k2", "forward_kl"),
    "level": ("token", "sequence"),
}

PRESETS: dict[str, dict[str, Any]] = {
    "reinforce": {"mask": "none"},
    "grpo": {"weight": "ratio", "std_normalize": True},
    "one_side_is": {"weight": "ratio"},
    "one_side": {},
    "two_side_is": {"mask": "two_side", "weight": "ratio"},
    "two_side": {"mask": "two_side"},
    "ring_is": {"mask": "ring", "weight": "ratio"},
    "ring": {"mask": "ring"},
    "wide": {"eps_low": 0.6, "eps_high": 2.0},
    "gspo_one_side_is": {"mask": "sequence_one_side", "weight": "sequence_ratio"},
    "gspo_one_side": {"mask": "sequence_one_side"},
    "asymre": {"mask": "none", "regulariser": "forward_kl"},
    "opmd": {"mask": "none", "regulariser": "k2"},
    "red_drop": {"mask": "none", "drop": "balance"},
    "red_weight": {"mask": "none", "weight": "advantage"},
}


@method(
    world="language",
    title="Group-Relative REINFORCE Is Secretly an Off-Policy Algorithm (REC, REP, RED)",
    arxiv="2509.24203",
    base=grpo,
    case="text",
    neutral=Neutral(
        {"weight": "ratio", "std_normalize": True},
        level="exact",
        why="the one-sided mask and the detached ratio have the gradient of the clipped surrogate; the std is the same",
        base_options={"ddof": 0, "eps": 1e-6},
    ),
    presets=PRESETS,
)
def rec(
    base: Method,
    *,
    mask: str = "one_side",
    eps_low: float | None = None,
    eps_high: float | None = None,
    outer_low: float = 0.6,
    outer_high: float = 2.0,
    weight: str = "none",
    temp: float = 1.0,
    std_normalize: bool = False,
    drop: str = "none",
    regulariser: str = "none",
    coef: float = 0.1,
    level: str = "token",
) -> Method:
    """Edits to grpo: credit not divided by the std; a hard, detached mask instead of the clip; no importance sampling.

    The defaults are REC-OneSide-NoIS, which the paper recommends; the presets are the other named members.

    mask: which decisions learn. eps_low in [0, 1], eps_high >= 0: the ratio is bounded by [1 - eps_low, 1 + eps_high];
    None leaves the base's bound, 0.2 and 0.2 in grpo (so `rec+bapo` masks by BAPO's bound); "wide" is [0.4, 3].
    outer_low in [0, 1], outer_high >= 0: a ring takes back what went the wrong way to 1 - outer_low or 1 + outer_high.
    weight: what multiplies A, detached; "sequence_ratio" needs mask="sequence_one_side". temp > 0: of "advantage".
    std_normalize: divide A by the group's population std + 1e-6. drop: "balance" drops random negatives until no group
    has more of them than positives (RED-Drop); they get A = 0 and stay in the denominator. regulariser, coef: added
    loss and its coefficient, at least 0. level: "token" or "sequence", of k2 alone.
    """
    given = {"mask": mask, "weight": weight, "drop": drop, "regulariser": regulariser, "level": level}
    _known(given)
    made = base.swap("credit", group_normalised(scale="group" if std_normalize else "none", ddof=0, eps=1e-6))
    if drop == "balance":
        made = made.wrap("credit", balanced_rows())
    weigh = _weight(weight, temp)
    made = _masked(made, mask, weigh, outer_low, outer_high)
    for side, eps in (("low", eps_low), ("high", eps_high)):
        if eps is not None and mask != "none":
            made = made.swap(f"surrogate.bound.{side}", eps)
    if regulariser != "none":
        per = made.get("surrogate.per")
        made = made.then(drift(coef=coef, level=level, per=per) if regulariser == "k2" else forward_kl(coef, per=per))
    return _aged(made, needed=mask != "none" or weight == "ratio" or regulariser == "k2")


def _known(given: dict[str, str]) -> None:
    for name, value in given.items():
        if value not in CHOICES[name]:
            raise MethodError(f"rec has {name}={value!r}. {nearest(str(value), CHOICES[name])}")
    if given["weight"] == "sequence_ratio" and given["mask"] != "sequence_one_side":
        raise MethodError(
            f"rec has weight='sequence_ratio' with mask={given['mask']!r}; a weight of the whole response goes with "
            f"the mask of the whole response. Use mask='sequence_one_side', or weight='ratio'."
        )
    if given["level"] == "sequence" and given["regulariser"] == "forward_kl":
        raise MethodError(
            "rec has level='sequence' with regulariser='forward_kl', which is linear in log pi, so that both levels "
            "are the same and the option would be ignored. Leave it out."
        )


def _weight(name: str, temp: float) -> Piece | None:
    if name == "advantage":
        return exp_advantage(temp=temp)
    return None if name == "none" else importance(ratio=token_ratio() if name == "ratio" else sequence_ratio())


def _masked(base: Method, mask: str, weigh: Piece | None, outer_low: float, outer_high: float) -> Method:
    """The base with another shape and weight; its bound stays, but for mask="none", which has none."""
    if mask == "none":
        return base.swap("surrogate", surrogate(shape=score_function(), weight=weigh, per=base.get("surrogate.per")))
    shape = {"two_side": two_side(), "ring": ring(outer_low=outer_low, outer_high=outer_high)}.get(mask, one_side())
    made = base.swap("surrogate.shape", shape)
    if weigh is not None:
        made = made.swap("surrogate.weight", weigh)
    if mask == "sequence_one_side":
        made = made.swap("surrogate.ratio", sequence_ratio())
        made = made if made.get("surrogate.per") == "row" else made.swap("surrogate.per", "row")
    return made


def _aged(made: Method, *, needed: bool) -> Method:
    """With `logp_old` exactly where something reads it: it costs a forward pass."""
    there = any(slot == "logp_old" for _, slot, _ in made.places())
    if there == needed:
        return made
    return made.then(logp_old()) if needed else made.drop("logp_old")
