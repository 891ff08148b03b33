"""ReMix: the numbers of its card, its replay over several turns against the twin, and the change of phase."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.golden import remix_twin, test_golden, twins
from tests.laws.checks import digest
from tests.spikes.bapo import toy_grpo
from tests.spikes.tokens import case, mismatched
from trimtab.core.batch import Batch
from trimtab.core.errors import MethodError
from trimtab.core.kit import Kit
from trimtab.core.loop import begin, run
from trimtab.core.method import Method, Phase
from trimtab.core.phases import phased
from trimtab.core.piece import piece
from trimtab.core.registry import Neutral, find, method, parse
from trimtab.core.schedules import staircase
from trimtab.core.state import Clock, load, save
from trimtab.stages.reuse import REPLAY, kl_convex, recentred, replayed, to_behavior
from trimtab.stages.surrogate import clip, token_ratio

remix = find("remix")


def toy(**options: Any) -> Method:
    """ReMix on toy tokens with plain gradient descent, the whole batch in each update."""
    made: Method = remix(test_golden.toy(find("grpo")()), **options)
    return made


def test_the_reference_s_part_follows_the_card() -> None:
    weight = staircase(start=1.0, end=0.5, step=0.1, wait=50, every=10)
    for turn, value in ((0, 1), (50, 1), (51, 0.9), (60, 0.9), (61, 0.8), (91, 0.5), (200, 0.5)):
        assert weight(Clock(turns=turn)) == pytest.approx(value, abs=1e-12)
    up = staircase(start=0.0, end=1.0, step=0.6, wait=0, every=1)
    assert [up(Clock(turns=t)) for t in range(3)] == pytest.approx([0.0, 0.6, 1.0])


# -- the surrogate -----------------------------------------------------------------------------------------------


def one(behavior: float, old: float, now: float, advantage: float, source: int = REPLAY) -> tuple[float, float, float]:
    """(gradient of the surrogate by log pi, lower and upper bound) of one decision with these probabilities."""
    made = toy()
    environment, models = case(0)
    kit = Kit(begin(made, environment, models), made.phases[0].method, None, False)
    logp = torch.tensor([[now]], dtype=torch.float64).log().requires_grad_()
    batch = Batch({
        "mask": torch.ones(1, 1, dtype=torch.bool), "advantage": torch.tensor([[advantage]], dtype=torch.float64),
        "logp_old": torch.tensor([[old]], dtype=torch.float64).log(), "source": torch.tensor([source]),
        "logp_behavior": torch.tensor([[behavior]], dtype=torch.float64).log(),
    })  # fmt: skip
    surrogate = made.phases[0].method.get("surrogate")
    (value, *_) = surrogate(kit, batch, {"logp": logp})
    (grad,) = torch.autograd.grad(value.value.sum(), logp)
    r = to_behavior(inner=token_ratio())(kit, batch, {"logp": logp})
    bound = recentred(inner=clip(), measure=token_ratio())(kit, batch, {"logp": logp}, r)
    return float(grad), float(bound.low), float(bound.high)


def test_the_window_stands_where_the_policy_was() -> None:
    """b = 0.2, k = 0.4: c = 2, window [1.8, 2.2]; a window at 1 would hold r = 2 already."""
    grad, low, high = one(0.2, 0.4, 0.45, 1.0)
    assert (low, high) == pytest.approx((1.8, 2.2))
    assert grad == 0, "r = 2.25 is above it"
    assert one(0.2, 0.4, 0.45, -1.0)[0] == pytest.approx(2.25), "but with A < 0 it may come down"
    assert one(0.2, 0.4, 0.4, 1.0)[0] == pytest.approx(-2.0), "at the start of the turn: -c A, for every width"
    assert one(0.4, 0.4, 0.4, 1.0)[0] == pytest.approx(-1.0), "sampled by the same policy: PPO's"
    assert one(0.9, 0.1, 0.1, -1.0)[1] == 0, "no negative bound"
    assert one(1e-30, 0.9, 0.9, 1.0)[2] == pytest.approx(math.exp(20) + 0.2), "c is held at exp(20)"


def test_a_fresh_row_is_grpo_s_whatever_its_sampler_says() -> None:
    """Its behaviour policy is the one at the start of the turn; the sampler's rounding is none of ReMix."""
    grad, low, high = one(0.2, 0.4, 0.45, 1.0, source=0)
    assert (low, high) == (0.8, 1.2)
    assert grad == pytest.approx(-0.45 / 0.4)


def test_two_anchors_cost_nothing_at_themselves_and_only_one_counts_at_share_one() -> None:
    made = toy()
    environment, models = case(0)
    kit = Kit(begin(made, environment, models), made.phases[0].method, None, False)
    logp = torch.tensor([[-1.0, -2.0]], dtype=torch.float64, requires_grad=True)
    here = {"mask": torch.ones(1, 2, dtype=torch.bool), "logp_ref": logp.detach(), "logp_previous": logp.detach()}

    def value(share: float, **columns: torch.Tensor) -> tuple[float, float]:
        loss = kl_convex(coef=1.0, share=share)(kit, Batch({**here, **columns}), {"logp": logp})[0].value.sum()
        (grad,) = torch.autograd.grad(loss, logp)
        return float(loss.detach()), float(grad.abs().max())

    assert value(0.5) == (0.0, 0.0)
    away = torch.tensor([[-1.5, -2.0]], dtype=torch.float64)
    assert value(1.0, logp_ref=away)[0] == pytest.approx(0.106531, abs=1e-6)
    assert value(0.7, logp_ref=away)[0] == pytest.approx(0.7 * 0.106531, abs=1e-6)
    assert value(0.7, logp_previous=away)[0] == pytest.approx(0.3 * 0.106531, abs=1e-6)


# -- the replay --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_turns_with_replayed_rows_agree_with_the_twin(seed: int) -> None:
    """Six turns, each from the tables that the run had: fresh and replayed rows, both anchors."""
    method = toy(share=0.5, kl=0.3, kl_wait=1, kl_floor=0.3, reincarnate=None).wrap("collect", mismatched())
    environment, models = case(seed)
    policy: Any = models["policy"]
    tables = [policy.logits.detach().clone()]
    stale = 0
    for step in run(method, environment, models, until=6, seed=seed):
        k = step.turn - 1
        weight = max(1 - 0.1 * math.ceil(max(k - 1, 0) / 10), 0.3)
        expected = remix_twin.remix(step.batch, tables[k], tables[0], tables[max(k - 1, 0)], weight=weight, kl=0.3)
        now = policy.logits.detach().clone()
        assert float((now - expected).abs().max()) < 1e-12
        tables.append(now)
        stale += int((step.batch.source == REPLAY).sum())
    assert stale > 30
    assert float((tables[-1] - tables[0]).abs().max()) > 0.05


def test_replayed_rows_are_whole_groups_with_their_age_and_behavior() -> None:
    environment, models = case(0)
    seen: dict[int, dict[tuple[int, ...], float]] = {}
    for step in run(toy(share=0.4, window=2), environment, models, until=6):
        batch, old = step.batch, step.batch.source == REPLAY
        fresh = batch.take(batch.source == 0)
        assert int((fresh.age != 0).sum()) == 0
        assert len(fresh) == 8, "two of the three prompts, four tries each"
        if step.turn > 2:
            assert 0.3 < float(old.double().mean()) < 0.5
        for i in old.nonzero().squeeze(1).tolist():
            age, group = int(batch.age[i]), int(batch.group[i])
            assert 1 <= age <= 2
            mates = old & (batch.group == group)
            assert int(mates.sum()) == 4, "a group is never cut"
            when = seen[step.turn - age]
            assert float(batch.logp_behavior[i].sum()) in when.values(), "as its own sampler said"
        seen[step.turn] = {(step.turn, i): float(fresh.logp_behavior[i].sum()) for i in range(len(fresh))}
        assert step.state.clock.decisions == sum(_made(step, seen))


def _made(step: Any, seen: dict[int, Any], kept: dict[int, int] = {}) -> list[int]:  # noqa: B006  counts of this run
    if step.turn == 1:
        kept.clear()
    kept[step.turn] = int(step.batch.mask[step.batch.source == 0].sum())
    return list(kept.values())


def test_the_credit_of_a_replayed_group_is_what_it_was() -> None:
    environment, models = case(3)
    credit: dict[int, torch.Tensor] = {}
    compared = 0
    for step in run(toy(share=0.5), environment, models, until=5):
        batch = step.batch
        for g in batch.group.unique().tolist():
            mine = batch.group == g
            a = (batch.advantage[mine] * batch.mask[mine]).sum(1).sort().values
            if g in credit:
                assert torch.allclose(a, credit[g], atol=1e-14)
                compared += 1
            credit[g] = a
    assert compared > 4


def test_demonstrations_are_not_stored() -> None:
    from tests.spikes.chord import chord

    environment, models = case(0)
    for step in run(remix(chord(test_golden.toy(find("grpo")())), share=0.5), environment, models, until=4):
        assert int((step.batch.source == 1).sum()) > 0
        held = step.state.pieces["/replay"]["held"]
        assert all(int((rows.source != 0).sum()) == 0 for _, rows in held)
        assert len(held) <= 2


# -- phases ------------------------------------------------------------------------------------------------------


def test_after_the_first_phase_it_starts_over_on_policy() -> None:
    environment, models = case(0)
    method = toy(share=0.4, reincarnate=3, kl=0.5)
    updates = 0
    for step in run(method, environment, models, until=6):
        batch, phase = step.batch, step.state.phases.index
        assert phase == (0 if step.turn <= 3 else 1)
        assert step.state.clock.updates - updates == (2 if phase == 0 else 1)
        updates = step.state.clock.updates
        rollouts = int((batch.source == 0).sum())
        assert rollouts == (8 if phase == 0 else 12), "(1 - share) of the prompts, then all"
        if step.turn == 4:
            assert step.logs["on policy/kl" if "on policy/kl" in step.logs else "policy/kl"] == 0
            assert "/replay" not in step.state.pieces
        if phase == 1:
            assert int((batch.source == REPLAY).sum()) == 0
            assert int(batch.age.max()) == 0


def test_it_resumes_at_every_turn_to_the_same_bits(tmp_path: Path) -> None:
    method = toy(reincarnate=3, kl_wait=0)

    def go(until: int, path: Path | None, seed: int) -> Any:
        environment, models = case(seed)
        state = begin(method, environment, models, seed=seed)
        if path:
            load(state, path)
        for step in run(method, state.environment, state.models, until=until, state=state):
            state = step.state
        return state

    straight = digest(go(5, None, 0))
    for k in range(1, 5):
        place = tmp_path / str(k)
        save(go(k, None, 0), place)
        assert digest(go(5, place, 7)) == straight


def test_settings_reach_both_phases_and_bad_ones_neither() -> None:
    method = remix().set("collect.group", 4).but(rows=64)
    assert [p.method.get("collect.group") for p in method.phases] == [4, 4]
    assert [p.method.rows for p in method.phases] == [64, 64]
    assert method.set("collect.share", 0.2).phases[0].method.get("collect.share") == 0.2, "which has it alone"
    with pytest.raises(MethodError, match="Did you mean 'group'"):
        method.set("collect.grup", 4)


# -- with others -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "expression", ["remix+bapo", "bapo+remix", "remix+dapo", "d3s+remix", "remix+gspo", "bnpo+remix"]
)
def test_it_composes(expression: str) -> None:
    if expression == "bnpo+remix":  # its credit would forget that replayed rows have one
        with pytest.raises(MethodError, match=r"credit\.rows"):
            parse(expression)
        assert parse("remix+bnpo").phases
        return
    assert [p.name for p in parse(expression).phases] == ["mix", "on policy"]


def test_bapo_searches_in_the_moved_window() -> None:
    environment, models = case(0)
    method = remix(find("bapo")(toy_grpo(), target=0.6), share=0.5, reincarnate=None).set("update.lr", 0.3)
    logs = [s.logs for s in run(method, environment, models, until=5, debug=True)]
    assert max(log["bound_high"] for log in logs) > 1.2
    assert all(math.isfinite(v) for log in logs for v in log.values())


@method(world="language", title="The base, then the base", base=find("grpo"), case="text", register=False,
        neutral=Neutral())  # fmt: skip
def twice(base: Method) -> Method:
    return phased("twice", [Phase("one", base, {"turns": 1}), Phase("two", base, {})])


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: remix(share=1.0), r"share=1\.0 must be in \[0, 1\)"),
        (lambda: remix(window=-1), "window=-1 must be at least 0"),
        (lambda: remix(share=0.8), "the buffer is smaller than one update. Raise window or lower share"),
        (lambda: remix(window=0), "window=0 holds 0, so the buffer is smaller than one update"),
        (lambda: remix(reincarnate=0), "at least 1 turn"),
        (lambda: remix(kl=-1.0), "coef=-1.0 must be at least 0"),
        (lambda: remix(find("grpo")(kl=0.1)), "has a KL penalty of its own"),
        (lambda: remix(find("grpo")(dual=3.0)), "a replayed row may begin above it"),
        (lambda: remix(find("reinforce")()), "reinforce has no surrogate with both; use grpo"),
        (lambda: remix(find("sft")()), "sft has no surrogate with both; use grpo"),
        (lambda: remix(remix()), "write it once"),
        (lambda: twice(remix()), "twice and remix both run in phases"),
        (lambda: replayed(share=0.9, window=2), "asks for 9 replayed rows to each fresh one"),
    ],
)
def test_what_cannot_work_is_refused(make: Any, match: str) -> None:
    with pytest.raises(MethodError, match=match):
        make()


def test_a_piece_that_collects_again_belongs_inside_the_replay() -> None:
    environment, models = case(0)
    with pytest.raises(MethodError, match="remix belongs to the left of dapo"):
        find("dapo")(remix(test_golden.toy(find("grpo")())))

    @piece("collect")
    def twice_over(kit: Kit, *, inner: Any) -> Batch:
        return inner() and inner()

    outside = toy().each(lambda _, inside: inside.wrap("collect", twice_over()))
    with pytest.raises(MethodError, match="the replay was asked twice in one turn"):
        list(run(outside, environment, models, until=9))
    inside = remix(find("dapo")(test_golden.toy(find("grpo")()))).set("credit.limit", 4)
    assert len(list(run(inside, environment, models, until=5))) == 5
    assert twins.PASSES == remix_twin.PASSES
