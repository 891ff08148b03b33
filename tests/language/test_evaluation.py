"""Evaluation: greedy and sampled, pass@k, paired noise, its own environment, and no trace in the run."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest
import torch

import trimtab
from trimtab.core.errors import EnvironmentFailure
from trimtab.environments.problem import Failure
from trimtab.environments.text import load_environment
from trimtab.evaluation import EvaluationError, Evaluator, evaluate, noise_keys, pass_at_k, whole_numbers
from trimtab.methods.cases import case
from trimtab.policies.sampler import Sampling

torch.set_num_threads(1)


class Told:
    """Scores that are told in advance, by problem and answer, whatever the policy says."""

    name = "told"
    needs_answer = False

    def __init__(self, *rows: list[float | Failure]) -> None:
        self.flat, self.asked = [s for row in rows for s in row], 0

    def score(self, problem: Any, text: str) -> float | Failure:
        self.asked += 1
        return self.flat[(self.asked - 1) % len(self.flat)]

    def check(self, problems: Any) -> None:
        """Every problem will do."""

    def close(self) -> None:
        """Nothing is open."""


def small(*rows: list[float | Failure]) -> tuple[Any, Any]:
    made = case("text")
    if rows:
        made.environment._scorer = Told(*rows)
    return made.models["policy"], made.environment


SAMPLED: dict[str, Any] = {"temperature": 1.0, "new_tokens": 4}
FAILED = Failure("raised", "boom")


def test_greedy_with_one_drawn_answer_beside_it() -> None:
    policy, environment = small()
    made = evaluate(policy, environment, problems=6, new_tokens=4)
    asked = environment.held_out(6)
    prompts = [policy.encode(p.prompt) for p in asked]
    for temperature, mean in ((0.0, made.mean), (1.0, made.sampled)):
        rows = policy.sampler.sample(prompts, 1, torch.arange(6), Sampling(4, temperature))
        texts = [policy.decode(t[m].tolist()) for t, m in zip(rows.tokens, rows.mask)]
        assert mean == pytest.approx(sum(environment.score(asked, texts)) / 6)
    assert made.measure == "greedy accuracy"
    assert made.n == 6 == len(made.right) == len(made.transcripts)
    assert set(made.summary()) == {"mean", "low", "high", "n"}
    old = {"mean", "low", "high", "n", "measure", "sampled", "failures", "right"}
    assert old < set(made.record())


@pytest.mark.parametrize(("n", "right"), [(n, c) for n in (1, 2, 5) for c in range(n + 1)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n: int, right: int) -> None:
    answers = [i < right for i in range(n)]
    for k in range(1, n + 1):
        subsets = list(combinations(answers, k))
        assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_by_hand() -> None:
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3)
    assert pass_at_k(10, 3, 5) == pytest.approx(1 - 21 / 252)
    assert pass_at_k(200, 1, 100) == pytest.approx(0.5)
    for bad in ((3, 4, 1), (3, 1, 4), (3, -1, 1), (3, 1, 0)):
        with pytest.raises(EvaluationError, match="needs 1 <= k <= n"):
            pass_at_k(*bad)


def test_means_counts_and_pass_at_k_of_told_scores() -> None:
    rows: list[list[float | Failure]] = [[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0.5, 0]]
    made = evaluate(*small(*rows), problems=4, samples=4, k=(4, 1, 2, 2), **SAMPLED)
    assert made.right == [1, 4, 0, 2]
    assert made.mean == made.sampled == pytest.approx((0.25 + 1 + 0 + 0.5) / 4)
    assert list(made.pass_at) == [1, 2, 4]
    assert made.pass_at[1][0] == pytest.approx(made.mean)
    assert made.pass_at[2][0] == pytest.approx((0.5 + 1 + 0 + (1 - 1 / 6)) / 4)
    assert made.pass_at[4] == (0.75, *made.pass_at[4][1:])
    for mean, low, high in made.pass_at.values():
        assert 0 <= low <= mean <= high <= 1
    assert made.measure == "accuracy at temperature 1"
    assert made.summary()["pass_at"]["4"]["mean"] == 0.75
    assert (made.n, made.failures, made.record()["samples"]) == (4, 0, 4)


def test_failed_scores_are_left_out_and_counted() -> None:
    rows: list[list[float | Failure]] = [[1, FAILED], [FAILED, FAILED], [0, 1]]
    policy, environment = small(*rows)
    made = evaluate(policy, environment, problems=3, samples=2, k=(1, 2), **SAMPLED)
    assert (made.n, made.failures, made.right) == (2, 3, [1, 0, 1])
    assert made.mean == pytest.approx((1 + 0.5) / 2)
    assert made.pass_at[1][0] == pytest.approx((1 + 0.5) / 2)
    assert made.pass_at[2][0] == 1.0, "only one problem has two scores"
    assert [t["reward"] for t in made.transcripts] == [1.0, None, 0.0]
    with pytest.raises(EnvironmentFailure, match="boom"):
        evaluate(*small([FAILED]), problems=3, new_tokens=2)


def test_scores_outside_0_and_1_have_a_mean_and_no_pass_at_k() -> None:
    made = evaluate(*small([2.0, -1.0]), problems=4, samples=2, **SAMPLED)
    assert made.measure == "mean reward at temperature 1"
    assert (made.mean, made.right) == (0.5, [])
    with pytest.raises(EnvironmentFailure, match="a score is 2"):
        evaluate(*small([2.0, -1.0]), problems=4, samples=2, k=(1,), **SAMPLED)
    alone = evaluate(*small([2.0, 0.5]), problems=1, samples=2, **SAMPLED)
    assert math.isnan(alone.low), "one problem says nothing about the spread"


def test_the_noise_of_an_answer_depends_on_nothing_but_problem_answer_and_seed() -> None:
    policy, environment = small()

    def said(problems: int, samples: int, seed: int = 0) -> list[list[str]]:
        made = Evaluator(problems=problems, samples=samples, seed=seed, **SAMPLED)
        texts, _ = made._answers(policy, environment, environment.held_out(problems), samples, 1.0)
        return [texts[i * samples : (i + 1) * samples] for i in range(problems)]

    many = said(6, 5)
    assert said(3, 2) == [row[:2] for row in many[:3]]
    assert said(6, 5) == many
    assert said(6, 5, seed=1) != many
    keys = torch.cat([noise_keys(7, 5, seed) for seed in range(4)])
    assert len(keys.unique()) == len(keys)
    assert torch.equal(noise_keys(7, 1, 0), torch.arange(7)), "as evaluations were always seeded"
    assert int(noise_keys(2**24 - 1, 1, 2**22 - 1).max()) < 2**62


def test_the_noise_is_the_same_for_another_policy() -> None:
    """Common random numbers: two policies that agree say the same."""
    environment = small()[1]
    a, b = (trimtab.load_policy("nano", seed=0, dtype="float64") for _ in range(2))
    options: dict[str, Any] = {"samples": 3, "problems": 5, **SAMPLED}
    assert evaluate(a, environment, **options) == evaluate(b, environment, **options)


def test_an_environment_of_its_own() -> None:
    policy, environment = small()
    other = load_environment("toy:sum(limit=9)")
    made = Evaluator(environment=other, problems=5, new_tokens=3)(policy, environment)
    assert [t["prompt"] for t in made.transcripts] == [p.question for p in other.held_out(5)]
    assert made == evaluate(policy, other, problems=5, new_tokens=3)
    with pytest.raises(EvaluationError, match="nothing to be evaluated on"):
        Evaluator()(policy)


def test_the_environment_is_left_as_it_was() -> None:
    policy, environment = small([1.0, FAILED, 0.0] + [0.0] * 30)
    environment.draw(3)
    before = environment.state_dict()
    evaluate(policy, environment, problems=8, new_tokens=2)
    assert environment.state_dict() == before
    with pytest.raises(EnvironmentFailure, match="of the last"):
        evaluate(policy, _always_failing(environment), problems=None, samples=4, **SAMPLED)
    assert environment.state_dict() == before


def _always_failing(environment: Any) -> Any:
    environment._scorer = Told([FAILED])
    return environment


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"k": (2,)}, "pass@2 needs at least 2 answers"), ({"samples": 4, "k": (0,), "temperature": 1}, "pass@0"),
        ({"samples": 4, "k": (1, 5), "temperature": 1}, "pass@5 needs"), ({"samples": 2}, "all be the same"),
        ({"temperature": -1.0}, "temperature=-1.0 must be 0"), ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"), ({"samples": 0}, "samples=0"), ({"problems": 0}, "problems=0"),
        ({"seed": -1}, "seed=-1"), ({"seed": 2**22}, "seed="), ({"samples": 2**16, "temperature": 1}, "below 65536"),
    ],
)  # fmt: skip
def test_contradictions_are_refused_with_a_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(EvaluationError, match=sentence):
        Evaluator(**options)


def test_numbers_with_commas() -> None:
    assert whole_numbers("1, 4,8") == (1, 4, 8)
    assert whole_numbers(" ") == ()
    with pytest.raises(EvaluationError, match="such as 1,4,8"):
        whole_numbers("1;4")
