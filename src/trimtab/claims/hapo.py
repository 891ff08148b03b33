"""HAPO on phrases: does a token's entropy know where to clip, and does the sign of the signal matter?

The problem of the card: 64 contexts with 24 random features, 8 places, 8 words, a linear softmax taught until 4% are
right; three of the places decide, the others are free. 16 prompts x 8 tries a batch, 8 updates of 16 rows from each, 60
batches. Here rows end with token 0, so their lengths differ and credit over tokens differs from that over rows; the
card's toy had equal lengths. Success is exact, over all contexts.

Redistribution scales gradients, down for most tokens, so every comparison is made twice: with plain gradient steps of
20, and with every step as long as DAPO's are on average there ("equal steps"), where the direction alone is left.

Differences from the card's own measurement: plain gradient steps for Adam, with which nothing was learned here, the
gradients being sparse and noisy; words of a linear teacher; 10 seeds for 5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trimtab.claims.core import Arm, Claim, Part, Study, above
from trimtab.claims.effect import LARGER, for_tiny, on_tiny
from trimtab.claims.toys import equal_step, phrase_entropy, phrase_success, phrase_task, toy_rollouts
from trimtab.core.batch import Batch
from trimtab.core.kit import Kit
from trimtab.core.loop import Step, run
from trimtab.core.method import Method
from trimtab.core.piece import piece
from trimtab.core.registry import find
from trimtab.stages.update import sgd

BATCHES, LR, LENGTH = 60, 20.0, 1.0
OFF: dict[str, Any] = {"swing": None, "token_credit": False, "bound": None, "redistribute": None}


@piece("annotate", at="update", reads=("entropy_signal", "mask"), writes=("entropy_signal",))
def shuffled(kit: Kit, batch: Batch, now: Any) -> Batch:
    """The signals of an update, dealt out anew among its decisions: as many of each size, and no knowledge in them."""
    mask = batch.mask.bool()
    values = batch.entropy_signal[mask]
    order = torch.randperm(len(values), generator=kit.rng("shuffled"))
    signal: Tensor = batch.entropy_signal.masked_scatter(mask, values[order])
    return batch.put(entropy_signal=signal)


def method_of(name: str, **base: Any) -> Method:
    """One of the compared methods, on `dapo` over `grpo(rows, passes)`; dynamic sampling is off."""
    grpo, dapo, hapo = find("grpo"), find("dapo"), find("hapo")

    def on(**clip: Any) -> Method:
        return dapo(grpo(**base), batches=0, penalty=0.0, **clip)

    made: dict[str, Callable[[], Method]] = {
        "dapo": on,
        "dapo, wide": lambda: on(clip_low=0.4, clip_high=0.56),
        "hapo": lambda: hapo(on()),
        "hapo, released sign": lambda: hapo(on(), sign="released"),
        "hapo, shuffled": lambda: hapo(on()).then(shuffled(), track="policy"),
        "temperature alone": lambda: hapo(on(), **{**OFF, "swing": 0.05}),
        "credit alone": lambda: hapo(on(), **{**OFF, "token_credit": True}),
        "bound alone": lambda: hapo(on(), **{**OFF, "bound": 1.0}),
        "redistribution alone": lambda: hapo(on(), **{**OFF, "redistribute": 1.0}),
    }
    return made[name]()


WHAT = {
    "dapo": "DAPO, ratio clipped to [0.8, 1.28]",
    "dapo, wide": "DAPO, ratio clipped to [0.6, 1.56], as wide as HAPO's bounds ever become",
    "hapo": "HAPO, the signal in [-1, 1]",
    "hapo, released sign": "HAPO, the signal in [0, 1] as released",
    "hapo, shuffled": "HAPO, its signals dealt out at random among the tokens of the update",
    "temperature alone": "HAPO's adaptive temperature on DAPO",
    "credit alone": "HAPO's credit over tokens on DAPO",
    "bound alone": "HAPO's adaptive bound on DAPO",
    "redistribution alone": "HAPO's redistribution on DAPO",
}


def toy_arm(name: str, equal: bool = False) -> Arm:
    def make(seed: int) -> Method:
        made = method_of(name, rows=16).swap("collect", toy_rollouts(prompts=16, group=8))
        return made.set("credit.limit", 8).swap("update", equal_step(length=LENGTH) if equal else sgd(lr=LR))

    how = f"every step {LENGTH:g} long" if equal else f"steps of {LR:g}"
    return Arm(f"{WHAT[name]}; 8 updates a batch, {how}", make)


def mechanism(method: Method, seed: int) -> dict[str, float]:
    """success: exact, after 60 batches. entropy_at_third: nats a token where the success first reaches 1/3, or at the
    end where it does not.
    """
    environment, policy = phrase_task(seed)
    crossing = None
    before = phrase_success(policy), phrase_entropy(policy)
    for _ in run(method, environment, policy, until=BATCHES, seed=seed):
        now = phrase_success(policy), phrase_entropy(policy)
        if crossing is None and now[0] >= 1 / 3:
            share = (1 / 3 - before[0]) / max(now[0] - before[0], 1e-12)
            crossing = before[1] + share * (now[1] - before[1])
        before = now
    return {"success": before[0], "entropy_at_third": before[1] if crossing is None else crossing}


def part(says: str, method: str, baseline: str, *controls: str, metric: str = "success") -> Part:
    return Part(says, metric, method, baseline, controls, above(0.0))


EQUAL = ("dapo", "hapo", "hapo, released sign", "hapo, shuffled")


def equal_part(says: str, method: str, baseline: str, control: str) -> Part:
    return part(says, *(f"{name}, equal steps" for name in (method, baseline, control)))


PARTS = (
    part("after 60 batches HAPO's success is above DAPO's", "hapo", "dapo", "dapo, wide", "hapo, shuffled"),
    part("with the signed signal it is above that with the released one", "hapo", "hapo, released sign", "dapo"),
    part("with the released signal it is above DAPO's", "hapo, released sign", "dapo", "hapo"),
    part("it is above that with shuffled signals: where the entropy is high matters", "hapo", "hapo, shuffled", "dapo"),
    part("it is above that of DAPO with a clip as wide as HAPO's ever is", "hapo", "dapo, wide", "dapo"),
    part("at the same success (1/3) the policy has more entropy than DAPO's", "hapo", "dapo", "hapo, shuffled",
         metric="entropy_at_third"),
    *(part(f"the {name} is enough for more success than DAPO's", f"{name} alone", "dapo", "hapo")
      for name in ("temperature", "credit", "bound", "redistribution")),
    equal_part("with every step equally long, HAPO's success is above DAPO's", "hapo", "dapo", "hapo, shuffled"),
    equal_part("with every step equally long, it is above that with the released sign", "hapo", "hapo, released sign",
               "dapo"),
    equal_part("with every step equally long, it is above that with shuffled signals", "hapo", "hapo, shuffled",
               "dapo"),
)  # fmt: skip

# -- on a language model: 8 updates of stale rows a batch ----------------------------------------------------------

DECISIONS = 75_000
TINY = ("dapo", "hapo", "hapo, released sign", "hapo, shuffled")


def untempered_entropy(step: Step) -> float:
    """The policy's own entropy, nats a token: the draws at HAPO's temperatures, weighted as if they were at 1."""
    batch = step.batch
    weight = (batch.logp_old - batch.logp_behavior).exp()
    return float(-(weight * batch.logp_old * batch.mask).sum() / batch.mask.sum())


def tiny_arm(name: str) -> Arm:
    return Arm(f"{WHAT[name]}; 8 updates a batch", lambda seed: for_tiny(method_of(name, rows=128, passes=2)))


CLAIM = Claim(
    method="hapo",
    statement="Temperature, credit, clip range and advantage that follow each token's entropy beat DAPO, which treats "
    "all tokens alike, and keep more entropy; each of the four parts helps by itself.",
    mechanism=Study(
        arms={
            **{name: toy_arm(name) for name in WHAT},
            **{f"{name}, equal steps": toy_arm(name, equal=True) for name in EQUAL},
        },
        parts=PARTS,
        measure=mechanism,
        seeds=10,
    ),
    full=Study(
        arms={name: tiny_arm(name) for name in TINY},
        parts=(
            Part("tiny's held-out greedy accuracy ends above DAPO's", "accuracy", "hapo", "dapo",
                 ("hapo, shuffled", "hapo, released sign"), above(0.0)),
            Part("it ends above that with the released sign", "accuracy", "hapo", "hapo, released sign", ("dapo",),
                 above(0.0)),
            Part("it ends above that with shuffled signals: where the entropy is high matters", "accuracy", "hapo",
                 "hapo, shuffled", ("dapo",), above(0.0)),
            Part("at the same training reward (0.15) tiny has more entropy than with DAPO", "entropy_on_the_way",
                 "hapo", "dapo", ("hapo, shuffled",), above(0.0)),
        ),
        measure=on_tiny(DECISIONS, entropy=untempered_entropy),
        seeds=5,
        about=f"tiny on {LARGER}, {DECISIONS} decisions, entropy untempered",
    ),
)  # fmt: skip
