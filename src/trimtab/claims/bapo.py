"""BAPO on stale token data: faster than a fixed clip, and is it the search or only the width?

The problem of the card: 16 prompts, 6 places, 8 tokens, right when the tokens sum to the prompt's target modulo 4; a
batch of 4S rows a prompt feeds S updates of 128 rows, step 192 on the mean over tokens (12 / 48 on the sum over a
prompt's), 30 batches.

Differences from the card's own measurement: the rows of an update are drawn from the whole batch, so a prompt has 8 of
them on average, not exactly; the table starts uniform, and the target moduli differ by seed; rewards are the policy's
exact expectation, not a sample mean; 10 seeds for 4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trimtab.claims.core import Arm, Claim, Part, Study, above
from trimtab.claims.effect import LARGER, for_tiny, on_tiny
from trimtab.claims.statistics import ClaimError
from trimtab.claims.toys import on_toy, token_entropy, token_reward, token_task
from trimtab.core.loop import run
from trimtab.core.method import Method
from trimtab.core.registry import find

BATCHES, LONGEST = 30, 120
WIDE: dict[str, Any] = {"clip_low": 0.4, "clip_high": 2.0}  # [0.6, 3.0]: as wide as BAPO's bounds ever become


def method_of(name: str, **stale: Any) -> Method:
    """One of the compared methods on `grpo(rows, passes)`."""
    grpo, bapo = find("grpo"), find("bapo")
    made: dict[str, Callable[[], Method]] = {
        "grpo": lambda: grpo(**stale),
        "clip-higher": lambda: grpo(clip_high=0.28, **stale),
        "fixed wide": lambda: grpo(**WIDE, **stale),
        "bapo": lambda: bapo(grpo(**stale)),
        "bapo code": lambda: bapo(grpo(**stale), preset="official_code"),
    }
    return made[name]()


WHAT = {
    "grpo": "GRPO, ratio clipped to [0.8, 1.2]",
    "clip-higher": "GRPO, ratio clipped to [0.8, 1.28]",
    "fixed wide": "GRPO, ratio clipped to [0.6, 3.0], nothing searched",
    "bapo": "BAPO as in the paper: share 0.4, low 0.6 to 0.9, high 1.2 to 3.0",
    "bapo code": "BAPO as in the released configuration: ratio 1.0, low 0.6 to 0.8 first, high 1.2 to 2.0, dual clip",
}


def toy_arm(name: str, stale: int) -> Arm:
    def make(seed: int) -> Method:
        return on_toy(method_of(name, rows=128, passes=2), prompts=16, group=4 * stale, lr=192.0)

    return Arm(f"{WHAT[name]}; {stale} updates a batch", make)


def mechanism(method: Method, seed: int) -> dict[str, float]:
    """reward: expected reward after 30 batches. entropy_at_half: nats a token where the reward first reaches 1/2."""
    environment, policy = token_task(seed=seed)
    before, crossing, reward = (token_reward(policy), token_entropy(policy)), None, None
    for step in run(method, environment, policy, until=LONGEST, seed=seed):
        now = token_reward(policy), token_entropy(policy)
        if crossing is None and now[0] >= 0.5:
            share = (0.5 - before[0]) / (now[0] - before[0])
            crossing = before[1] + share * (now[1] - before[1])
        if step.turn == BATCHES:
            reward = now[0]
        if reward is not None and crossing is not None:
            return {"reward": reward, "entropy_at_half": crossing}
        before = now
    raise ClaimError(f"{method.name} did not reach a reward of 1/2 in {LONGEST} batches, so it has no entropy there")


def part(says: str, baseline: str, threshold: float, stale: int, metric: str = "reward") -> Part:
    names = [n for n in WHAT if n not in ("bapo", baseline)]
    at = f" S={stale}"
    return Part(says, metric, "bapo" + at, baseline + at, tuple(n + at for n in names), above(threshold))


def parts(stale: int) -> list[Part]:
    with_ = f"with {stale} updates a batch"
    return [
        part(f"{with_}, the reward after 30 batches is above GRPO's by more than 0.15", "grpo", 0.15, stale),
        part(f"{with_}, it is above clip-higher's by more than 0.05", "clip-higher", 0.05, stale),
        part(f"{with_}, it is above that of a fixed wide clip: the search matters, not only the width",
             "fixed wide", 0.0, stale),
        part(f"{with_}, at the same reward (1/2) the policy has more entropy than GRPO's", "grpo", 0.0, stale,
             "entropy_at_half"),
    ]  # fmt: skip


# -- on a language model: the same methods, 8 updates of stale rows a batch -----------------------------------------

DECISIONS = 150_000


def tiny_arm(name: str) -> Arm:
    return Arm(f"{WHAT[name]}; 8 updates a batch", lambda seed: for_tiny(method_of(name, rows=128, passes=2)))


TINY = ("grpo", "clip-higher", "fixed wide", "bapo")

CLAIM = Claim(
    method="bapo",
    statement="With stale data, clip bounds that are searched so that positive tokens supply a given share of the "
    "update learn faster than fixed ones, and keep the policy's entropy.",
    mechanism=Study(
        arms={f"{name} S={s}": toy_arm(name, s) for s in (4, 16) for name in WHAT},
        parts=(*parts(4), *parts(16)),
        measure=mechanism,
        seeds=10,
    ),
    full=Study(
        arms={name: tiny_arm(name) for name in TINY},
        parts=(
            Part("tiny's held-out greedy accuracy ends above GRPO's", "accuracy", "bapo", "grpo",
                 ("clip-higher", "fixed wide"), above(0.0)),
            Part("tiny's held-out greedy accuracy ends above that of a fixed wide clip", "accuracy", "bapo",
                 "fixed wide", ("grpo", "clip-higher"), above(0.0)),
            Part("tiny's training reward ends above GRPO's", "reward", "bapo", "grpo", ("clip-higher", "fixed wide"),
                 above(0.0)),
            Part("tiny's training reward ends above that of a fixed wide clip", "reward", "bapo", "fixed wide",
                 ("grpo", "clip-higher"), above(0.0)),
        ),
        measure=on_tiny(DECISIONS),
        seeds=5,
        about=f"tiny on {LARGER}, {DECISIONS} decisions",
    ),
)  # fmt: skip
