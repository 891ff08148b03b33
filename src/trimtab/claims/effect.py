"""The `--full` part of a claim: what a method does to `tiny`, a language model of a million parameters.

The task is `toy:larger`: what looks like a sum is to be answered with the larger of its two numbers. `tiny` adds, so it
is rarely right at first (4 of 104 held-out problems), and what it learns holds for numbers it was not trained on. Sums
would not do: `tiny` has read the small ones, and in trials GRPO on some of them made it forget the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from trimtab.core.loop import run
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


def on_tiny(decisions: int, problems: int | None = None) -> Callable[[Method, int], dict[str, float]]:
    """A study's `measure`: train `tiny` on the larger number for so many decisions, then evaluate it.

    accuracy: greedy, on the held-out problems (None: all of them). sampled: one answer a problem at temperature 1.
    reward, entropy: their means over the last tenth of the run's batches. Every seed starts from the same weights; the
    seed is that of the problems' order, the rollouts and the shuffling.
    """

    def measured(method: Method, seed: int) -> dict[str, float]:
        environment, policy = load(seed)
        try:
            logs = [
                step.logs
                for step in run(method, environment, {"policy": policy}, until={"decisions": decisions}, seed=seed)
            ]
            with torch.no_grad():
                made = evaluate(policy, environment, problems=problems, new_tokens=TOKENS)
        finally:
            environment.close()
        last = logs[-max(1, len(logs) // 10) :]
        means = {name: sum(log[name] for log in last) / len(last) for name in ("reward", "entropy")}
        return {"accuracy": made.mean, "sampled": made.sampled, **means}

    return measured
