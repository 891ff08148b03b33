"""The bases: the shared numeric checks of their card, their presets, and what they do with bad data."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.test_core_faults import credited, scored, spoiled
from tests.golden import test_golden, twins
from tests.spikes.tokens import case, token_pairs, token_rollouts
from trimtab.core.batch import Batch
from trimtab.core.errors import EnvironmentFailure, MethodError
from trimtab.core.kit import Kit
from trimtab.core.loop import begin, run
from trimtab.core.method import Method
from trimtab.core.piece import Piece, piece
from trimtab.core.registry import find, methods, parse
from trimtab.core.terms import fixed
from trimtab.environments.text import load_environment
from trimtab.methods.cases import case as small_case
from trimtab.stages.credit import group_mean, group_normalised, group_rescaled, leave_one_out, overlong
from trimtab.stages.surrogate import clip, pessimistic, sequence_ratio, token_ratio
from trimtab.stages.terms import kl_penalty, preference


def called(p: Piece, *args: Any) -> Any:
    environment, models = case(0)
    method = find("grpo")()
    return p(Kit(begin(method, environment, models), method, None, False), *args)


def ratios(*values: float) -> tuple[Batch, dict[str, torch.Tensor]]:
    """One row whose tokens have these ratios."""
    r = torch.tensor([values], dtype=torch.float64)
    mask = torch.ones_like(r, dtype=torch.bool)
    return Batch({"logp_old": torch.zeros_like(r), "mask": mask}), {"logp": r.log()}


# -- credit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rewards", "mean", "loo", "unbiased", "population"),
    [
        ([1, 0, 0, 1], 0.5, 2 / 3, 0.866025, 1.0),
        ([1, 0, 0, 0], 0.75, 1.0, 1.5, 1.732051),
        ([3, 3, 3, 3], 0.0, 0.0, 0.0, 0.0),
    ],
)
def test_the_table_of_advantages(
    rewards: list[float], mean: float, loo: float, unbiased: float, population: float
) -> None:
    batch = scored([float(r) for r in rewards], [0] * 4)
    normal = group_normalised
    for p, expected in ((group_mean(), mean), (leave_one_out(), loo), (normal(eps=0.0), unbiased),
                        (normal(eps=0.0, ddof=0), population)):  # fmt: skip
        a = credited(p, batch)[:, 0]
        assert a[0].item() == pytest.approx(expected, abs=1e-6)
        assert a.sum().item() == pytest.approx(0, abs=1e-12)


def test_grpo_forgets_the_scale_of_rewards_and_the_others_follow_it() -> None:
    a, b = scored([1.0, 0.0, 0.5, 0.2], [0] * 4), scored([8.0, 5.0, 6.5, 5.6], [0] * 4)
    assert torch.allclose(credited(group_normalised(eps=0.0), a), credited(group_normalised(eps=0.0), b))
    for p in (group_mean(), leave_one_out(), group_normalised(scale="none")):
        assert torch.allclose(3 * credited(p, a), credited(p, b))


def test_gpg_rescales_by_valid_rows_or_by_rewards() -> None:
    batch = scored([1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0], [0] * 4 + [1] * 4)
    assert credited(group_rescaled("valid"), batch)[:, 0].tolist() == [1, -1, -1, 1, 0, 0, 0, 0]
    assert credited(group_rescaled("nonzero"), batch)[:, 0].tolist() == [2, -2, -2, 2, 0, 0, 0, 0]
    nothing = scored([0.0] * 4, [0] * 4)
    assert credited(group_rescaled("valid"), nothing).abs().max() == 0
    assert credited(group_rescaled("nonzero"), nothing).abs().max() == 0


@pytest.mark.parametrize(("length", "price"), [(16, 0), (17, -0.25), (18, -0.5), (20, -1)])
def test_overlong_punishment_of_the_card(length: int, price: float) -> None:
    mask = torch.zeros(2, 20, dtype=torch.bool)
    mask[0, :length], mask[1, :4] = True, True
    batch = Batch({"mask": mask, "reward": torch.zeros(2, 20).double(), "group": torch.tensor([0, 0])})
    seen = []

    @piece("credit", writes=("advantage",))
    def look(batch: Batch) -> Batch:
        seen.append(batch.score())
        return batch.put(advantage=batch.reward)

    made = called(overlong(inner=look(), buffer=0.2, penalty=1.0, limit=20), batch)
    assert seen[0].tolist() == pytest.approx([price, 0.0])
    assert made.reward.abs().max() == 0, "the reward column stays as the environment gave it"


# -- ratio and shape ---------------------------------------------------------------------------------------------


def test_the_sequence_ratio_is_the_geometric_mean() -> None:
    batch, now = ratios(1.2, 1 / 1.2, 1.1)
    assert called(sequence_ratio(), batch, now).tolist() == [[pytest.approx(1.032280, abs=1e-6)] * 3]
    assert called(sequence_ratio(mean=False), batch, now).tolist() == [[pytest.approx(1.1)] * 3]
    one, now = ratios(1.3)
    assert torch.equal(called(sequence_ratio(), one, now), called(token_ratio(), one, now)), "|y| = 1 is grpo's ratio"


def test_a_sequence_of_one_token_makes_gspo_grpo() -> None:
    ends = []
    for name in ("gspo", "grpo"):
        environment, models = case(0)
        environment.length = 1
        method = test_golden.toy(find(name)(find("grpo")(passes=3)) if name == "gspo" else find("grpo")(passes=3))
        method = method.wrap("collect", shortened()).set("surrogate.bound.low", 0.1)
        method = method.set("surrogate.bound.high", 0.1)
        if name == "grpo":
            method = method.swap("surrogate.per", "row")
        for _ in run(method, environment, models, until=4):
            pass
        ends.append(models["policy"].state_dict()["logits"])
    assert torch.allclose(*ends, atol=1e-12)


@piece("collect", writes=("mask", "action", "reward", "logp_behavior"))
def shortened(kit: Kit, *, inner: Any) -> Batch:
    rows: Batch = inner()
    first = torch.arange(rows.mask.shape[1]) == 0
    reward = (rows.action[:, 0] % 2 == 0).double()
    return rows.put(mask=rows.mask & first, reward=reward[:, None] * first, action=rows.action * first)


@pytest.mark.parametrize("a", [1.0, -1.0])
def test_which_decisions_a_bound_holds(a: float) -> None:
    """A >= 0: active iff r <= 1 + high. A < 0: active iff r >= 1 - low, and r < dual."""
    for r in (0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 2.9, 3.1):
        logp = torch.tensor([[math.log(r)]], dtype=torch.float64, requires_grad=True)
        batch = Batch({"logp_old": torch.zeros(1, 1).double(), "mask": torch.ones(1, 1).bool()})
        ratio = called(token_ratio(), batch, {"logp": logp})
        bound = called(clip(), batch, {}, ratio)
        advantage = torch.full((1, 1), a, dtype=torch.float64)
        value = called(pessimistic(dual=3.0), batch, {}, advantage, ratio, bound)
        (grad,) = torch.autograd.grad(value.sum(), logp)
        active = r <= 1.2 if a > 0 else 0.8 <= r < 3.0
        assert grad.item() == pytest.approx(-a * r if active else 0.0)
        assert value.item() == pytest.approx(-min(r * a, min(max(r, 0.8), 1.2) * a) if a > 0 else min(max(r, 0.8), 3.0))


def test_the_kl_estimators_of_the_card() -> None:
    batch = Batch({"logp_ref": torch.tensor([[-1.5]]).double(), "mask": torch.ones(1, 1).bool()})
    for name, value in (("k1", 0.5), ("k2", 0.125), ("k3", 0.106531)):
        term, _ = called(kl_penalty(1.0, name), batch, {"logp": torch.tensor([[-1.0]]).double()})
        assert term.value.item() == pytest.approx(value, abs=1e-6)


def test_responses_of_equal_lengths_make_all_reductions_proportional() -> None:
    """token == row == Dr. GRPO x L_max / L == token sum / L, at ratio 1."""

    @piece("collect", writes=("mask",))
    def full(kit: Kit, *, inner: Any) -> Batch:
        rows: Batch = inner()
        return rows.put(mask=torch.ones_like(rows.mask))

    moved = {}
    for per in ("token", "row", fixed(16.0), fixed(16.0, mean=False), "row_sum"):
        environment, models = case(0)
        start = models["policy"].state_dict()["logits"].clone()
        method = test_golden.toy(find("grpo")(), token_rollouts(prompts=3, group=6)).swap("surrogate.per", per)
        for _ in run(method.wrap("collect", full()), environment, models, until=1):
            pass
        moved[per] = models["policy"].state_dict()["logits"] - start
    token = moved["token"]
    assert float(token.abs().max()) > 1e-3
    for per, factor in (("row", 1.0), (fixed(16.0), 4 / 16), (fixed(16.0, mean=False), 18 * 4 / 16), ("row_sum", 4.0)):
        assert torch.allclose(moved[per], factor * token, atol=1e-12), per


# -- presets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "preset"), [(d.name, p) for d in methods().values() for p in d.presets])
def test_every_preset_builds_and_every_option_of_it_exists(name: str, preset: str) -> None:
    definition = find(name)
    assert definition.presets[preset].keys() <= definition.parameters.keys()
    assert parse(f"{name}(preset={preset!r})").name == name


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("method", "twin", "options"),
    [
        (lambda: find("gpg")(preset="verl"), twins.gpg, {"kind": "nonzero"}),
        (lambda: find("grpo")(preset="verl", eps=1e-4, passes=twins.PASSES), twins.grpo, {"dual": 3.0}),
    ],
    ids=["gpg-verl", "grpo-verl"],
)
def test_presets_agree_with_their_twins(
    method: Callable[[], Method], twin: Callable[..., Any], options: dict[str, Any], seed: int
) -> None:
    test_golden.agree("preset", test_golden.toy(method()), twin, seed, **options)


def test_rloo_as_trl_has_it_agrees_with_its_twin_away_from_the_reference() -> None:
    environment, models = case(2)
    method = test_golden.toy(find("rloo")(preset="trl", passes=twins.PASSES, kl=0.5))
    reference = models["policy"].state_dict()["logits"].clone()
    loop, drift = run(method, environment, models, until=4), []
    for _ in range(4):
        start = models["policy"].state_dict()["logits"].clone()
        step = next(loop)
        expected = twins.rloo_trl(step.batch, start, reference, 0.5)
        assert float((models["policy"].state_dict()["logits"] - expected).abs().max()) < 1e-12
        drift.append(step.logs["kl"])
    assert drift[0] == 0
    assert drift[-1] != 0


@pytest.mark.parametrize("options", [{"shape": "hinge"}, {"shape": "ipo"}, {"smoothing": 0.1}, {"beta": 2.0}])
def test_dpo_options_agree_with_the_twin(options: dict[str, Any]) -> None:
    test_golden.agree("dpo", test_golden.toy(find("dpo")(**options), token_pairs()), twins.dpo, 3, **options)


# -- DPO ---------------------------------------------------------------------------------------------------------


def pair_of(delta: float) -> tuple[Batch, dict[str, torch.Tensor]]:
    mask = torch.ones(2, 1, dtype=torch.bool)
    ids = {"pair": torch.tensor([3, 3]), "preferred": torch.tensor([True, False])}
    logp = torch.tensor([[delta - 1.0], [-1.0]], dtype=torch.float64, requires_grad=True)
    return Batch({"mask": mask, "logp_ref": torch.full((2, 1), -1.0).double(), **ids}), {"logp": logp}


def test_dpo_numbers_of_the_card() -> None:
    for delta, loss in ((0.0, math.log(2)), (2.0, 0.598139)):
        batch, now = pair_of(delta)
        terms = {t.name: t for t in called(preference(), batch, now)}
        assert terms["preference"].value.tolist() == pytest.approx([loss, loss], abs=1e-6)
        assert terms["margin"].value.tolist() == pytest.approx([0.1 * delta] * 2)
        (grad,) = torch.autograd.grad(terms["preference"].value.mean(), now["logp"])
        if not delta:
            assert grad.flatten().tolist() == pytest.approx([-0.05, 0.05]), "weight beta / 2 at the reference"


def test_dpo_learns_to_prefer_and_says_so() -> None:
    environment, models = case(0)
    logs = [s.logs for s in run(test_golden.toy(find("dpo")(beta=1.0), token_pairs()), environment, models, until=40)]
    assert logs[0]["preference"] == pytest.approx(math.log(2))
    assert logs[-1]["preferred_right"] > 0.9
    assert logs[-1]["margin"] > 1
    assert logs[-1]["preference"] < logs[0]["preference"] / 2


def test_online_pairs_are_the_best_and_the_worst_of_each_group() -> None:
    small = small_case("text", 0)
    method = small.shrink(find("dpo")(preset="online")).set("collect.prompts", 6)
    step = next(run(method, small.environment, small.models, until=3))
    batch = step.batch
    assert len(batch) == 2 * step.logs["pairs"] > 0
    score = batch.score()
    assert score[batch.preferred].tolist() == [1.0] * (len(batch) // 2)
    assert score[~batch.preferred].tolist() == [0.0] * (len(batch) // 2)
    assert step.state.clock.decisions > int(batch.mask.sum()), "decisions that were left out were made all the same"
    equal = spoiled(inner=method.get("collect").core, how="equal")
    with pytest.raises(EnvironmentFailure, match="none is preferred"):
        next(run(replace(method, explicit=()).swap("collect", equal), small.environment, small.models, until=1))


def test_preference_files_are_read_and_faults_in_them_named(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": f"{a}+1=", "chosen": str(a + 1), "rejected": [{"role": "assistant", "content": "no"}]}
        for a in range(8)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    environment = load_environment(str(path), holdout=0.0)
    drawn = environment.preferences(8)
    assert {(p.question, good, bad) for p, good, bad in drawn} == {(f"{a}+1=", str(a + 1), "no") for a in range(8)}
    assert all(p.answer == good for p, good, _ in drawn), "what was chosen is the reference answer"
    del rows[3]["rejected"]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(EnvironmentFailure, match=r"Line 4 of .*pairs.jsonl has no response 'rejected'"):
        load_environment(str(path), holdout=0.0).preferences(8)


# -- DAPO --------------------------------------------------------------------------------------------------------


def dapo(**options: Any) -> Method:
    return test_golden.toy(find("dapo")(**options)).set("credit.limit", 4)


def test_dynamic_sampling_keeps_live_groups_and_counts_every_decision() -> None:
    environment, models = case(0)
    for step in run(dapo(), environment, models, until=12):
        groups = step.batch.by("group")
        assert groups.size <= 3
        if step.logs["live_groups"] == 3:
            assert groups.size == 3
            assert not bool(groups.same(step.batch.score()).any())
    assert step.state.clock.decisions > step.state.clock.rows
    generated = [s.logs["generated_batches"] for s in run(dapo(), *case(1), until=12)]
    assert max(generated) > 1


def test_dynamic_sampling_when_nothing_differs() -> None:
    def dead(**options: Any) -> Method:
        method = dapo(batches=3, **options)
        return method.swap("collect", spoiled(inner=method.get("collect").core, how="equal"))

    environment, models = case(0)
    step = next(run(dead(), environment, models, until=1))
    assert step.logs["generated_batches"] == 3
    assert step.logs["live_groups"] == 0
    assert step.state.clock.decisions > 2 * int(step.batch.mask.sum()), "three batches were made"
    with pytest.raises(EnvironmentFailure, match="3 batches gave 0 groups whose rewards differ, and an update needs 3"):
        next(run(dead(strict=True), *case(0), until=1))


def test_truncated_responses_can_be_left_out() -> None:
    small = small_case("text", 0)
    method = small.shrink(find("dapo")(filter_truncated=True))
    step = next(run(method, small.environment, small.models, until=1))
    cut = step.batch.truncated
    assert bool(cut.any())
    assert not bool(step.batch.keep[cut].any())
    assert torch.equal(step.batch.keep[~cut], step.batch.mask[~cut])


def test_methods_that_claim_one_slot_refuse_and_the_others_compose() -> None:
    with pytest.raises(MethodError, match=r"bapo and dapo both swap 'surrogate\.bound'"):
        parse("bapo+dapo")
    with pytest.raises(MethodError, match="both swap 'credit'"):
        parse("bnpo+dr_grpo")
    for expression in ("bnpo(lower=-0.5)+dapo", "bnpo+gspo", "bapo+dr_grpo", "bnpo+bapo", "gspo+grpo(preset='verl')"):
        assert parse(expression).tracks


@pytest.mark.parametrize(
    ("expression", "match"),
    [
        ("rloo(ratio='tokens')", "Did you mean 'token'"),
        ("gpg(alpha='all')", "Known: none, nonzero, valid"),
        ("dapo(buffer=2.0)", "share of the longest response"),
        ("dapo(batches=-1)", "at least 0"),
        ("dpo(source='file')", "'data' or from 'rollouts'"),
        ("dpo(shape='log')", "Known: hinge, ipo, sigmoid"),
        ("dpo(shape='ipo', smoothing=0.1)", "would ignore it"),
        ("dpo(beta=0.0)", "above 0"),
        ("grpo(dual=0.5)", "above 1"),
        ("dr_grpo(length=0.0)", "positive number"),
    ],
)
def test_impossible_options_are_refused(expression: str, match: str) -> None:
    with pytest.raises(MethodError, match=match):
        parse(expression)
