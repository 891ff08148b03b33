"""HAPO: every part against its twin, and the exact checks of the card."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.faults.test_core_faults import credited, scored
from tests.golden import hapo_twin
from tests.golden.test_golden import agree, toy
from tests.laws import checks
from tests.laws.table import Entry
from tests.spikes import tokens
from trimtab.core.batch import Batch
from trimtab.core.errors import MethodError
from trimtab.core.loop import run
from trimtab.core.method import Method
from trimtab.core.registry import find, parse
from trimtab.methods.cases import case
from trimtab.methods.language.hapo import range_of, redistributed, signal_of, token_average, widened
from trimtab.policies.adapted import AdaptedPolicy, entropy_of
from trimtab.policies.builtin import load_policy
from trimtab.policies.sampler import Sampling
from trimtab.stages.credit import group_normalised
from trimtab.stages.surrogate import Bound, clip

torch.set_num_threads(1)
HAPO, DAPO, GRPO = find("hapo"), find("dapo"), find("grpo")
SEEDS = (0, 1, 2)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def stale(**options: Any) -> Method:
    """HAPO on toy tokens, with steps so large that every bound is passed."""
    method = HAPO(DAPO(GRPO(passes=hapo_twin.PASSES), buffer=0.5), swing=None, **options)
    return toy(method).set("credit.limit", 4).set("update.lr", hapo_twin.LR)


# -- twins -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("options", "literal"),
    [
        ({}, {}),
        ({"preset": "official_code"}, {"released": True, "base": (0.2, 0.2), "dual": 10.0}),
        ({"entropy": "old"}, {"old_entropy": True}),
        ({"token_credit": False, "redistribute": None}, {"token": False, "redistribute": 0.0}),
        ({"token_credit": False, "bound": None}, {"token": False, "bound": 0.0}),
        ({"bound": None, "redistribute": None}, {"bound": 0.0, "redistribute": 0.0}),
        ({"bound": 0.5, "redistribute": 0.3, "clip_low": 0.1, "clip_high": 0.4},
         {"bound": 0.5, "redistribute": 0.3, "base": (0.1, 0.4)}),
    ],
)  # fmt: skip
def test_every_part_agrees_with_the_twin(options: dict[str, Any], literal: dict[str, Any], seed: int) -> None:
    agree(str(options), stale(**options), hapo_twin.hapo, seed, **literal)


def test_the_twin_saw_every_branch() -> None:
    cases: Counter[tuple[bool, str]] = Counter()

    def seen(h: float, still: bool, low: bool, high: bool) -> None:
        cases[h > 0, "still" if still else "low" if low else "high" if high else "moved"] += 1

    for seed in SEEDS:
        agree("hapo", stale(), hapo_twin.hapo, seed, seen=seen)
    assert {(sure, where) for sure in (True, False) for where in ("still", "low", "high", "moved")} == set(cases)


@pytest.mark.parametrize("options", [{}, {"sign": "released"}, {"entropy": "old"}])
def test_laws_hold_on_stale_data(options: dict[str, Any], tmp_path: Path) -> None:
    entry = Entry("hapo", lambda: stale(**options).set("update.lr", 3.0).but(rows=7, passes=2), tokens.case)
    checks.check_invariance(entry)
    checks.check_resume_here(entry, tmp_path)
    environment, models = entry.make(0)
    assert len(list(run(entry.build(), environment, models, until=2, debug=True))) == 2


# -- the signal --------------------------------------------------------------------------------------------------


def test_the_signal_of_the_card() -> None:
    h = numbers(0.01, 0.1, 0.5, 1, 2, 0.05)
    known = range_of(h, 0.8)
    assert math.exp(known.pivot) == pytest.approx(1.0), "the element at the quantile"
    signed = [-1, -0.5, -0.1505, 0, 1, -0.6505]
    assert signal_of(h, known, "signed").tolist() == pytest.approx(signed, abs=1e-4)
    assert signal_of(h, known, "released").tolist() == pytest.approx([1, 0.5, 0.1505, 0, 1, 0.6505], abs=1e-4)
    twin = hapo_twin.signal({(i, 0): x for i, x in enumerate(h.tolist())})
    assert list(twin.values()) == pytest.approx(signed, abs=1e-4)


def test_the_signal_is_unmoved_by_a_scale_and_a_power_of_the_entropy() -> None:
    h = torch.rand(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.01
    base = signal_of(h, range_of(h, 0.8), "signed")
    for c, k in ((3.0, 1.0), (0.2, 2.5), (1.0, 0.3)):
        other = c * h**k
        assert torch.allclose(signal_of(other, range_of(other, 0.8), "signed"), base, atol=1e-12)
    assert signal_of(numbers(0.7), range_of(numbers(0.7), 0.8), "signed").tolist() == [0.0]
    flat = numbers(0.3, 0.3, 0.3)
    assert signal_of(flat, range_of(flat, 0.8), "signed").tolist() == [0.0] * 3
    assert signal_of(numbers(0.0, 0.0), range_of(numbers(0.0, 0.0), 0.8), "signed").tolist() == [0.0] * 2


# -- credit ------------------------------------------------------------------------------------------------------


def ragged(rewards: list[float], lengths: list[int]) -> Batch:
    batch = scored(rewards, [0] * len(rewards))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    reward = torch.zeros(mask.shape, dtype=torch.float64)
    reward[:, 0] = numbers(*rewards)
    return Batch(
        {**batch.columns, "mask": mask, "keep": mask, "reward": reward, "action": torch.zeros_like(mask).long()}
    )


def test_credit_over_tokens_of_the_card() -> None:
    batch = ragged([1, 0, 0, 1], [2, 4, 4, 2])
    a = credited(token_average(), batch)
    assert a[0, 0].item() == pytest.approx(1.41421, abs=1e-5)
    assert a[1, 0].item() == pytest.approx(-0.70711, abs=1e-5)
    assert abs(float(a.sum())) < 1e-12
    rows = credited(group_normalised(eps=0.0), batch)
    assert rows[0, 0].item() == pytest.approx(0.8660, abs=1e-4)
    assert float(rows.sum()) == pytest.approx(-3.4641, abs=1e-4)
    equal = ragged([1, 0, 0, 1], [3, 3, 3, 3])
    assert torch.allclose(credited(token_average(), equal), credited(group_normalised(ddof=0, eps=1e-6), equal))


@pytest.mark.parametrize(("n", "falls"), [(25, False), (26, False), (27, True)])
def test_a_group_with_few_positive_tokens_falls_back(n: int, falls: bool) -> None:
    """sqrt((1 - p) / p) >= 5 below p = 1/26; at 1/26 itself the 1e-6 keeps it at 4.99998."""
    batch = ragged([1.0] + [0.0] * (n - 1), [1] * n)
    a = credited(token_average(), batch)
    rows = credited(group_normalised(eps=1e-6), batch)
    assert torch.equal(a, rows) == falls
    upside = ragged([0.0] + [1.0] * (n - 1), [1] * n)
    assert torch.allclose(credited(token_average(), upside), -a, atol=1e-9)


def test_degenerate_groups_have_no_credit() -> None:
    assert credited(token_average(), scored([0.3, 0.3, 1.0], [0, 0, 1])).abs().max() == 0
    batch = ragged([1, 0, 1], [0, 2, 2])
    a = credited(token_average(), batch)
    assert torch.isfinite(a).all()
    assert a[0].abs().max() == 0


# -- bound and weight --------------------------------------------------------------------------------------------


def at(h: float, ratio: float = 1.0, strength: float = 1.0) -> tuple[Bound, float]:
    batch = Batch({"entropy_signal": numbers(h)[:, None]})
    r = numbers(ratio)[:, None]
    kit: Any = SimpleNamespace(of=lambda piece: kit)
    found = widened(strength=strength, inner=clip(0.2, 0.28))(kit, batch, {}, r)
    return found, float(redistributed()(kit, batch, {}, r, found))


@pytest.mark.parametrize(("h", "low", "high"), [(1, 0.2, 0.56), (-1, 0.4, 0.28), (0, 0.2, 0.28)])
def test_bounds_of_the_card(h: float, low: float, high: float) -> None:
    found, _ = at(h)
    assert (1 - float(found.low), float(found.high) - 1) == pytest.approx((low, high))


@pytest.mark.parametrize(
    ("h", "ratio", "a"), [(0.5, 1.0, 2), (0.5, 1.3, 3), (-0.5, 1.0, 1), (-0.5, 0.7, 2), (-1, 1.0, 0)]
)
def test_redistribution_of_the_card(h: float, ratio: float, a: float) -> None:
    assert 2 * at(h, ratio)[1] == pytest.approx(a)


def test_at_the_first_update_sure_tokens_are_damped_and_none_amplified() -> None:
    environment, models = tokens.case(3)
    method = stale(bound=None).but(passes=1)
    start: Tensor = models["policy"].logits.detach().clone()  # type: ignore[operator, union-attr]
    step = next(run(method, environment, models, until=4))
    entropies = {(i, t): hapo_twin.twins.entropy(start, step.batch, i, t)
                 for i in range(len(step.batch)) for t in hapo_twin.twins.decisions(step.batch, i)}  # fmt: skip
    leaf, total = start.clone().requires_grad_(), torch.zeros(())
    for (i, t), h in hapo_twin.signal(entropies).items():
        a = float(step.batch.advantage[i, t])
        total = total - a * (1 + min(h, 0.0)) * hapo_twin.twins.logp(leaf, step.batch, i, t)
    (grad,) = torch.autograd.grad(total / len(entropies), leaf)
    moved = start - models["policy"].logits.detach()  # type: ignore[operator, union-attr]
    assert torch.allclose(moved, hapo_twin.LR * grad, atol=1e-12)


# -- the temperature ---------------------------------------------------------------------------------------------


def test_each_draw_has_the_temperature_of_its_entropy() -> None:
    """Of the second batch: by the range of the first one, as the policy stood before its update."""
    world = case("text", 0)
    policy: Any = world.models["policy"]
    swing, known, spread, held = 0.5, None, 0.0, load_policy("nano", seed=0, dtype="float64")
    method = world.shrink(HAPO(swing=swing))
    for step in run(method, world.environment, world.models, until=3, seed=0):
        batch = step.batch
        if known is not None:
            for i in range(len(batch)):
                prompt = batch.prompt[i][batch.prompt_mask[i]].tolist()
                for t in range(int(batch.mask[i].sum())):
                    ids = torch.tensor([prompt + batch.action[i, :t].tolist()])
                    logits = held.causal(input_ids=ids).logits[0, -1].detach()
                    h = signal_of(entropy_of(logits[None]), known, "signed", 1e-6)
                    scaled = logits / (1 + swing * float(h))
                    expected = float(scaled.log_softmax(0)[batch.action[i, t]])
                    assert float(batch.logp_behavior[i, t]) == pytest.approx(expected, abs=1e-10)
                    spread = max(spread, abs(float(h)))
            assert (batch.temperature == 1).all(), "training reads it at the base's temperature"
        mask = batch.mask.bool()
        # The policy that draws the next batch, and the range that the present one left.
        held.load_state_dict(policy.state_dict())
        saved = step.state.pieces["/range"]
        known = type(range_of(numbers(1.0), 0.5))(**saved)
        assert mask.any()
    assert spread > 0.3, "or nothing was tested"


def test_without_a_swing_the_sampler_is_unchanged_and_greedy_never_changes() -> None:
    policy = load_policy("nano", dtype="float64")
    prompts, seeds = [policy.encode("3 + 4 ="), policy.encode("a")], torch.arange(8)
    plain = policy.sampler.sample(prompts, 4, seeds, Sampling(8, 0.7))
    still = AdaptedPolicy(policy, lambda z: torch.ones(len(z), dtype=z.dtype))
    assert torch.equal(still.sample(prompts, 4, seeds, Sampling(8, 0.7)).tokens, plain.tokens)
    hot = AdaptedPolicy(
        AdaptedPolicy(policy, lambda z: torch.full((len(z),), 2.0)), lambda z: torch.full((len(z),), 3.0)
    )
    assert hot.encode("a") == policy.encode("a")
    got, want = (
        hot.sample(prompts, 4, seeds, Sampling(8, 0.5)),
        policy.sampler.sample(prompts, 4, seeds, Sampling(8, 3.0)),
    )
    assert torch.equal(got.tokens, want.tokens)
    assert torch.allclose(got.logp, want.logp)
    cold = Sampling(8, temperature=0)
    assert torch.equal(hot.sample(prompts, 1, None, cold).logp, policy.sampler.sample(prompts, 1, None, cold).logp)


# -- together ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expression", ["hapo+grpo", "hapo+dapo", "hapo+bapo", "hapo(token_credit=False)+bnpo"])
def test_it_stands_on_other_methods(expression: str) -> None:
    world = case("text", 0)
    steps = list(run(world.shrink(parse(expression)), world.environment, world.models, until=2, debug=True))
    assert all(math.isfinite(v) for s in steps for v in s.logs.values())


def test_two_credits_are_refused() -> None:
    with pytest.raises(MethodError, match="hapo and bnpo both swap 'credit'"):
        parse("hapo+bnpo")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sign": "minus"}, "Known: released, signed"),
        ({"entropy": "new"}, "Known: now, old"),
        ({"pivot": 1.5}, "pivot=1.5 must be in"),
        ({"swing": 1.0}, r"swing=1.0 must be in \[0, 1\)"),
        ({"bound": 1.5}, "strength=1.5 must be in"),
        ({"redistribute": -0.1}, "strength=-0.1 must be in"),
        ({"swing": None, "bound": None, "redistribute": None, "pivot": 0.5}, "would be ignored"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(MethodError, match=match):
        HAPO(**options)
