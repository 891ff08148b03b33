"""ReMix on tokens: does replay save rollouts, is the moved clip what makes it work, and what does reuse cost?

The problem of the card: 16 prompts, 4 places, 8 tokens, right when the tokens sum to the prompt's target modulo 4; 16
rows a prompt in each batch, gone through in two halves; plain gradient descent on the mean over tokens, KL 0.05, 200
turns. Measured are the fresh rollouts until the expected reward, averaged over 5 turns, reaches 0.8.

Differences from the card's own measurement: rewards are the policy's exact expectation; the step size is chosen so that
GRPO needs about as many rollouts as there; the halves are drawn from the whole batch; 8 seeds for 4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trimtab.claims.core import Arm, Claim, Part, Study, above, below
from trimtab.claims.effect import LARGER, SMALL, on_tiny
from trimtab.claims.statistics import ClaimError
from trimtab.claims.toys import on_toy, token_reward, token_task
from trimtab.core.loop import run
from trimtab.core.method import Method, Phase
from trimtab.core.phases import clear, phased
from trimtab.core.piece import Schedule
from trimtab.core.registry import find
from trimtab.core.schedules import staircase
from trimtab.methods.language.remix import ROWS, anchored
from trimtab.stages.reuse import replayed, to_behavior

TURNS, LONGEST, GOAL, SMOOTH = 200, 600, 0.8, 5
PROMPTS, TRIES, LR, KL = 16, 16, 75.0, 0.05


def unmoved(base: Method, kl: float, weight: float | Schedule = 1.0) -> Method:
    """The control: replay, passes and KL of Mix-PPG, ratios to the behavior policy, and the clip left at 1."""
    made = base.wrap("collect", replayed(share=0.4, window=2)).wrap("surrogate.ratio", to_behavior()).but(passes=2)
    made = made.set("credit.rows", ROWS).set("surrogate.rows", ROWS)
    return anchored(made, kl, weight)


Place = Callable[[Method], Method]  # puts GRPO onto its problem
GRPO = find("grpo")


def mixed(place: Place, given: dict[str, Any], **options: Any) -> Method:
    kl = given.pop("kl")
    made: Method = find("remix")(place(GRPO(**given)), kl=kl, **options)
    return made


ARMS: dict[str, tuple[str, Callable[[Place, dict[str, Any]], Method]]] = {
    "grpo": ("GRPO, one pass", lambda place, given: place(GRPO(**given))),
    "two passes": ("GRPO with two passes, nothing replayed", lambda place, given: place(GRPO(passes=2, **given))),
    "unmoved clip": ("replay 0.4 of 2 turns, two passes, the clip at 1", lambda place, given: unmoved(
        place(GRPO(**{k: v for k, v in given.items() if k != "kl"})), given["kl"])),
    "mix-ppg": ("replay 0.4 of 2 turns, two passes, the clip moved; no second anchor, no reincarnation",
                lambda place, given: mixed(place, given, reincarnate=None, kl_floor=1.0)),
    "remix": ("ReMix: the same with both anchors, on policy after 60 turns", lambda place, given: mixed(
        place, given, reincarnate=60)),
    "heavy": ("replay 0.8 of 8 turns, four passes, the clip moved", lambda place, given: mixed(
        place, given, share=0.8, window=8, passes=4, reincarnate=None, kl_floor=1.0)),
}  # fmt: skip


def toy_arm(name: str) -> Arm:
    what, build = ARMS[name]

    def place(method: Method) -> Method:
        return on_toy(method, prompts=PROMPTS, group=TRIES, lr=LR)

    return Arm(what, lambda seed: sized(build(place, {"kl": KL, "rows": PROMPTS * TRIES // 2})))


def sized(method: Method) -> Method:
    """Every batch asks all prompts; where a part of it is replayed, fewer fresh tries at each."""
    if method.phases:
        return method.each(lambda _, inside: sized(inside))
    share = method.get("collect.share") if method.has("collect.share") else 0.0
    return method.set("collect.prompts", PROMPTS).set("collect.group", max(2, round((1 - share) * TRIES)))


def mechanism(method: Method, seed: int) -> dict[str, float]:
    """rollouts: fresh rows until the mean reward of 5 turns reaches 0.8. reward: expected, after 200 turns."""
    environment, policy = token_task(prompts=PROMPTS, length=4, seed=seed)
    rewards: list[float] = []
    made, rollouts, final = 0, None, None
    for step in run(method, environment, policy, until=LONGEST, seed=seed):
        made += int((step.batch.source == 0).sum())
        rewards.append(token_reward(policy))
        if rollouts is None and sum(rewards[-SMOOTH:]) / len(rewards[-SMOOTH:]) >= GOAL:
            rollouts = made
        if step.turn == TURNS:
            final = rewards[-1]
        if rollouts is not None and final is not None:
            return {"rollouts": float(rollouts), "reward": final}
    raise ClaimError(f"{method.name} did not reach a reward of {GOAL} in {LONGEST} turns")


def part(says: str, metric: str, method: str, baseline: str, region: tuple[float, float], *controls: str) -> Part:
    return Part(says, metric, method, baseline, controls, region, "ratio" if metric == "rollouts" else "difference")


PARTS = (
    part("it reaches a reward of 0.8 with less than 0.4 of GRPO's rollouts", "rollouts", "remix", "grpo", below(0.4),
         "two passes"),
    part("replay saves rollouts beyond a second pass: less than 0.75 of those with two passes", "rollouts", "remix",
         "two passes", below(0.75), "grpo"),
    part("the moved clip is what makes replay work: less than 0.75 of the rollouts with the clip at 1", "rollouts",
         "mix-ppg", "unmoved clip", below(0.75), "two passes"),
    part("heavier reuse is faster still", "rollouts", "heavy", "remix", below(1.0), "mix-ppg"),
    part("but ends lower, by more than 0.01", "reward", "heavy", "remix", below(-0.01), "mix-ppg"),
    part("ReMix ends no lower than GRPO (by less than 0.01)", "reward", "remix", "grpo", above(-0.01), "two passes"),
    part("starting over on policy ends above going on with the mix", "reward", "remix", "mix-ppg", above(0.0), "grpo"),
)  # fmt: skip

# -- on a language model -------------------------------------------------------------------------------------------

# The first phase makes 60% of the fresh rollouts of a turn of GRPO's, and lasts 40 turns, about half of the decisions.

DECISIONS, MIXED, TINY_KL = 75_000, 40, 1e-3


def small(made: Method) -> Method:
    """As `for_tiny`, but for the prompts of a turn: GRPO's are 32, of which ReMix asks 19 while it mixes."""
    for path in SMALL.keys() - {"collect.prompts"}:
        made = made.set(path, SMALL[path])
    return made


def clip_at_one() -> Method:
    """The control: ReMix with the clip left at 1, and nothing else changed."""
    base, weight = GRPO(), staircase(start=1.0, end=0.5, step=0.1, wait=50, every=10)
    mixed = unmoved(base, TINY_KL, weight).set("collect.prompts", 19)
    plain = Phase("on policy", anchored(base, TINY_KL, weight), {}, (clear("/replay"),))
    return phased("remix, clip at 1", [Phase("mix", mixed, {"turns": MIXED}), plain])


TINY: dict[str, tuple[str, Callable[[], Method]]] = {
    "grpo": ("GRPO with ReMix's KL penalty, one pass", lambda: GRPO(kl=TINY_KL)),
    "two passes": ("the same with two passes, nothing replayed", lambda: GRPO(kl=TINY_KL, passes=2)),
    "remix, clip at 1": ("ReMix with the clip left at 1", clip_at_one),
    "remix": (f"ReMix: replay 0.4 of 2 turns, two passes, the clip moved; on policy after {MIXED} turns",
              lambda: find("remix")(kl=TINY_KL, reincarnate=MIXED)),
}  # fmt: skip


def tiny_arm(name: str) -> Arm:
    what, build = TINY[name]
    return Arm(what, lambda seed: small(build()))


def on_tiny_part(says: str, metric: str, baseline: str) -> Part:
    return part(says, metric, "remix", baseline, above(0.0), *(n for n in TINY if n not in ("remix", baseline)))


CLAIM = Claim(
    method="remix",
    statement="Rollouts of the last few steps can be used again if the clip is centred on the current policy: the "
    "same quality is reached with a fraction of the rollouts, and starting over on policy avoids the lower ceiling of "
    "reuse.",
    mechanism=Study(arms={name: toy_arm(name) for name in ARMS}, parts=PARTS, measure=mechanism, seeds=8),
    full=Study(
        arms={name: tiny_arm(name) for name in TINY},
        parts=(
            on_tiny_part("with as many decisions of its own, tiny's held-out greedy accuracy ends above GRPO's",
                         "accuracy", "grpo"),
            on_tiny_part("it ends above that with two passes and no replay", "accuracy", "two passes"),
            on_tiny_part("it ends above that with the clip at 1", "accuracy", "remix, clip at 1"),
            on_tiny_part("tiny's training reward ends above GRPO's", "reward", "grpo"),
        ),
        measure=on_tiny(DECISIONS),
        seeds=5,
        about=f"tiny on {LARGER}, {DECISIONS} decisions",
    ),
)  # fmt: skip
