"""The `--full` part of a claim: what a method does to `tiny`, a language model of a million parameters.

The task is `toy:larger`: what looks like a sum is to be answered with the larger of its two numbers. `tiny` adds, so it
is rarely right at first (4 of 104 held-out problems), and what it learns holds for numbers it was not trained on. Sums
would not do: `tiny` has read the small ones, and in trials GRPO on some of them made it forget the others.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from statistics import fmean as mean
from typing import Any

import torch

from trimtab.core.loop import Step, run
from trimtab.core.method import Method
from trimtab.evaluation import evaluate

LARGER, PROMPT = "toy:larger(limit=20)", "{a} + {b} ="
TOKENS = 6
SMALL = {"collect.prompts": 32, "collect.group": 16, "collect.new_tokens": TOKENS, "update.lr": 2e-4}


def for_tiny(method: Method) -> Method:
    """The method with the rollouts and the step size that suit `tiny`; whatever else it is stays."""
    for path, value in SMALL.items():
        method = method.set(path, value)
    return method


def load(seed: int) -> tuple[Any, Any]:
    """(environment, policy): the seed is that of the problems' order; the weights are always the same."""
    from trimtab.environments.text import load_environment
    from trimtab.policies.builtin import load_policy

    return load_environment(LARGER, seed=seed, prompt=PROMPT), load_policy("tiny")


def logged_entropy(step: Step) -> float:
    """Of the decisions as they were sampled."""
    return step.logs["entropy"]


def on_tiny(
    decisions: int, problems: int | None = None, entropy: Callable[[Step], float] = logged_entropy
) -> Callable[[Method, int], dict[str, float]]:
    """A study's `measure`: train `tiny` on the larger number for so many decisions, then evaluate it.

    accuracy: greedy, on the held-out problems (None: all of them). sampled: one answer a problem at temperature 1.
    reward, entropy: their means over the last tenth of the run's batches. drawdown, entropy_on_the_way: see there.
    The argument `entropy` says how it is read off a step.
    Every seed starts from the same weights; the seed is that of the problems' order, the rollouts and the shuffling.
    """

    def measured(method: Method, seed: int) -> dict[str, float]:
        environment, policy = load(seed)
        try:
            steps = run(method, environment, {"policy": policy}, until={"decisions": decisions}, seed=seed)
            # Nothing is rewarded while demonstrations alone are imitated.
            log = [(step.logs["reward"], entropy(step)) for step in steps if "reward" in step.logs]
            with torch.no_grad():
                made = evaluate(policy, environment, problems=problems, new_tokens=TOKENS)
        finally:
            environment.close()
        rewards, entropies = (list(values) for values in zip(*log))
        last = max(1, len(log) // 10)
        return {
            "accuracy": made.mean,
            "sampled": made.sampled,
            "reward": mean(rewards[-last:]),
            "entropy": mean(entropies[-last:]),
            "drawdown": drawdown(rewards, last),
            "entropy_on_the_way": entropy_on_the_way(rewards, entropies),
        }

    return measured


def drawdown(rewards: list[float], over: int) -> float:
    """The deepest fall of the reward below its highest value before, both means over `over` batches in a row."""
    means = [mean(rewards[i : i + over]) for i in range(0, len(rewards) - over + 1, over)]
    return max(high - low for low, high in zip(means, accumulate(means, max)))


def entropy_on_the_way(rewards: list[float], entropies: list[float], goal: float = 0.15, over: int = 5) -> float:
    """The entropy where the reward, both means over 5 batches, first reaches 0.15; at the end where it never does."""
    ends = range(min(over, len(rewards)), len(rewards) + 1)
    end = next((e for e in ends if mean(rewards[max(0, e - over) : e]) >= goal), len(rewards))
    return mean(entropies[max(0, end - over) : end])
