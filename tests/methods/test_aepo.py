"""AEPO: its twin, and the exact checks of the card."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden import aepo_twin, twins
from tests.golden.test_golden import stale, toy
from tests.spikes import tokens
from trimtab.core.batch import Batch
from trimtab.core.errors import MethodError, TrimtabWarning
from trimtab.core.loop import run
from trimtab.core.method import Method
from trimtab.core.piece import piece
from trimtab.core.registry import find, parse
from trimtab.methods.cases import case
from trimtab.methods.language.aepo import watched

torch.set_num_threads(1)
AEPO, GRPO = find("aepo"), find("grpo")
SEEN: list[Batch] = []


@piece("credit", reads=("tempered",), writes=("advantage",))
def spied(batch: Batch, *, inner: Callable[[Batch], Batch]) -> Batch:
    """A wrap: what it sees is kept for the test."""
    SEEN.append(inner(batch))
    return SEEN[-1]


def small(group: int = 6, **options: Any) -> Method:
    """AEPO on toy tokens, watched before rows are dropped."""
    return AEPO(toy(stale(), tokens.token_rollouts(prompts=3, group=group)), **options).wrap("credit", spied())


def first_batch(seed: int = 0, **options: Any) -> tuple[Batch, Batch]:
    """(all rows, the rows learned from) of a first turn."""
    environment, models = tokens.case(seed)
    step = next(run(small(**options), environment, models, until=4, seed=seed))
    return SEEN[-1], step.batch


# -- twin --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("options", "hot"),
    [
        ({"target": 9.0, "samples": 6}, True),
        ({"target": 0.1, "samples": 7}, False),
        ({"target": 9.0, "samples": 4, "select": "advantage", "place": "first", "dual": 3.0}, True),
    ],
)
def test_two_turns_agree_with_the_twin(options: dict[str, Any], hot: bool, seed: int) -> None:
    environment, models = tokens.case(seed)
    policy: Any = models["policy"]
    method, replaced = small(share=0.7, **options), 0
    select = options.get("select", "reward")
    for turn in range(2):
        start = policy.logits.detach().clone()
        step = next(run(method, environment, models, until=10, seed=seed + 100 * turn))
        everything, batch = SEEN[-1], step.batch
        assert aepo_twin.number(aepo_twin.entropy(everything), options["target"], options["samples"]) == (
            hot, options["samples"] if hot else options["samples"] // 2
        )  # fmt: skip
        a = aepo_twin.credit(everything, select)
        if options.get("place") == "first":
            rows = aepo_twin.mixed_first(everything, a, options["samples"])
            assert torch.equal(batch.action, everything.action[rows])
            assert torch.equal(batch.tempered, everything.tempered[rows])
        expected = aepo_twin.aepo(batch, start, everything, select, options.get("dual"))
        assert float((policy.logits.detach() - expected).abs().max()) < 1e-12
        assert float((expected - start).abs().max()) > 1e-3
        replaced += int(batch.tempered.sum())
    assert replaced > 0, "or nothing of AEPO was compared"


# -- the card's checks -------------------------------------------------------------------------------------------


def test_without_samples_it_is_grpo_to_the_bit() -> None:
    ends = []
    for method in (AEPO(toy(stale()), samples=0), toy(stale())):
        environment, models = tokens.case(0)
        for _ in run(method, environment, models, until=4):
            pass
        ends.append(models["policy"].state_dict()["logits"])
    assert torch.equal(*ends)


def test_the_controller_is_inclusive_hot_at_first_and_halves_by_floor() -> None:
    assert aepo_twin.number(0.5, 0.5, 60) == (True, 60)
    assert [aepo_twin.number(0.6, 0.5, n)[1] for n in (60, 1)] == [30, 0]
    h = 9.0
    environment, models = tokens.case(0)
    steps = list(run(small(measure="trained", target=0.1, samples=1), environment, models, until=2))
    assert [s.logs["reroll_temperature"] for s in steps] == [1.2, 0.8], "0 before the first step, so it is hot"
    assert not bool(steps[1].batch.tempered.any()), "1 // 2 = 0"
    for _ in range(2):  # the second time the target is exactly the entropy
        environment, models = tokens.case(0)
        step = next(run(small(target=h), environment, models, until=2))
        h = step.logs["controlled_entropy"]
        assert h == pytest.approx(aepo_twin.entropy(SEEN[-1]), abs=1e-12)
    assert step.logs["reroll_temperature"] == 1.2


def test_the_trained_entropy_is_that_of_the_rows_learned_from_over_all_updates() -> None:
    environment, models = tokens.case(1)
    policy: Any = models["policy"]
    start: Tensor = policy.logits.detach().clone()
    step = next(run(small(measure="trained", samples=4), environment, models, until=3, seed=1))
    a = {i: float(step.batch.advantage[i, 0]) for i in range(len(step.batch))}
    middle = twins.grpo(step.batch, start, a=a)  # both passes; undo the second for the table in between
    values = []
    one = start
    for _ in range(twins.PASSES):
        keys = [(i, t) for i in range(len(step.batch)) for t in twins.decisions(step.batch, i)]
        values.append(-sum(float(twins.logp(one, step.batch, *key)) for key in keys) / len(keys))
        leaf = one.clone().requires_grad_()
        old = {key: float(twins.logp(start, step.batch, *key)) for key in keys}
        loss = sum(twins.clipped(a[i], torch.exp(twins.logp(leaf, step.batch, i, t) - old[i, t]), 0.8, 1.2)
                   for i, t in keys)  # fmt: skip
        (grad,) = torch.autograd.grad(loss / len(keys), leaf)  # type: ignore[operator]
        one = one - twins.LR * grad
    assert torch.allclose(one, middle, atol=1e-12)
    assert step.state.pieces["/controller"]["entropy"] == pytest.approx(sum(values) / len(values), abs=1e-12)


@pytest.mark.parametrize(
    ("temperature", "tempered", "push"), [(1.2, (0.6971, 0.3029), -0.0340), (0.8, (0.7773, 0.2227), 0.0462)]
)
def test_imitating_right_answers_pulls_towards_the_tempered_policy(
    temperature: float, tempered: tuple[float, float], push: float
) -> None:
    z = torch.tensor([1.0, 0.0], dtype=torch.float64)
    pi, hot = z.softmax(0), (z / temperature).softmax(0)
    assert pi.tolist() == pytest.approx([0.7311, 0.2689], abs=1e-4)
    assert hot.tolist() == pytest.approx(tempered, abs=1e-4)
    # The mean over draws of pi_T of the gradient of log pi, exactly.
    mean = sum(float(hot[a]) * (torch.eye(2, dtype=torch.float64)[a] - pi) for a in range(2))
    assert torch.allclose(torch.as_tensor(mean), hot - pi)
    assert float(hot[0] - pi[0]) == pytest.approx(push, abs=1e-4)
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        z = torch.randn(6, generator=g, dtype=torch.float64)
        pi, hot = z.softmax(0), (z / temperature).softmax(0)
        step = (z + 1e-4 * (hot - pi)).softmax(0)
        rise = float(torch.special.entr(step).sum() - torch.special.entr(pi).sum())
        assert (rise > 0) == (temperature > 1)


def test_re_rolls_learn_with_advantage_1_whatever_their_temperature() -> None:
    for target in (9.0, 0.1):
        everything, batch = first_batch(1, target=target, share=0.7, samples=6)
        assert len(batch) == int((~everything.tempered).sum()), "the batch keeps its size"
        hot = batch.tempered
        assert int(hot.sum()) > 0
        assert (batch.advantage[hot] == batch.mask[hot].double()).all()


def test_the_rows_that_stay_are_untouched() -> None:
    everything, batch = first_batch(1, target=9.0, share=0.7, samples=5, place="first")
    k = int(batch.tempered.sum())
    assert 0 < k <= 5
    assert torch.equal(batch.action[k:], everything.action[k : len(batch)])
    assert torch.equal(batch.advantage[k:], everything.advantage[k : len(batch)])


def test_the_first_prompts_of_the_batch_are_asked_again() -> None:
    everything, _ = first_batch(2, share=0.7, samples=4)
    own, hot = everything.take(~everything.tempered), everything.take(everything.tempered)
    assert hot.prompt.unique().tolist() == own.prompt[: 2 * 6].unique().tolist(), "0.7 of 3 prompts, floored"
    assert not set(hot.group.tolist()) & set(own.group.tolist())
    world = case("text", 0)
    method = world.shrink(AEPO(share=0.7, samples=1)).wrap("credit", spied())
    step = next(run(method, world.environment, world.models, until=2))
    asked = SEEN[-1]
    questions = [q for q, again in zip(asked.question, asked.tempered.tolist()) if again]
    assert questions == asked.question[: 2 * 4]
    assert (asked.temperature == 1).all(), "read as the policy's own"
    assert step.state.clock.decisions == int(asked.mask.sum()), "re-rolls are decisions too"
    assert world.environment.state_dict()["cursor"] == 3, "and no problem is used up by them"


def test_without_a_right_re_roll_the_batch_stays() -> None:
    environment, models = tokens.case(0)
    environment.target[:] = 9  # out of reach: nothing is ever right
    step = next(run(small(samples=6), environment, models, until=2))
    assert not bool(step.batch.tempered.any())
    assert len(step.batch) == 18
    assert step.logs["replaced"] == 0


def test_only_mixed_groups_are_imitated_where_the_advantage_selects() -> None:
    seen = {"reward": 0, "advantage": 0}
    for select in seen:
        for seed in range(6):
            everything, _ = first_batch(seed, group=2, select=select, share=1.0)
            group = everything.by("group")
            pure = everything.tempered & group.same(everything.score()) & (everything.score() > 0)
            seen[select] += int((everything.advantage[pure] > 0).sum())
    assert seen["advantage"] == 0
    assert seen["reward"] > 0


# -- a target out of reach ---------------------------------------------------------------------------------------


def test_windows_that_come_no_nearer_are_noticed() -> None:
    c: dict[str, Any] = {"side": 0, "turns": 0, "gap": 0.0, "before": math.inf}

    def go(gaps: list[float], side: int) -> list[bool]:
        nonlocal c
        held = []
        for gap in gaps:
            c, h = watched(c, gap, side, 3)
            held.append(h)
        return held

    assert go([1.0] * 6, 1) == [False] * 5 + [True]
    assert go([1.0, 0.9, 0.8, 0.7, 0.6, 0.5], 1)[:3] == [False] * 3, "it comes nearer"
    assert go([1.0] * 3 + [0.5] * 3 + [0.5] * 3, -1) == [False] * 8 + [True], "a change of side starts anew"


@pytest.mark.parametrize(
    ("target", "bound", "way"), [(5.0, "high=1.2", "lower target"), (0.001, "low=0.8", "raise target")]
)
def test_a_target_that_cannot_be_reached_is_said_once_and_at_which_bound(target: float, bound: str, way: str) -> None:
    world = case("text", 0)
    method = world.shrink(AEPO(target=target, patience=2, samples=4))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps = list(run(method.set("update.lr", 0.0), world.environment, world.models, until=9))
    said = [str(w.message) for w in caught if issubclass(w.category, TrimtabWarning)]
    assert len(said) == 1
    assert f"the target entropy {target:g} is not reached" in said[0]
    assert f"at {bound}, its bound" in said[0]
    assert way in said[0]
    side = 1.0 if target > 1 else -1.0
    assert {s.logs["held_at"] for s in steps} == {0.0, side}
    assert [s.logs["held_at"] for s in steps][:3] == [0.0] * 3, "not during the first windows"


# -- together and refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("expression", ["aepo+dapo", "aepo+bapo", "aepo+bnpo", "aepo+hapo", "hapo+aepo", "bnpo+aepo"])
def test_it_stands_with_other_methods(expression: str) -> None:
    world = case("text", 0)
    steps = list(run(world.shrink(parse(expression)), world.environment, world.models, until=2, debug=True))
    assert all(math.isfinite(v) for s in steps for v in s.logs.values())
    assert "reroll_temperature" in steps[0].logs


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"high": 0.5}, "0 < low <= high"),
        ({"low": 0.0}, "0 < low <= high"),
        ({"high": math.inf}, "0 < low <= high"),
        ({"target": 0.0}, "must be an entropy above 0"),
        ({"share": 0.0}, r"share=0.0 must be in \(0, 1\]"),
        ({"samples": -1}, "samples=-1 must be at least 0"),
        ({"patience": 0}, "patience=0 must be at least 1"),
        ({"select": "all"}, "Known: advantage, reward"),
        ({"measure": "logits"}, "Known: rollouts, trained"),
        ({"place": "last"}, "Known: first, random"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(MethodError, match=match):
        AEPO(**options)


def test_a_batch_drawn_at_another_temperature_is_refused() -> None:
    world = case("text", 0)
    method = world.shrink(AEPO()).set("collect.temperature", 0.7)
    with pytest.raises(MethodError, match=r"this collect draws at 0\.7"):
        next(run(method, world.environment, world.models, until=1))


def test_a_collect_that_cannot_be_asked_again_is_refused() -> None:
    environment, models = tokens.case(0)
    with pytest.raises(MethodError, match="no_temperature has no option 'temperature'"):
        next(run(AEPO(toy(GRPO(), no_temperature())), environment, models, until=1))


@piece("collect", writes=("prompt", "action", "mask", "source", "age", "group", "reward", "logp_behavior"))
def no_temperature(kit: Any, *, prompts: int = 3) -> Batch:
    """Rows of a collect without a temperature."""
    rows = tokens.expert_batch(kit.environment, prompts)
    zeros = torch.zeros(rows.mask.shape, dtype=torch.float64)
    return rows.put(group=torch.arange(prompts), reward=zeros, logp_behavior=zeros, source=torch.zeros(prompts).long())
