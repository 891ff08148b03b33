"""Collecting text: columns, ids, failures, revisiting; and learning end to end on the smallest model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trimtab.core.errors import EnvironmentFailure, MethodError
from trimtab.core.loop import begin, run
from trimtab.core.registry import find
from trimtab.environments.problem import Failure
from trimtab.environments.text import load_environment
from trimtab.methods.cases import case
from trimtab.policies.builtin import load_policy
from trimtab.stages.collect import left_padded, rollouts

torch.set_num_threads(1)


class Scripted:
    """A scorer that gives what it is told, in turn."""

    name = "scripted"
    needs_answer = False

    def __init__(self, *given: float | Failure) -> None:
        self.given, self.asked = given, 0

    def score(self, problem: Any, text: str) -> float | Failure:
        self.asked += 1
        return self.given[(self.asked - 1) % len(self.given)]

    def check(self, problems: Any) -> None:
        """Every problem will do."""

    def close(self) -> None:
        """Nothing is open."""


def small(scorer: Any = None, **options: Any) -> tuple[Any, Any, Any]:
    made = case("text")
    if scorer is not None:
        made.environment._scorer = scorer
    method = made.shrink(find("grpo")())
    for name, value in options.items():
        method = method.set(f"collect.{name}", value)
    return method, made.environment, made.models


def first(scorer: Any = None, **options: Any) -> Any:
    method, environment, models = small(scorer, **options)
    return next(run(method, environment, models, until=1))


def test_columns_are_what_the_design_says() -> None:
    batch = first().batch
    n, t = batch.mask.shape
    assert n == 12
    assert batch.group.tolist() == [i // 4 for i in range(12)]
    assert torch.equal(batch.terminated, ~batch.truncated)
    lengths = batch.mask.sum(1)
    assert torch.equal(batch.mask, torch.arange(t) < lengths[:, None]), "responses are padded on the right"
    assert torch.equal(batch.reward != 0, (batch.reward != 0) & (torch.arange(t) == lengths[:, None] - 1))
    assert bool((batch.prompt_mask.long().diff(dim=1) >= 0).all()), "prompts are padded on the left"
    assert bool((batch.source == 0).all())
    assert len(batch.response) == len(batch.question) == n


def test_ids_are_unique_in_the_run() -> None:
    method, environment, models = small()
    batches = [s.batch for s in run(method, environment, models, until=3)]
    groups = [set(b.group.tolist()) for b in batches]
    assert not groups[0] & groups[1]
    assert not groups[1] & groups[2]


def test_a_failed_reward_leaves_the_batch_and_is_counted() -> None:
    step = first(Scripted(1.0, 0.0, Failure("raised", "boom"), *[0.0] * 9))
    assert len(step.batch) == 11
    assert step.logs["failures"] == 1
    assert bool(torch.isfinite(step.batch.reward).all())


def test_a_batch_of_failures_stops_the_run_with_an_example() -> None:
    with pytest.raises(EnvironmentFailure, match="boom"):
        first(Scripted(Failure("raised", "boom")))


def test_equal_rewards_teach_nothing_and_move_nothing() -> None:
    method, environment, models = small(Scripted(1.0))
    before = {k: v.clone() for k, v in models["policy"].state_dict().items()}
    step = next(run(method, environment, models, until=1))
    assert step.logs["dead_groups"] == 1
    assert step.logs["grad_norm"] == 0
    assert all(torch.equal(v, before[k]) for k, v in models["policy"].state_dict().items())


def test_a_group_of_one_gets_no_credit() -> None:
    step = first(Scripted(1.0, 0.0), group=1)
    assert float(step.batch.advantage.abs().max()) == 0


def test_solved_problems_are_revisited_less_and_that_is_remembered() -> None:
    method, environment, models = small(Scripted(1.0), revisit=0.01, prompts=6)
    state = begin(method, environment, models)
    seen: list[str] = []
    for step in run(method, environment, models, until=4, state=state):
        seen += [q for i, q in enumerate(step.batch.question) if i % 4 == 0]
    assert all(state.pieces["/solved"].values())
    early = seen[:6]
    assert len(set(seen[:12])) == 12, "the second batch must not repeat what the first one solved"
    assert set(early) <= set(seen)


@pytest.mark.parametrize("options", [{"revisit": 0.0}, {"prompts": 0}, {"group": 0}])
def test_impossible_sizes_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(MethodError):
        rollouts(**options)


def test_left_padding() -> None:
    ids, mask = left_padded([[1, 2, 3], [4]])
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert mask.tolist() == [[True] * 3, [False, False, True]]


def test_sft_learns_the_reference_answers() -> None:
    environment = load_environment("toy:sum(limit=3)")
    policy = load_policy("nano", dtype="float64")
    method = find("sft")(lr=2e-2, prompts=8)
    losses = [s.logs["nll"] for s in run(method, environment, policy, until=60)]
    assert losses[-1] < losses[0] / 4


def test_grpo_raises_a_reward_that_can_be_raised() -> None:
    """The coin's reward starts near one half; a policy gradient must push it up, and the base does so too."""
    for name in ("grpo", "rloo", "reinforce"):
        made = case("text")
        method = made.shrink(find(name)()).set("collect.prompts", 6).set("collect.group", 8).set("update.lr", 1e-2)
        rewards = [s.logs["reward"] for s in run(method, made.environment, made.models, until=40)]
        start, end = sum(rewards[:4]) / 4, sum(rewards[-8:]) / 8
        assert end > start + 0.2, f"{name} did not learn: {start} -> {end}"
