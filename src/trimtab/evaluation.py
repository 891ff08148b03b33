"""Held-out evaluation of a language policy: fixed problems, fixed noise, greedy or sampled, pass@k, intervals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import comb
from typing import Any

import torch

from trimtab.core.errors import EnvironmentFailure, TrimtabError

# The noise key of row i of problem j is `j + 2^24 i + 2^40 seed`, below 2^62: distinct for every row of every seed.
MOST_PROBLEMS, MOST_SAMPLES, MOST_SEEDS = 2**24, 2**16, 2**22

Estimate = tuple[float, float, float]


class EvaluationError(TrimtabError):
    """An evaluation that cannot be made as asked."""


@dataclass(frozen=True)
class Evaluation:
    """mean with its 95% interval over `n` held-out problems; `measure` says of what; transcripts in problem order.

    sampled: the same of answers drawn at random: those evaluated, or, of a greedy evaluation, one more a problem at
    temperature 1, as training sees them. right: how many of each problem's answers got full marks, in order, for paired
    comparisons; empty where scores are not in [0, 1]. pass_at: `{k: (mean, low, high)}`. failures: answers that could
    not be scored. transcripts: of the first answer to each problem.
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
    pass_at: dict[int, Estimate] = field(default_factory=dict)
    samples: int = 1
    temperature: float = 0.0

    def summary(self) -> dict[str, Any]:
        """The stable part: mean, low, high, n; and `{"pass_at": {"4": {mean, low, high}}}`, where asked for."""
        made: dict[str, Any] = {"mean": self.mean, "low": self.low, "high": self.high, "n": self.n}
        if self.pass_at:
            made["pass_at"] = {str(k): dict(zip(("mean", "low", "high"), v)) for k, v in self.pass_at.items()}
        return made

    def record(self) -> dict[str, Any]:
        more = {"measure": self.measure, "sampled": self.sampled, "failures": self.failures, "right": self.right}
        return {**self.summary(), **more, "samples": self.samples, "temperature": self.temperature}


@dataclass(frozen=True)
class Evaluator:
    """How a policy is evaluated; call it on one: `Evaluator(samples=8, k=(1, 8), temperature=1)(policy, environment)`.

    environment: its own, None for the one given with the policy; either way its held-out problems. problems: how many,
    in the environment's fixed order (None: all). new_tokens: longest answer. temperature: 0 is greedy. samples: answers
    a problem. k: for pass@k, the chance that at least one of k answers is right, each k at most `samples`. seed: of the
    noise, in [0, 2^22). Answer i to problem j always gets the same noise, whatever the policy, the turn, and how many
    problems and samples are asked for, so two evaluations are paired.

    Raises EvaluationError for options that contradict each other.
    """

    environment: Any = None
    problems: int | None = 50
    new_tokens: int = 16
    temperature: float = 0.0
    samples: int = 1
    k: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", tuple(sorted(set(self.k))))
        problem = contradiction(self.problems, self.temperature, self.samples, self.k)
        if problem is None and not 0 <= self.seed < MOST_SEEDS:
            problem = f"seed={self.seed} must be in [0, {MOST_SEEDS})"
        if problem:
            raise EvaluationError(problem)

    def __call__(self, policy: Any, environment: Any = None) -> Evaluation:
        """Evaluate `policy`. The environment is afterwards as it was: neither its cursor nor its failure log moves.

        The measure is accuracy, the share of answers with full marks, when every score lies in [0, 1]; otherwise the
        mean reward. The interval is over problems: Wilson's where each one's mean is 0 or 1, else a bootstrap.
        pass@k is the unbiased estimate `mean_j(1 - C(n_j - c_j, k) / C(n_j, k))` (Chen et al. 2021, eq. 1) with c_j
        of n_j answers right; its interval, in the same way, is over problems too.

        A score that failed is left out and counted. Raises EnvironmentFailure when all of them failed, or when pass@k
        is asked of scores outside [0, 1], and before anything is sampled when a prompt leaves no room for an answer:
        held-out problems are fixed, so none is passed over; EvaluationError when there is no environment.
        """
        from trimtab.policies.context import too_long

        world = self.environment if self.environment is not None else environment
        if world is None:
            raise EvaluationError(
                "there is nothing to be evaluated on: give Evaluator(environment=...), or call it with one"
            )
        with unmoved(world):
            asked = world.held_out(self.problems)
            for fault in (too_long(policy, p, self.new_tokens) for p in asked):
                if fault is not None:
                    raise EnvironmentFailure(f"a held-out problem is too long: {fault}")
            texts, scores = self._answers(policy, world, asked, self.samples, self.temperature)
            drawn = scores if self.temperature > 0 else self._answers(policy, world, asked, 1, 1.0)[1]
        return self._summed(asked, texts, scores, drawn)

    def _answers(
        self, policy: Any, world: Any, asked: Sequence[Any], samples: int, temperature: float
    ) -> tuple[list[str], list[Any]]:
        """Texts and scores of `samples` answers to every problem, problem by problem."""
        from trimtab.policies.sampler import Sampling

        prompts = [policy.encode(p.prompt) for p in asked]
        seeds = noise_keys(len(asked), samples, self.seed)
        made = policy.sampler.sample(prompts, samples, seeds, Sampling(self.new_tokens, temperature)).cpu()
        texts = [policy.decode(tokens[mask].tolist()) for tokens, mask in zip(made.tokens, made.mask)]
        return texts, world.score([p for p in asked for _ in range(samples)], texts)

    def _summed(self, asked: Sequence[Any], texts: list[str], scores: list[Any], drawn: list[Any]) -> Evaluation:
        from trimtab.report.intervals import mean_interval

        known = [_numbers(scores[i : i + self.samples]) for i in range(0, len(scores), self.samples)]
        luck = _numbers(drawn)
        good = [s for row in known for s in row]
        if not good:
            raise EnvironmentFailure(f"every score of the held-out problems failed, for example: {scores[0]}")
        outside = [s for s in good + luck if not 0 <= s <= 1]
        shares = not outside
        if self.k and outside:
            raise EnvironmentFailure(
                f"pass@k counts answers with full marks, a score of 1, and here a score is {outside[0]:g}; leave k "
                "out, or evaluate with a reward in [0, 1]"
            )
        values = [[float(s >= 1) if shares else s for s in row] for row in known]
        means = [sum(row) / len(row) for row in values if row]
        counts = [int(sum(s >= 1 for s in row)) for row in known] if shares else []
        mean, low, high = mean_interval(means)
        sampled = sum(float(s >= 1) if shares else s for s in luck) / max(1, len(luck))
        transcripts = [
            {"prompt": p.question, "response": texts[i * self.samples], "answer": p.answer,
             "reward": next(iter(_numbers([scores[i * self.samples]])), None)}
            for i, p in enumerate(asked)
        ]  # fmt: skip
        pass_at = {k: mean_interval(each) for k in self.k if (each := _passes(known, k))}
        measure = self._measure("accuracy" if shares else "mean reward")
        failures = len(scores) - len(good)
        return Evaluation(
            mean, low, high, len(means), measure, sampled, counts, failures, transcripts, pass_at, self.samples,
            self.temperature,
        )  # fmt: skip

    def _measure(self, what: str) -> str:
        if self.temperature == 0:
            return f"greedy {what}"
        return f"{what} at temperature {self.temperature:g}"


def contradiction(problems: int | None, temperature: float, samples: int, k: Sequence[int]) -> str | None:
    """What is wrong with these options of an evaluation, as a sentence; None when nothing is."""
    if problems is not None and not 1 <= problems < MOST_PROBLEMS:
        return f"problems={problems} must be at least 1 and below {MOST_PROBLEMS}, or None for all of them"
    if not 0 <= temperature < float("inf"):
        return f"temperature={temperature} must be 0, which is greedy, or a positive number"
    if not 1 <= samples < MOST_SAMPLES:
        return f"samples={samples} answers a problem must be at least 1 and below {MOST_SAMPLES}"
    if samples > 1 and temperature == 0:
        return (
            f"samples={samples} greedy answers to a problem would all be the same; give a temperature above 0, such as "
            "1, or one sample"
        )
    wrong = [n for n in k if not 1 <= n <= samples]
    if wrong:
        return f"pass@{wrong[0]} needs at least {max(1, wrong[0])} answers a problem and k >= 1; samples={samples}"
    return None


def noise_keys(problems: int, samples: int, seed: int) -> torch.Tensor:
    """The key of the noise of every row, long `[problems * samples]`, problem by problem."""
    first = torch.arange(problems)[:, None] + MOST_PROBLEMS * torch.arange(samples)
    return first.flatten() + MOST_PROBLEMS * MOST_SAMPLES * seed


def pass_at_k(n: int, right: int, k: int) -> float:
    """`1 - C(n - c, k) / C(n, k)`: the unbiased chance that one of k answers is right, from c right ones of n >= k.

    Source: Chen et al. 2021 (arXiv 2107.03374), equation 1.
    """
    if not 1 <= k <= n or not 0 <= right <= n:
        raise EvaluationError(f"pass@{k} of {right} right answers of {n} needs 1 <= k <= n and 0 <= right <= n")
    return 1 - comb(n - right, k) / comb(n, k)


def _passes(known: Sequence[Sequence[float]], k: int) -> list[float]:
    """pass@k of every problem that has at least k scores."""
    return [pass_at_k(len(row), sum(s >= 1 for s in row), k) for row in known if len(row) >= k]


def _numbers(scores: Sequence[Any]) -> list[float]:
    from trimtab.environments.problem import Failure

    return [float(s) for s in scores if not isinstance(s, Failure)]


@contextmanager
def unmoved(environment: Any) -> Iterator[None]:
    """The state of the environment is afterwards what it was before, whatever was drawn and scored inside."""
    before = environment.state_dict() if hasattr(environment, "state_dict") else None
    try:
        yield
    finally:
        if before is not None:
            environment.load_state_dict(before)


def answer_length(method: Any) -> int:
    """Length of an evaluated answer: that of the method's rollouts, else 16 tokens."""
    last = method.phases[-1].method if method.phases else method
    return int(last.flatten().get("collect.new_tokens", 16))


def whole_numbers(text: str) -> tuple[int, ...]:
    """`"1,4,8"` as numbers; raises EvaluationError for anything else. Empty text is none."""
    try:
        return tuple(int(word) for word in text.split(",")) if text.strip() else ()
    except ValueError:
        raise EvaluationError(f"k={text!r} must be whole numbers with commas between them, such as 1,4,8") from None


def evaluate(
    policy: Any,
    environment: Any,
    *,
    problems: int | None = 50,
    new_tokens: int = 16,
    temperature: float = 0.0,
    samples: int = 1,
    k: Sequence[int] = (),
    seed: int = 0,
) -> Evaluation:
    """Answer the environment's held-out problems, greedily by default, and score them.

    `Evaluator(...)(policy, environment)`; the options and what is raised are described there.
    """
    options = Evaluator(None, problems, new_tokens, temperature, samples, tuple(k), seed)
    return options(policy, environment)
