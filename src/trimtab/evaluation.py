"""Held-out evaluation of a language policy: fixed problems, greedy answers, an interval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from trimtab.core.errors import EnvironmentFailure


@dataclass(frozen=True)
class Evaluation:
    """mean with its 95% interval over `n` held-out problems; `measure` says of what; transcripts in problem order.

    sampled: the same of one answer a problem drawn at temperature 1, as training sees them. right: which problems were
    answered with full marks, in order, for paired comparisons; empty where scores are not in [0, 1].
    """

    mean: float
    low: float
    high: float
    n: int
    measure: str
    sampled: float
    right: list[int]
    failures: int
    transcripts: list[dict[str, Any]]

    def summary(self) -> dict[str, Any]:
        """The stable part: mean, low, high, n."""
        return {"mean": self.mean, "low": self.low, "high": self.high, "n": self.n}

    def record(self) -> dict[str, Any]:
        more = {"measure": self.measure, "sampled": self.sampled, "failures": self.failures, "right": self.right}
        return {**self.summary(), **more}


def evaluate(policy: Any, environment: Any, *, problems: int | None = 50, new_tokens: int = 16) -> Evaluation:
    """Answer the environment's held-out problems greedily and score them.

    problems: how many, in the environment's fixed order (None: all). The measure is "greedy accuracy", the share of
    answers with full marks and its Wilson interval, when every score lies in [0, 1]; otherwise the mean reward and its
    bootstrap interval. Beside it one answer a problem is drawn at temperature 1, with the same noise at every call.

    A score that failed is left out and counted. Raises EnvironmentFailure when all of them failed, and before anything
    is sampled when a prompt leaves no room for `new_tokens`: held-out problems are fixed, so none is passed over.
    """
    from trimtab.environments.text import Failure
    from trimtab.policies.context import too_long
    from trimtab.policies.sampler import Sampling
    from trimtab.report.intervals import mean_interval

    asked = environment.held_out(problems)
    for fault in (too_long(policy, p, new_tokens) for p in asked):
        if fault is not None:
            raise EnvironmentFailure(f"a held-out problem is too long: {fault}")

    def answered(sampling: Sampling) -> tuple[list[str], list[Any]]:
        made = policy.sampler.sample(prompts, 1, torch.arange(len(prompts)), sampling)  # the same noise every time
        texts = [policy.decode(tokens[mask].tolist()) for tokens, mask in zip(made.tokens.cpu(), made.mask.cpu())]
        return texts, environment.score(asked, texts)

    prompts = [policy.encode(p.prompt) for p in asked]
    texts, scores = answered(Sampling(new_tokens=new_tokens, temperature=0.0))
    _, drawn = answered(Sampling(new_tokens=new_tokens))
    good = [float(s) for s in scores if not isinstance(s, Failure)]
    luck = [float(s) for s in drawn if not isinstance(s, Failure)]
    if not good:
        raise EnvironmentFailure(f"every score of the held-out problems failed, for example: {scores[0]}")
    shares = all(0 <= s <= 1 for s in good + luck)
    values = [float(s >= 1) for s in good] if shares else good
    mean, low, high = mean_interval(values)
    sampled = sum(float(s >= 1) if shares else s for s in luck) / max(1, len(luck))
    right = [int(not isinstance(s, Failure) and s >= 1) for s in scores] if shares else []
    rewards = [None if isinstance(s, Failure) else float(s) for s in scores]
    transcripts = [
        {"prompt": p.question, "response": t, "answer": p.answer, "reward": r} for p, t, r in zip(asked, texts, rewards)
    ]
    measure = "greedy accuracy" if shares else "greedy mean reward"
    return Evaluation(mean, low, high, len(good), measure, sampled, right, len(scores) - len(good), transcripts)
