"""BNPO on one binary decision: are its gradients steadier than GRPO's, and what does that buy?

The problem of the card: `P(right | x) = sigmoid(w . x + b + 0.8 sum(x))`, 16 features and a bias that starts at -2, 32
fresh prompts of 16 tries a batch, 400 batches, plain gradient steps of size 1 on the mean over rows.

Differences from the card's own measurement: rewards are the mean success probability over 4096 fixed prompts, not a
sample mean; 10 seeds for 5; the relative variance is measured at two policies, from 200 batches each, not from a law
of success rates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.claims.core import Arm, Claim, Part, Study, above, below, within
from trimtab.claims.effect import LARGER, for_tiny, on_tiny
from trimtab.claims.toys import equal_step, on_toy, skill_reward, skill_task
from trimtab.core.loop import run
from trimtab.core.method import Method
from trimtab.core.registry import find
from trimtab.stages.update import sgd

BATCHES, WINDOW, EARLY = 400, 50, 50
LENGTH = 0.17
STARTS = (0, 100, 200, 350)
FROZEN = 200  # batches from which a gradient's mean and covariance are taken
POLICIES = {"start": -2.0, "half": 0.0}  # the bias: success 20% or 50% of the time, on average


def plain(name: str) -> Method:
    """The advantages that are compared; with one update a batch, clipping never happens."""
    if name == "bnpo":
        return find("bnpo")()
    return find("grpo")(eps=1e-6) if name == "grpo" else find("bnpo")(alpha=1.0, beta=1.0)


def toy(name: str) -> Method:
    return on_toy(plain(name), prompts=32, group=16, lr=1.0)


def toy_of_equal_steps(name: str) -> Method:
    """Every step 0.17 long, as GRPO's first 50 are on average at step size 1: what is left is the direction."""
    return toy(name).swap("update", equal_step(length=LENGTH))


def mechanism(method: Method, seed: int) -> dict[str, float]:
    """cv_k: std / mean of the gradient's norm over the 50 batches from k; cv: the mean of the four. reward: expected,
    after 50 batches; reward_early: its mean over them. relative_variance_*: trace(Cov g) / |E g|^2 at a policy.
    """
    environment, policy = skill_task()
    norms, rewards, made = [], [], {}
    equal = method.get("update").name == "equal_step"  # once all is right it has no gradient, and so no spread of one
    for step in run(method, environment, policy, until=EARLY if equal else BATCHES, seed=seed):
        norms.append(step.logs["grad_norm"])
        if step.turn <= EARLY:
            rewards.append(skill_reward(environment, policy))
    made["reward"], made["reward_early"] = rewards[-1], sum(rewards) / EARLY
    if equal:
        return made
    x = torch.tensor(norms, dtype=torch.float64)
    for start in STARTS:
        window = x[start : start + WINDOW]
        made[f"cv_{start}"] = float(window.std(correction=1) / window.mean())
    made["cv"] = sum(made[f"cv_{start}"] for start in STARTS) / len(STARTS)
    for name, bias in POLICIES.items():
        made[f"relative_variance_{name}"] = relative_variance(method, bias, seed)
    return made


def relative_variance(method: Method, bias: float, seed: int) -> float:
    """`trace(Cov g) / |E g|^2` of a batch's gradient at one policy, from 200 batches; both estimated without bias."""
    environment, policy = skill_task(bias=bias)
    table: Tensor = policy.table
    start, grads = table.detach().clone(), []
    for _ in run(method.swap("update", sgd(lr=1.0)), environment, policy, until=FROZEN, seed=seed):
        grads.append(start - table.detach())
        with torch.no_grad():
            table.copy_(start)  # every batch is of the same policy
    g = torch.stack(grads)
    spread = float(g.var(0, correction=1).sum())
    return spread / (float(g.mean(0).square().sum()) - spread / len(g))


def arm(name: str) -> Arm:
    what = {
        "grpo": "GRPO: the centred reward over the group's std (ddof 1), eps 1e-6, step 1",
        "bnpo": "BNPO: the centred reward over a Beta density fitted to the batch, step 1",
        "reinforce": "REINFORCE with baseline: the centred reward alone (a flat density), step 1",
    }
    return Arm(what[name], lambda seed: toy(name))


def arm_of_equal_steps(name: str) -> Arm:
    return Arm(f"{name}, every step {LENGTH} long", lambda seed: toy_of_equal_steps(name))


def against(baseline: str, says: str, metric: str, region: tuple[float, float], **more: Any) -> Part:
    control = "reinforce" if baseline == "grpo" else "grpo"
    return Part(says, metric, "bnpo", baseline, (control,), region, **more)


PARTS = (
    *(
        against("grpo", f"over the 50 batches from {start}, the gradient's norm varies at most 0.75 times as much as "
                "GRPO's (std / mean)", f"cv_{start}", below(0.75), kind="ratio")
        for start in STARTS
    ),
    against("grpo", "averaged over those windows, it varies at most 0.6 times as much", "cv", below(0.6), kind="ratio"),
    against("reinforce", "it varies less than plain REINFORCE's", "cv", below(1.0), kind="ratio"),
    against("reinforce", "it varies within 30% of what plain REINFORCE's does", "cv", within(0.7, 1.3), kind="ratio"),
    against("grpo", "at the same step size, the reward after 50 batches is above GRPO's", "reward", above(0.0)),
    Part("with every step equally long, the mean reward over 50 batches is above GRPO's", "reward_early",
         "bnpo, equal steps", "grpo, equal steps", ("reinforce, equal steps",), above(0.0)),
    against("grpo", "at the first policy (success 1 in 5), the gradient's relative variance is below GRPO's",
            "relative_variance_start", below(1.0), kind="ratio"),
    against("grpo", "at a policy half right, the gradient's relative variance is below GRPO's",
            "relative_variance_half", below(1.0), kind="ratio"),
)  # fmt: skip

# -- on a language model -------------------------------------------------------------------------------------------

DECISIONS = 150_000


def tiny_arm(name: str, what: str) -> Arm:
    return Arm(what, lambda seed: for_tiny(plain(name)))


CLAIM = Claim(
    method="bnpo",
    statement="Dividing the advantage by a Beta density that follows the batch's success rates gives steadier "
    "gradients than GRPO's group std, and so more stable training and a better policy.",
    mechanism=Study(
        arms={
            **{name: arm(name) for name in ("grpo", "bnpo", "reinforce")},
            **{f"{name}, equal steps": arm_of_equal_steps(name) for name in ("grpo", "bnpo", "reinforce")},
        },
        parts=PARTS,
        measure=mechanism,
        seeds=10,
    ),
    full=Study(
        arms={
            "grpo": tiny_arm("grpo", "GRPO, one update a batch"),
            "bnpo": tiny_arm("bnpo", "BNPO, one update a batch"),
            "reinforce": tiny_arm("reinforce", "REINFORCE with baseline (a flat density), one update a batch"),
        },
        parts=(
            against("grpo", "tiny's held-out greedy accuracy ends above GRPO's", "accuracy", above(0.0)),
            against(
                "reinforce", "tiny's held-out greedy accuracy ends above plain REINFORCE's", "accuracy", above(0.0)
            ),
            against("grpo", "tiny's training reward ends above GRPO's", "reward", above(0.0)),
            against("reinforce", "tiny's training reward ends above plain REINFORCE's", "reward", above(0.0)),
        ),
        measure=on_tiny(DECISIONS),
        seeds=5,
        about=f"tiny on {LARGER}, {DECISIONS} decisions",
    ),
)
