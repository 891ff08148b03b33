"""CHORD on two styles of answering: do demonstrations in a foreign style break a policy, and does phi prevent it?

The problem of the card: 96 prompts, answers of 4 symbols out of 10, two of which are accepted for each prompt, one in
either style (the second is the first with every symbol moved by one). A network with one hidden layer of 48 units has
learned the first style by imitation until 11% of its answers are accepted; experts show the second style for 48 of the
prompts. 8 prompts of 8 tries and 8 demonstrations a batch, Adam with step 3e-3, 400 batches. Measured is the
probability of an accepted answer over all prompts: at the end, and at its lowest.

Differences from the card's own measurement: prompts are told by 24 random features; 8 seeds for 4; and a matched
control that it lacks, a constant mu as small as phi makes it at most (0.1 / 4), without phi.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trimtab.claims.core import Arm, Claim, Part, Study, above, below
from trimtab.claims.effect import LARGER, SMALL, for_tiny, on_tiny
from trimtab.claims.toys import Toy, ToyPolicy, toy_rollouts
from trimtab.core.batch import Batch
from trimtab.core.kit import Kit
from trimtab.core.loop import run
from trimtab.core.method import Method, Phase
from trimtab.core.phases import phased
from trimtab.core.piece import piece
from trimtab.core.registry import find
from trimtab.core.schedules import warmup_cosine
from trimtab.core.terms import SOURCES
from trimtab.stages.update import adamw

BATCHES, LR = 400, 3e-3
ASKED, FEATURES, HIDDEN, PLACES, SYMBOLS, SHOWN = 96, 24, 48, 4, 10, 48
FIRST = 0.11
FALLING = warmup_cosine(0, 200, 0.9, 0.05, by="turns")

# -- the task ----------------------------------------------------------------------------------------------------


def style_task(seed: int) -> tuple[Toy, ToyPolicy]:
    """Prompts with two accepted answers, and a policy that has learned the first style of them."""
    rng = torch.Generator().manual_seed(seed)
    features = torch.randn(ASKED, FEATURES, generator=rng, dtype=torch.float64)
    first = torch.randint(SYMBOLS, (ASKED, PLACES), generator=rng)
    answers = torch.stack([first, (first + 1) % SYMBOLS], 1)
    sizes = (FEATURES * HIDDEN, HIDDEN, HIDDEN * PLACES * SYMBOLS, PLACES * SYMBOLS)
    start = torch.cat([
        torch.randn(sizes[0], generator=rng) / FEATURES**0.5, torch.zeros(sizes[1]),
        torch.randn(sizes[2], generator=rng) * 0.1 / HIDDEN**0.5, torch.zeros(sizes[3]),
    ])  # fmt: skip

    def logits(table: Tensor, obs: Tensor) -> Tensor:
        w1, b1, w2, b2 = table.split(sizes)
        hidden = torch.tanh(features[obs[:, 0]] @ w1.view(FEATURES, HIDDEN) + b1)
        return (hidden @ w2.view(HIDDEN, PLACES * SYMBOLS) + b2).view(len(obs), PLACES, SYMBOLS)

    def draw(n: int, rng: torch.Generator) -> Tensor:
        return torch.randperm(ASKED, generator=rng)[:n, None]

    def score(obs: Tensor, action: Tensor) -> Tensor:
        return (answers[obs[:, 0]] == action[:, None]).all(2).any(1).double()

    policy = ToyPolicy(start, logits)
    policy.register_buffer("answers", answers)
    learn_first_style(policy)
    return Toy(draw, score), policy


def learn_first_style(policy: ToyPolicy) -> None:
    """Imitate the first style until 11% of the answers are accepted."""
    everyone, answers = torch.arange(ASKED)[:, None], policy.answers
    optimizer = torch.optim.Adam(policy.parameters(), lr=LR)
    while accepted(policy) < FIRST:
        logp = policy.logits(everyone).log_softmax(-1).gather(2, answers[:, 0, :, None])  # type: ignore[index]
        optimizer.zero_grad()
        (-logp.mean()).backward()
        optimizer.step()


@torch.no_grad()
def accepted(policy: ToyPolicy) -> float:
    """The probability that an answer is accepted, over all prompts."""
    answers: Tensor = policy.answers  # type: ignore[assignment]
    p = policy.logits(torch.arange(ASKED)[:, None]).softmax(-1)[:, None].expand(-1, 2, -1, -1)
    return float(p.gather(3, answers[..., None])[..., 0].prod(2).sum(1).mean())


def demonstrated(kit: Kit, n: int) -> Batch:
    """`n` answers in the second style, to prompts that experts know."""
    policy: Any = kit.models["policy"]
    obs = torch.randint(SHOWN, (n, 1), generator=kit.rng("experts"))
    action = policy.answers[obs[:, 0], 1]
    return Batch(
        {
            "obs": obs,
            "action": action,
            "mask": torch.ones(n, PLACES, dtype=torch.bool),
            "source": torch.full((n,), SOURCES.index("expert")),
            "age": torch.zeros(n, dtype=torch.long),
        }
    )


COLUMNS = ("obs", "action", "mask", "source", "age")


@piece("part", writes=COLUMNS)
def style_experts(kit: Kit, n: int) -> Batch:
    """Demonstrations beside the policy's own rows."""
    return demonstrated(kit, n)


@piece("collect", writes=COLUMNS)
def style_demonstrations(kit: Kit, *, prompts: int = 8) -> Batch:
    """Demonstrations alone, for supervised learning."""
    return demonstrated(kit, prompts)


# -- arms --------------------------------------------------------------------------------------------------------


def on_styles(method: Method) -> Method:
    return method.swap("collect", toy_rollouts(prompts=8, group=8)).swap("update", adamw(lr=LR))


def chord(**options: Any) -> Method:
    made: Method = find("chord")(on_styles(find("grpo")()), share=1 / 9, **options)
    return made.swap("collect.source", style_experts())


def sft_then_rl() -> Method:
    sft = find("sft")().swap("collect", style_demonstrations()).swap("update", adamw(lr=LR))
    return phased("sft, then grpo", [Phase("sft", sft, {"turns": 100}), Phase("grpo", on_styles(find("grpo")()), {})])


ARMS: dict[str, tuple[str, Callable[[], Method]]] = {
    "grpo": ("GRPO, no demonstrations", lambda: on_styles(find("grpo")())),
    "sft then grpo": ("100 batches of imitation, then GRPO", sft_then_rl),
    "chord-mu": ("CHORD-mu: mu from 0.9 to 0.05 over 200 batches, no phi", lambda: chord(mu=FALLING, weight="none")),
    "mu 0.1": ("mu 0.1 throughout, no phi", lambda: chord(mu=0.1, weight="none")),
    "mu 0.025": ("mu 0.025 throughout, no phi: as much as phi ever leaves of 0.1", lambda: chord(
        mu=0.025, weight="none")),
    "chord-phi": ("CHORD-phi: mu 0.1 throughout, tokens weighted by p (1 - p)", chord),
    "chord-mu-phi": ("mu from 0.9 to 0.05 over 200 batches, with phi", lambda: chord(mu=FALLING)),
}  # fmt: skip


def mechanism(method: Method, seed: int) -> dict[str, float]:
    """final, lowest: the probability of an accepted answer after all batches, and its least value on the way."""
    environment, policy = style_task(seed)
    values = [accepted(policy)]
    for _ in run(method, environment, policy, until=BATCHES, seed=seed):
        values.append(accepted(policy))
    return {"final": values[-1], "lowest": min(values)}


def part(says: str, metric: str, method: str, baseline: str, region: tuple[float, float], *controls: str) -> Part:
    return Part(says, metric, method, baseline, controls, region, "ratio")


PARTS = (
    part("with phi the accuracy never falls below 0.95 of GRPO's lowest, which is where it started", "lowest",
         "chord-phi", "grpo", above(0.95), "mu 0.1"),
    part("imitation first, then RL falls below 0.75 of it", "lowest", "sft then grpo", "grpo", below(0.75), "chord-mu"),
    part("a constant mu of 0.1 without phi falls below 0.75 of it", "lowest", "mu 0.1", "grpo", below(0.75),
         "chord-phi"),
    part("with phi it ends at more than twice what the same mu without phi does", "final", "chord-phi", "mu 0.1",
         above(2.0), "grpo"),
    part("phi is more than a smaller mu: it ends above mu 0.025 without phi", "final", "chord-phi", "mu 0.025",
         above(1.0), "mu 0.1"),
    part("mixing with a falling mu (CHORD-mu) ends above imitation first, then RL", "final", "chord-mu",
         "sft then grpo", above(1.0), "grpo"),
    part("phi helps a falling mu too", "final", "chord-mu-phi", "chord-mu", above(1.0), "grpo"),
    part("with demonstrations and phi it ends above GRPO alone", "final", "chord-phi", "grpo", above(1.0),
         "chord-mu-phi"),
)  # fmt: skip

# -- on a language model: the demonstrations are the environment's own answers --------------------------------------

DECISIONS = 100_000  # about 52 turns of 512 rows; a fifth of CHORD's rows are demonstrations, 128 a turn


def tiny_sft_then_rl() -> Method:
    sft = find("sft")(lr=SMALL["update.lr"], prompts=128)
    return phased("sft, then grpo", [Phase("sft", sft, {"turns": 50}), Phase("grpo", for_tiny(find("grpo")()), {})])


TINY: dict[str, tuple[str, Callable[[], Method]]] = {
    "grpo": ("GRPO, no demonstrations, one update a batch", lambda: for_tiny(find("grpo")())),
    "sft then grpo": ("50 batches of 128 demonstrations, about as many as CHORD sees, then GRPO", tiny_sft_then_rl),
    "chord-mu": ("CHORD-mu: mu from 0.9 to 0.05 over 40 batches, no phi", lambda: for_tiny(find("chord")(
        mu=warmup_cosine(0, 40, 0.9, 0.05, by="turns"), weight="none"))),
    "mu 0.1": ("mu 0.1 throughout, no phi", lambda: for_tiny(find("chord")(weight="none"))),
    "mu 0.025": ("mu 0.025 throughout, no phi: as much as phi ever leaves of 0.1", lambda: for_tiny(find("chord")(
        mu=0.025, weight="none"))),
    "chord-phi": ("CHORD-phi: mu 0.1, tokens weighted by p (1 - p)", lambda: for_tiny(find("chord")())),
}  # fmt: skip


def tiny_arm(name: str) -> Arm:
    what, build = TINY[name]
    return Arm(what, lambda seed: build())


def on_tiny_part(says: str, metric: str, method: str, baseline: str, *controls: str) -> Part:
    return Part(says, metric, method, baseline, controls, above(0.0))


def toy_arm(name: str) -> Arm:
    what, build = ARMS[name]
    return Arm(what, lambda seed: build())


CLAIM = Claim(
    method="chord",
    statement="Expert demonstrations in the loss of RL, with a weight that falls over time or that vanishes for tokens "
    "which are certain or nearly impossible, help without breaking the policy, as imitation before RL does.",
    mechanism=Study(arms={name: toy_arm(name) for name in ARMS}, parts=PARTS, measure=mechanism, seeds=8),
    full=Study(
        arms={name: tiny_arm(name) for name in TINY},
        parts=(
            on_tiny_part("tiny's held-out greedy accuracy ends above GRPO's with CHORD-phi", "accuracy", "chord-phi",
                         "grpo", "mu 0.1", "mu 0.025"),
            on_tiny_part("it ends above GRPO's with CHORD-mu", "accuracy", "chord-mu", "grpo", "mu 0.1"),
            on_tiny_part("with CHORD-mu it ends above imitation first, then RL", "accuracy", "chord-mu",
                         "sft then grpo", "grpo"),
            on_tiny_part("with CHORD-phi it ends above the same mu without phi", "accuracy", "chord-phi", "mu 0.1",
                         "grpo"),
            on_tiny_part("phi is more than a smaller mu: it ends above mu 0.025 without phi", "accuracy", "chord-phi",
                         "mu 0.025", "grpo"),
            on_tiny_part("tiny's training reward ends above GRPO's with CHORD-phi", "reward", "chord-phi", "grpo",
                         "mu 0.1", "mu 0.025"),
        ),
        measure=on_tiny(DECISIONS),
        seeds=5,
        about=f"tiny on {LARGER}, {DECISIONS} decisions",
    ),
)  # fmt: skip
