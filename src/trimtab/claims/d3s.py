"""D3S on a contextual task: is it the choice of rows and tokens that helps, or the longer step that comes with it?

The problem of the card: 64 contexts of 24 features, 8 decisions out of 8 symbols each, three of which must be right for
a reward of 1 while five do not matter; at first 4% succeed. 16 contexts of 8 tries a batch, 150 updates, once by plain
gradient descent and once with every step equally long, as GRPO's are on average over its first 50 updates.

Differences from the card's own measurement: success is the policy's exact expectation over all contexts; the first
policy is proportional to the correlation of features and right symbols, scaled until 4% succeed; the random control of
D3S follows its schedule for rows and tokens; 10 seeds for 5.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trimtab.claims.core import Arm, Claim, Part, Study, above, below
from trimtab.claims.effect import LARGER, for_tiny, on_tiny
from trimtab.claims.toys import Toy, ToyPolicy, equal_step, on_toy
from trimtab.core.batch import Batch
from trimtab.core.kit import Kit
from trimtab.core.loop import run
from trimtab.core.method import Method
from trimtab.core.piece import Schedule, piece
from trimtab.core.registry import find
from trimtab.methods.language.d3s import ROWS, TOKENS
from trimtab.stages.downsample import top_share

UPDATES, EARLY = 150, 50
CONTEXTS, FEATURES, PLACES, SYMBOLS, MATTER = 64, 24, 8, 8, 3
FIRST = 0.04  # share of tries that succeed at first
LR, LENGTH = 60.0, 0.8  # LENGTH: GRPO's mean step over its first 50 updates at LR


@piece("select", slot="down_sample", reads=("mask", "keep"), writes=("keep",))
def at_random(kit: Kit, batch: Batch, *, share: float = 0.5, tokens: float = 1.0) -> Batch:
    """The control: as many rows and decisions as `down_sample` keeps, drawn by lot."""
    rng, before = kit.rng("lots"), batch.keep.bool()
    chosen = torch.randperm(len(batch), generator=rng)[: max(2, round(share * len(batch)))]
    on = torch.zeros(len(batch), dtype=torch.bool).index_fill_(0, chosen, True).to(before.device)[:, None] & before
    keep = on if tokens >= 1 else top_share(torch.zeros(on.shape), on, tokens, rng)
    kit.log("kept_decisions", keep.sum() / before.sum())
    return batch.put(keep=keep)


def random_rows(share: float | Schedule, tokens: float | Schedule) -> Method:
    return find("grpo")().then(at_random(share=share, tokens=tokens))


METHODS: dict[str, tuple[str, Callable[[], Method]]] = {
    "grpo": ("GRPO, all rows and tokens", lambda: find("grpo")()),
    "random half": ("GRPO on half of the rows, drawn by lot", lambda: random_rows(0.5, 1.0)),
    "d1s": ("half of each group, by variance; all tokens", lambda: find("d3s")(preset="d1s")),
    "d1s cross": ("half of the batch, by variance; all tokens", lambda: find("d3s")(preset="d1s_cross")),
    "d2s": ("a quarter of the rows and a tenth of their tokens throughout", lambda: find("d3s")(preset="d2s")),
    "random d3s": ("D3S's schedule, rows and tokens drawn by lot", lambda: random_rows(ROWS, TOKENS)),
    "d3s": ("D3S: rows 1/4 to 3/4 by variance, tokens 1/10 to 1/2 by |A| x entropy", lambda: find("d3s")()),
}


# -- the task ----------------------------------------------------------------------------------------------------


def context_task(seed: int) -> tuple[Toy, ToyPolicy]:
    """A linear softmax over symbols for each place; right when the first three symbols are the context's."""
    rng = torch.Generator().manual_seed(seed)
    features = torch.randn(CONTEXTS, FEATURES, generator=rng, dtype=torch.float64) / FEATURES**0.5
    right = torch.randint(SYMBOLS, (CONTEXTS, MATTER), generator=rng)
    told = torch.zeros(CONTEXTS, PLACES, SYMBOLS, dtype=torch.float64)
    told[:, :MATTER].scatter_(2, right[..., None], 1.0)
    direction = torch.einsum("cf,cps->fps", features, told)

    def draw(n: int, rng: torch.Generator) -> Tensor:
        return torch.randperm(CONTEXTS, generator=rng)[:n, None]

    def score(obs: Tensor, action: Tensor) -> Tensor:
        return (action[:, :MATTER] == right[obs[:, 0]]).all(1).double()

    policy = ToyPolicy(direction.clone(), lambda table, obs: torch.einsum("nf,fps->nps", features[obs[:, 0]], table))
    policy.register_buffer("right", right)
    low, high = 0.0, 100.0
    for _ in range(40):
        middle = (low + high) / 2
        with torch.no_grad():
            policy.table.copy_(middle * direction)
        low, high = (middle, high) if success(policy) < FIRST else (low, middle)
    return Toy(draw, score), policy


@torch.no_grad()
def success(policy: ToyPolicy) -> float:
    """The expected reward over all contexts."""
    right: Tensor = policy.right  # type: ignore[assignment]
    p = policy.logits(torch.arange(CONTEXTS)[:, None]).softmax(-1)[:, :MATTER]
    return float(p.gather(2, right[..., None])[..., 0].prod(1).mean())


def toy_arm(name: str, equal: bool) -> Arm:
    what, build = METHODS[name]

    def make(seed: int) -> Method:
        made = on_toy(build(), prompts=16, group=8, lr=LR)
        return made.swap("update", equal_step(length=LENGTH)) if equal else made

    return Arm(f"{what}; {f'every step {LENGTH} long' if equal else f'plain gradient descent, step {LR:g}'}", make)


def mechanism(method: Method, seed: int) -> dict[str, float]:
    """success, success_early: after all and after 50 updates. first_norm: the gradient's, mean of the first 10.
    decisions: share of the batch's that were learned from, on average."""
    environment, policy = context_task(seed)
    norms, shares, early = [], [], 0.0
    for step in run(method, environment, policy, until=UPDATES, seed=seed):
        norms.append(step.logs["grad_norm"])
        shares.append(step.logs.get("kept_decisions", 1.0))
        if step.turn == min(EARLY, UPDATES):
            early = success(policy)
    first = norms[:10]
    return {
        "success": success(policy),
        "success_early": early,
        "first_norm": sum(first) / len(first),
        "decisions": sum(shares) / len(shares),
    }


def part(
    says: str, metric: str, method: str, baseline: str, region: tuple[float, float], control: str, equal: bool,
    ratio: bool = True,
) -> Part:  # fmt: skip
    suffix = ", equal steps" if equal else ""
    return Part(says, metric, method + suffix, baseline + suffix, (control + suffix,), region,
                "ratio" if ratio else "difference")  # fmt: skip


RAW = ("grpo", "random half", "d1s", "d1s cross", "d2s", "random d3s", "d3s")
EQUAL = ("grpo", "random half", "d1s cross", "random d3s", "d3s")

PARTS = (
    part("by plain gradient descent, success after 50 updates is above GRPO's by more than 0.1", "success_early", "d3s",
         "grpo", above(0.1), "random d3s", False, ratio=False),
    part("after 150 updates it is above GRPO's", "success", "d3s", "grpo", above(0.0), "random d3s", False,
         ratio=False),
    part("after 150 updates it is above that without a schedule (D2S)", "success", "d3s", "d2s", above(0.0), "grpo",
         False, ratio=False),
    part("choosing across groups (D1S-Cross) ends above choosing inside them (D1S)", "success", "d1s cross", "d1s",
         above(0.0), "random half", False, ratio=False),
    part("its gradients are longer to begin with, more than twice GRPO's", "first_norm", "d3s", "grpo", above(2.0),
         "random d3s", False),
    part("it learns from less than a fifth of the decisions", "decisions", "d3s", "grpo", below(0.2), "random d3s",
         False),
    part("with equal steps, half of the rows (D1S-Cross) keep more than 0.95 of GRPO's success", "success", "d1s cross",
         "grpo", above(0.95), "random half", True),
    part("with equal steps, they reach more than 1.25 times what a random half does", "success", "d1s cross",
         "random half", above(1.25), "grpo", True),
    part("with equal steps, D3S keeps more than 0.8 of GRPO's success", "success", "d3s", "grpo", above(0.8),
         "random d3s", True),
    part("with equal steps, D3S is above as many rows and tokens drawn by lot", "success", "d3s", "random d3s",
         above(1.0), "grpo", True),
    part("with equal steps, D3S is above GRPO: the speed-up is more than a longer step", "success", "d3s", "grpo",
         above(1.0), "d1s cross", True),
)  # fmt: skip

# -- on a language model: AdamW's steps hardly depend on how long a gradient is, so they are equal there ------------

DECISIONS = 150_000
TINY = ("grpo", "random d3s", "d1s cross", "d3s")


def tiny_arm(name: str) -> Arm:
    what, build = METHODS[name]
    return Arm(f"{what}; one update a batch", lambda seed: for_tiny(build()))


def on_tiny_part(says: str, metric: str, baseline: str) -> Part:
    return Part(says, metric, "d3s", baseline, tuple(n for n in TINY if n not in ("d3s", baseline)), above(0.0))


CLAIM = Claim(
    method="d3s",
    statement="Learning only from the rollouts whose advantages vary most, and from their tokens with the largest "
    "|advantage| x entropy, few at first and more later, reaches more with fewer samples and tokens than learning from "
    "all of them.",
    mechanism=Study(
        arms={
            **{name: toy_arm(name, False) for name in RAW},
            **{f"{name}, equal steps": toy_arm(name, True) for name in EQUAL},
        },
        parts=PARTS,
        measure=mechanism,
        seeds=10,
    ),
    full=Study(
        arms={name: tiny_arm(name) for name in TINY},
        parts=(
            on_tiny_part("tiny's held-out greedy accuracy ends above GRPO's", "accuracy", "grpo"),
            on_tiny_part("tiny's held-out greedy accuracy ends above that of rows and tokens drawn by lot", "accuracy",
                         "random d3s"),
            on_tiny_part("tiny's training reward ends above GRPO's", "reward", "grpo"),
            on_tiny_part("tiny's training reward ends above that of rows and tokens drawn by lot", "reward",
                         "random d3s"),
            Part("half of the rows, chosen by variance (D1S-Cross), end no more than 5 points below GRPO's accuracy",
                 "accuracy", "d1s cross", "grpo", ("random d3s",), above(-0.05)),
        ),
        measure=on_tiny(DECISIONS),
        seeds=5,
        about=f"tiny on {LARGER}, {DECISIONS} decisions",
    ),
)  # fmt: skip
