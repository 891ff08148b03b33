"""REC on a bandit with stale data: what keeps a group-relative REINFORCE from the wrong arm?

The problem of the card: three arms paying 0, 0.8 and 1, first probabilities 0.3, 0.6 and 0.1, groups of 8 pulls from a
behaviour that is refreshed every S = 200 steps, plain gradient steps of size 0.2 on the mean over rows, 2000 steps. On
fixed data un-clipped REINFORCE goes to the arm with the largest `pi_b(j) (r_j - mean)`, which is the second best.

Differences from the card's own measurement: 12 seeds for 10; the 200 groups of one behaviour are drawn at once, as one
batch of 200 updates of one group each, which has the same law; "found" means a final probability above 1/2.
"""

from __future__ import annotations

import torch

from trimtab.claims.core import Arm, Claim, Part, Study, above, within
from trimtab.claims.effect import LARGER, for_tiny, on_tiny
from trimtab.claims.toys import bandit_task, on_toy
from trimtab.core.loop import run
from trimtab.core.method import Method
from trimtab.core.registry import find

REWARDS, START = (0.0, 0.8, 1.0), (0.3, 0.6, 0.1)
STEPS, PULLS = 2000, 8
KINDS = {  # arm -> (in words, preset of rec)
    "reinforce": ("REINFORCE, no clip", "reinforce"),
    "one-side": ("REC-OneSide-NoIS, clipped at [0.8, 1.2], no importance weight", "one_side"),
    "one-side IS": ("REC-OneSide-IS, clipped at [0.8, 1.2], with the importance weight", "one_side_is"),
    "wide": ("REC-OneSide-NoIS, clipped at [0.4, 3.0]", "wide"),
    "red-drop": ("RED-Drop: surplus negative responses dropped at random, no clip", "red_drop"),
    "red-weight": ("RED-Weight: advantages times exp(A), no clip", "red_weight"),
    "asymre": ("REP-AsymRE: baseline lowered by 0.1, no clip", "asymre"),
    "opmd": ("REP-OPMD: 0.1 times the squared log-ratio added, no clip", "opmd"),
}


def rec_of(kind: str) -> Method:
    return find("rec")(preset=KINDS[kind][1])


def toy_arm(kind: str, stale: int = 200, lr: float = 0.2, note: str = "") -> Arm:
    def make(seed: int) -> Method:
        stepwise = rec_of(kind).but(rows=PULLS).set("surrogate.unit", "group")
        return on_toy(stepwise, prompts=stale, group=PULLS, lr=lr)

    return Arm(f"{KINDS[kind][0]}; behaviour {stale} steps old at most{note}", make)


def mechanism(method: Method, seed: int) -> dict[str, float]:
    """reward: the final policy's expected reward. found: 1 if it gives the best arm a probability above 1/2, else 0."""
    environment, policy = bandit_task(REWARDS, START)
    for _ in run(method, environment, policy, until={"updates": STEPS}, seed=seed):
        pass
    p = policy.table.detach().softmax(-1)
    reward = float((p * torch.tensor(REWARDS, dtype=p.dtype)).sum())
    return {"reward": reward, "found": float(p[-1] > 0.5)}


def finds(kind: str, says: str) -> Part:
    """`kind` finds the best arm in at least half of the seeds more than REINFORCE does (the card's counts: 0.7)."""
    return Part(f"{says} finds the best arm in more than half of the seeds beyond REINFORCE", "found", kind,
                "reinforce", ("reinforce fresher", "reinforce smaller"), above(0.5))  # fmt: skip


PARTS = (
    finds("one-side", "clipping alone, without importance weights,"),
    Part("importance weights change the final reward by less than 0.01", "reward", "one-side", "one-side IS",
         ("reinforce",), within(-0.01, 0.01)),
    Part("a wide clip [0.4, 3.0] ends more than 0.02 above a narrow one [0.8, 1.2]", "reward", "wide", "one-side",
         ("reinforce",), above(0.02)),
    finds("red-drop", "dropping surplus negative responses (RED-Drop), without a clip,"),
    finds("red-weight", "weighing responses by exp(A) (RED-Weight), without a clip,"),
    finds("asymre", "a lowered baseline (AsymRE), without a clip,"),
    finds("opmd", "a penalty on the squared log-ratio (OPMD), without a clip,"),
    Part("it is staleness that misleads REINFORCE: with a behaviour 20 steps old at most it finds the best arm in more "
         "than half of the seeds beyond itself at 200", "found", "reinforce fresher", "reinforce", ("one-side",),
         above(0.5)),
)  # fmt: skip

# -- on a language model: 16 updates of stale rows a batch ----------------------------------------------------------

DECISIONS = 150_000
TINY = ("reinforce", "one-side", "one-side IS", "wide")


def tiny_arm(kind: str) -> Arm:
    def make(seed: int) -> Method:
        return for_tiny(rec_of(kind).but(rows=128, passes=4))

    return Arm(f"{KINDS[kind][0]}; 16 updates a batch", make)


CLAIM = Claim(
    method="rec",
    statement="Group-relative REINFORCE is off-policy by nature; what keeps it safe on stale data is clipping (or an "
    "additive penalty, or shaped data), while importance weights hardly matter, and a wider clip is faster.",
    mechanism=Study(
        arms={
            **{kind: toy_arm(kind) for kind in KINDS},
            "reinforce fresher": toy_arm("reinforce", stale=20),
            "reinforce smaller": toy_arm("reinforce", lr=0.05, note="; steps a quarter as long"),
        },
        parts=PARTS,
        measure=mechanism,
        seeds=12,
    ),
    full=Study(
        arms={kind: tiny_arm(kind) for kind in TINY},
        parts=(
            Part("tiny's held-out greedy accuracy ends above un-clipped REINFORCE's", "accuracy", "one-side",
                 "reinforce", ("one-side IS", "wide"), above(0.0)),
            Part("importance weights change it by less than 5 points", "accuracy", "one-side", "one-side IS",
                 ("reinforce",), within(-0.05, 0.05)),
            Part("a wide clip ends above a narrow one", "accuracy", "wide", "one-side", ("reinforce",), above(0.0)),
        ),
        measure=on_tiny(DECISIONS),
        seeds=5,
        about=f"tiny on {LARGER}, {DECISIONS} decisions",
    ),
)  # fmt: skip
