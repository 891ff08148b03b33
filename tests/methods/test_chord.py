"""CHORD: the numbers of its card, its weight and schedule, and its place among other methods."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.golden import test_golden, twins
from tests.spikes.bapo import bapo, toy_grpo
from tests.spikes.chord import chord, d3s, token_experts
from tests.spikes.tokens import case
from trimtab.core.batch import Batch
from trimtab.core.errors import MethodError
from trimtab.core.kit import Kit
from trimtab.core.loop import begin, run
from trimtab.core.method import Method
from trimtab.core.registry import find, parse
from trimtab.core.schedules import linear, warmup_cosine
from trimtab.core.state import Clock
from trimtab.core.terms import SOURCES
from trimtab.stages.expert import imitation


def mu_at(schedule: Any, turns: int) -> float:
    return float(schedule(Clock(turns=turns, updates=7 * turns)))


def test_mu_follows_the_card() -> None:
    falling, rising = (find("chord").presets[name]["mu"] for name in ("mu", "official_code"))
    for turn, value in ((0, 0.9), (50, 0.7755), (100, 0.475), (150, 0.1745), (200, 0.05), (400, 0.05)):
        assert mu_at(falling, turn) == pytest.approx(value, abs=1e-4)
    for turn, value in ((0, 0.0), (100, 0.25), (200, 0.5), (400, 0.26), (600, 0.02)):
        assert mu_at(rising, turn) == pytest.approx(value, abs=1e-12)
    assert mu_at(warmup_cosine(0, 0, 0.9, 0.05, by="turns"), 0) == 0.05, "no decay: the valley at once"
    assert mu_at(warmup_cosine(2, 0, 0.9, 0.05, by="turns"), 1) == 0.45


def terms(logp: torch.Tensor, **options: Any) -> dict[str, torch.Tensor]:
    """The values of the imitation loss's terms on one expert row with these log-probabilities."""
    method = chord(toy_grpo())
    environment, models = case(0)
    kit = Kit(begin(method, environment, models), method, None, False)
    batch = Batch({"mask": torch.ones_like(logp, dtype=torch.bool)})
    return {t.name: t.value for t in imitation(**options)(kit, batch, {"logp": logp})}


def slope(p: float, **options: Any) -> float:
    """d loss / d log p of a token of this probability."""
    logp = torch.tensor([[math.log(p)]], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(terms(logp, mu=1.0, **options)["imitation"].sum(), logp)
    return float(grad)


def test_phi_is_a_constant_and_largest_at_a_half() -> None:
    for p in (0.1, 1 / 3, 0.5, 0.9):
        assert slope(p) == pytest.approx(-p * (1 - p), abs=1e-12), "not the derivative of p (1 - p) log p"
        assert slope(p, weight="none") == pytest.approx(-1.0)
        assert slope(p, weight="probability") == pytest.approx(-p, abs=1e-12)
    assert -slope(0.5) == pytest.approx(0.25)
    by_logit = [(p / 1000, p / 1000 * (1 - p / 1000) ** 2) for p in range(1, 1000)]
    assert max(by_logit, key=lambda x: x[1])[0] == pytest.approx(1 / 3, abs=1e-3)
    assert -slope(1 / 3) * (1 - 1 / 3) == pytest.approx(4 / 27)


def test_the_importance_sampled_weight_has_the_gradient_of_the_probability() -> None:
    logits = torch.tensor([0.3, -0.2, 1.0], dtype=torch.float64, requires_grad=True)
    logp = logits.log_softmax(0)[:1][None]
    (ours,) = torch.autograd.grad(terms(logp, mu=1.0, weight="probability")["imitation"].sum(), logits)
    (theirs,) = torch.autograd.grad(-logits.softmax(0)[0], logits)
    assert torch.allclose(ours, theirs, atol=1e-12)


def test_certain_and_impossible_tokens_have_no_gradient_and_a_cutoff_adds_others() -> None:
    logp = torch.tensor([[-40.0, 0.0]], dtype=torch.float64, requires_grad=True)
    made = terms(logp, mu=1.0)
    (grad,) = torch.autograd.grad(made["imitation"].sum(), logp)
    assert grad.abs().max() < 1e-15
    assert bool(torch.isfinite(made["imitation"]).all())
    assert slope(0.8, cutoff=0.7) == 0
    assert slope(0.6, cutoff=0.7) == pytest.approx(-0.24)


def moved(method: Method, seed: int = 0) -> tuple[torch.Tensor, Any]:
    environment, models = case(seed)
    start = models["policy"].state_dict()["logits"].clone()
    step = next(run(method, environment, models, until=4, seed=seed))
    return models["policy"].state_dict()["logits"] - start, step


def test_without_mu_the_demonstrations_change_nothing() -> None:
    base = test_golden.toy(find("grpo")())
    ours, step = moved(chord(base, mu=0.0, share=0.5))
    assert int((step.batch.source == 1).sum()) == int((step.batch.source == 0).sum())
    assert torch.equal(ours, moved(base)[0])


def test_with_mu_one_only_demonstrations_are_learned_by_their_mean() -> None:
    base = test_golden.toy(find("grpo")())
    ours, step = moved(chord(base, mu=1.0, weight="none"))
    _, models = case(0)
    start = models["policy"].state_dict()["logits"].clone()
    assert torch.allclose(ours, twins.sft(step.batch, start) - start, atol=1e-12)


@pytest.mark.parametrize("seed", [0, 1])
def test_mu_and_the_weight_agree_with_the_twin(seed: int) -> None:
    base = test_golden.toy(test_golden.stale())
    method = chord(base, mu=0.4, weight="none")
    test_golden.agree("chord", method, lambda batch, start: twins.grpo(batch, start, mu=0.4, phi=False), seed)


def test_one_kind_of_rows_alone_still_has_its_factor() -> None:
    """An update of policy rows alone is (1 - mu) times the base's; one of demonstrations alone is finite."""
    base = test_golden.toy(find("grpo")())
    alone, _ = moved(chord(base, mu=0.25, share=0.0))
    assert torch.allclose(alone, 0.75 * moved(base)[0], atol=1e-14)
    environment, models = case(0)
    rows = chord(base.but(rows=2), mu=0.25, share=0.5).set("collect.prompts", 2).set("collect.group", 2)
    steps = list(run(rows, environment, models, until=4))
    assert all(math.isfinite(v) for s in steps for v in s.logs.values())


def test_twice_the_same_demonstrations_are_the_same_mean() -> None:
    """Means, not sums: doubling the expert rows of a batch leaves the update as it is."""
    from dataclasses import replace

    once = chord(test_golden.toy(find("grpo")()), mu=0.5)
    part = once.get("collect.source")
    twice = once.swap("collect.source", replace(part, fn=lambda kit, n: Batch.cat([part.fn(kit, n)] * 2)))
    assert torch.allclose(moved(once)[0], moved(twice)[0], atol=1e-14)


def test_demonstrations_are_no_decisions_and_have_no_group_reward_or_credit() -> None:
    _, step = moved(chord(toy_grpo()))
    expert = step.batch.source == SOURCES.index("expert")
    assert step.state.clock.decisions == int(step.batch.mask[~expert].sum())
    assert float(step.batch.advantage[expert].abs().max()) == 0
    assert bool((step.batch.group[expert] == -1).all())
    assert bool(step.batch.reward[expert].isnan().all()), "never collected must not look like a number"


def test_every_loss_of_the_base_is_scaled() -> None:
    method = find("chord")(find("grpo")(kl=0.1), mu=0.3)
    assert {"scaled(surrogate)", "scaled(kl)"} <= method.flatten().keys()


def test_the_place_in_an_expression_decides_what_wraps_what() -> None:
    """`chord+remix` shows demonstrations beside fresh and replayed rows; in `remix+chord` the replay keeps them out."""
    for expression, outer in (("chord+remix", "with_experts"), ("remix+chord", "replayed")):
        collect = parse(expression).phases[0].method.get("collect")
        assert collect.name == outer
    assert parse("chord+dapo").get("collect").inner.name == "dynamic_sampling"


def test_chord_d3s_bapo_is_one_method_that_trains() -> None:
    method = parse("chord+d3s+bapo")
    assert method.name == "chord+d3s+bapo"
    collect, select, bound = (method.get(a).name for a in ("collect", "down_sample", "surrogate.bound"))
    assert (collect, select, bound) == ("with_experts", "down_sample", "balanced")
    environment, models = case(0)
    toy = chord(d3s(bapo(toy_grpo())), mu=linear(0.5, 0.1))
    steps = list(run(toy, environment, models, until=5, debug=True))
    assert all(math.isfinite(v) for s in steps for v in s.logs.values())
    assert {"imitation", "bound_high", "kept_rows", "mu"} <= steps[0].logs.keys()
    expert = steps[-1].batch.source == 1
    assert bool(steps[-1].batch.keep[expert].any(1).all()), "down-sampling is for the policy's own rows"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"mu": 1.5}, r"mu=1\.5 must be in \[0, 1\]"),
        ({"mu": -0.1}, "mu=-0.1 must be"),
        ({"share": 1.0}, r"share=1\.0 must be in \[0, 1\)"),
        ({"weight": "psi"}, "Known: none, phi, probability"),
        ({"cutoff": 0.0}, r"cutoff=0\.0 must be in \(0, 1\]"),
        ({"cutoff": 0.5, "weight": "none"}, "would ignore it"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(MethodError, match=match):
        find("chord")(**options)


def test_a_schedule_that_leaves_its_range_stops_the_run() -> None:
    environment, models = case(0)
    with pytest.raises(MethodError, match=r"mu=1\.[0-9]+ at update .* must be in \[0, 1\]"):
        list(run(chord(toy_grpo(), mu=linear(0.5, 2.0)), environment, models, until=4))


def test_token_experts_need_nothing_of_text() -> None:
    assert chord(toy_grpo()).get("collect.source") == token_experts()
