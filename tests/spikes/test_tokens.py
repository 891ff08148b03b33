"""Spikes on toy tokens: BAPO's bound under micro-batches, and three methods at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.golden import twins
from tests.spikes.bapo import bapo, toy_grpo
from tests.spikes.chord import chord, d3s
from tests.spikes.tokens import case
from trimtab.core.errors import MethodError
from trimtab.core.loop import run
from trimtab.core.method import Method, diff
from trimtab.core.registry import find
from trimtab.stages.surrogate import clip

torch.set_num_threads(1)


def drifted(method: Callable[..., Method], *, memory: int | None) -> list[float]:
    """Bounds and final parameters after three turns of stale updates."""
    environment, models = case(0)
    bounds = []
    for step in run(method(toy_grpo().set("update.lr", 0.3)), environment, models, until=3, memory=memory):
        bounds += [step.logs["bound_low"], step.logs["bound_high"]]
    return [*bounds, *models["policy"].state_dict()["logits"].flatten().tolist()]


def test_bapo_bound_is_the_same_under_three_micro_batches() -> None:
    whole = drifted(bapo, memory=None)
    assert max(whole[1:6:2]) > 1.2, "the search never moved a bound, so nothing was tested"
    for memory in (3, 4, 7):  # updates of 8 rows in three, two and two micro-batches
        assert drifted(bapo, memory=memory) == pytest.approx(whole, abs=1e-12)


def check_keep() -> None:
    """With `keep` shrunk by hand, only kept decisions may have a gradient."""
    environment, models = case(1)
    method = d3s(toy_grpo(), share=0.3, tokens=0.2)
    logits: Any = models["policy"].logits
    before = logits.detach().clone()
    step = next(run(method, environment, models, until=1))
    touched = ((logits.detach() - before).abs().sum(-1) > 0).nonzero().tolist()
    batch = step.batch
    kept = {(int(batch.prompt[i, 0]), t) for i, t in batch.keep.nonzero().tolist()}
    assert {tuple(cell) for cell in touched} <= kept, "only a kept decision may learn"


def test_only_kept_decisions_learn() -> None:
    check_keep()


def test_three_methods_at_once_train_and_explain_themselves() -> None:
    method = chord(d3s(bapo(toy_grpo())))
    assert method.name == "chord+d3s+bapo"
    environment, models = case(0)
    steps = list(run(method, environment, models, until=6, debug=True))
    last = steps[-1]
    assert all(torch.isfinite(torch.tensor(v)) for v in last.logs.values())
    assert last.logs["imitation"] > 0, "expert rows must keep learning when select looks at policy rows only"
    assert {e.by for e in method.edits} == {"grpo", "you", "bapo", "d3s", "chord"}
    changed = {path for path, _, _ in diff(toy_grpo(), method)}
    assert {"surrogate.bound", "down_sample", "imitation", "scaled(surrogate)"} <= changed


def test_expert_rows_carry_no_credit_and_no_surrogate() -> None:
    environment, models = case(0)
    step = next(run(chord(toy_grpo()), environment, models, until=1))
    expert = step.batch.source == 1
    assert int(expert.sum()) == 6, "a fifth of 30"
    assert float(step.batch.advantage[expert].abs().max()) == 0
    assert step.state.clock.decisions == int(step.batch.mask[~expert].sum()), "demonstrations are not our decisions"


def test_order_of_composition_does_not_matter_for_different_slots() -> None:
    one, other = bapo(d3s(toy_grpo())), d3s(bapo(toy_grpo()))
    assert one.flatten() == other.flatten()


def test_two_swaps_of_one_slot_refuse_naming_both() -> None:
    changed = find("grpo")().swap("surrogate.bound", clip(0.2, 0.28))
    with pytest.raises(MethodError, match=r"bapo and you both swap 'surrogate\.bound'"):
        bapo(changed)


def test_an_option_that_a_swap_would_lose_is_refused() -> None:
    with pytest.raises(MethodError, match=r"surrogate\.bound\.high"):
        bapo(find("grpo")(clip_high=0.28))


def test_toy_grpo_learns() -> None:
    environment, models = case(0)
    rewards = [s.logs["reward"] for s in run(toy_grpo(), environment, models, until=60)]
    assert sum(rewards[-10:]) / 10 > sum(rewards[:10]) / 10 + 0.3
    assert twins.PASSES == 2
