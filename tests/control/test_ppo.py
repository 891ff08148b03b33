"""PPO and A2C: the card's exact checks, and what composes over them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.laws import checks
from tests.laws.table import Entry
from trimtab.core.batch import Batch
from trimtab.core.closure import Closure
from trimtab.core.errors import MethodError
from trimtab.core.loop import run
from trimtab.core.method import Method, diff
from trimtab.core.registry import find, parse
from trimtab.core.schedules import linear
from trimtab.methods.cases import case
from trimtab.stages.surrogate import clip, pessimistic, surrogate, token_ratio
from trimtab.stages.terms import approx_kl, value_error


def gradient_of(advantage: float, ratio: float) -> float:
    """d loss / d logp of one decision whose ratio is `ratio`."""
    logp = torch.tensor([[ratio]], dtype=torch.float64).log().requires_grad_()
    zero = torch.zeros(1, 1, dtype=torch.float64)
    mask = torch.ones(1, 1, dtype=torch.bool)
    rows = Batch({"advantage": zero + advantage, "logp_old": zero, "logp_behavior": zero, "mask": mask})
    piece = surrogate(ratio=token_ratio(), bound=clip(0.2, 0.2), shape=pessimistic())

    class NoKit:
        debug = False

        def of(self, piece: Any) -> Any:
            return self

    terms = piece(NoKit(), rows, {"logp": logp})
    (grad,) = torch.autograd.grad(terms[0].value.sum(), logp)
    return float(grad)


@pytest.mark.parametrize(
    ("advantage", "ratio", "kept"), [(1, 1.3, False), (1, 0.7, True), (-1, 1.3, True), (-1, 0.7, False)]
)
def test_card_check_3_which_side_is_clipped(advantage: float, ratio: float, kept: bool) -> None:
    assert gradient_of(advantage, ratio) == pytest.approx(-advantage * ratio if kept else 0.0, abs=1e-12)


def test_card_check_3_the_first_minibatch_has_the_gradient_of_a2c() -> None:
    """rho = 1 there, so PPO's policy gradient is A2C's with the same (normalised) advantages."""
    seen: dict[str, dict[str, Tensor]] = {}

    def look(name: str) -> Any:
        def at(closure: Closure) -> None:
            if name not in seen:
                seen[name] = closure().grads

        return at

    shared = {"horizon": 6, "gamma": 0.9, "lam": 0.8, "value_coef": 0.3}
    ours = find("ppo")(rows=None, passes=1, normalise_obs=False, scale_reward=False, normalise_advantage=False,
                       value_clip=None, **shared)  # fmt: skip
    for name, method in (("ppo", ours), ("a2c", find("a2c")(**shared))):
        k = case("steps", 1)
        made = checks.observed(method, look(name))
        next(run(made, k.environment, k.models_of(method), until=1, seed=1))
    for key, grad in seen["a2c"].items():
        assert float((grad - seen["ppo"][key]).abs().max()) < 1e-12, key


@pytest.mark.parametrize(("target", "expected", "gradient"), [(1.0, 0.64, 0.0), (-1.0, 2.25, 3.0)])
def test_card_check_4_value_clipping(target: float, expected: float, gradient: float) -> None:
    """V_old = 0, V = 0.5, clip 0.2."""
    v = torch.tensor([[0.5]], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, 1, dtype=torch.float64)
    rows = Batch({"value": zero, "value_target": zero + target, "mask": torch.ones(1, 1, dtype=torch.bool)})
    term = value_error(coef=1.0, clip=0.2).fn(rows, {"value": v}, coef=1.0, clip=0.2)
    assert float(term.value.detach()) == pytest.approx(expected, abs=1e-12)
    (grad,) = torch.autograd.grad(term.value.sum(), v)
    assert float(grad) == pytest.approx(gradient, abs=1e-12)


def test_approx_kl_is_k3() -> None:
    logp = torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    rows = Batch({"logp_old": torch.zeros_like(logp), "mask": torch.ones(1, 2, dtype=torch.bool)})
    value = approx_kl().fn(rows, {"logp": logp}).value
    assert value.tolist() == [pytest.approx([r.exp().item() - 1 - r.item() for r in logp[0]], abs=1e-12)]


def small(method: Method, name: str = "steps") -> tuple[Method, Any, Any]:
    k = case(name)
    return k.shrink(method), k.environment, k.models_of(method)


def test_target_kl_leaves_the_batch_before_the_step() -> None:
    method, environment, models = small(find("ppo")(target_kl=1e-12))
    before = checks.parameters(models)
    steps = list(run(method, environment, models, until=1))
    # The first minibatch is at the old parameters, where the estimate is exactly 0: one step, then the second stops.
    assert steps[0].state.clock.updates == 2
    assert steps[0].logs["stopped"] == 0.5
    moved = checks.parameters(models)
    assert any(not torch.equal(before[n], moved[n]) for n in before)
    wide, environment, models = small(find("ppo")(target_kl=1e6))
    assert next(run(wide, environment, models, until=1)).state.clock.updates == 6


def test_the_rate_stands_still_within_a_batch_and_falls_to_zero() -> None:
    method, environment, models = small(find("ppo")(lr=linear(1e-2, 0.0)))
    rates = [step.logs["lr"] for step in run(method.set("update.lr", linear(1e-2, 0.0)), environment, models, until=4)]
    assert rates == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3], rel=1e-12)


def test_presets_are_the_numbers_of_their_libraries() -> None:
    sb3 = find("ppo")(preset="sb3").flatten()
    assert (sb3["update.lr"], sb3["update.eps"], sb3["value.coef"], sb3["value.clip"]) == (3e-4, 1e-5, 0.5, None)
    assert (sb3["rows"], sb3["passes"], sb3["collect.horizon"], sb3["credit.truncation"]) == (64, 10, 2048, "bootstrap")
    assert "act" not in {p.stage for _, _, p in find("ppo")(preset="sb3").places()}
    cleanrl = find("ppo")(preset="cleanrl").flatten()
    assert (cleanrl["credit.truncation"], cleanrl["value.clip"], cleanrl["value.coef"]) == ("done", 0.2, 0.25)
    discrete = find("ppo")(preset="cleanrl_discrete").flatten()
    assert (discrete["rows"], discrete["passes"], discrete["entropy.coef"]) == (128, 4, 0.01)


# -- what composes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expression", ["bapo+ppo", "gspo+ppo", "d3s+ppo", "d3s+bapo+ppo"])
@pytest.mark.parametrize("world", ["steps", "choices"])
def test_methods_of_the_language_world_compose_over_ppo(expression: str, world: str, tmp_path: Any) -> None:
    """A torque is a decision: the surrogate is the same pieces in both worlds, and so the laws hold here too."""

    def build() -> Method:
        return case(world).shrink(parse(expression))

    def make(seed: int) -> Any:
        k = case(world, seed)
        return k.environment, k.models_of(build())

    entry = Entry(f"{expression} on {world}", build, make)
    checks.check_invariance(entry)
    checks.check_resume_here(entry, tmp_path)
    environment, models = make(0)
    before = checks.parameters(models)
    assert len(list(run(build(), environment, models, until=2, debug=True))) == 2
    after = checks.parameters(models)
    assert all(not torch.equal(before[n], after[n]) for n in before if n.endswith("weight"))


def test_bapo_searches_its_bounds_over_torques() -> None:
    assert {path for path, _, _ in diff(find("ppo")(), parse("bapo+ppo"))} >= {"surrogate.bound"}
    method, environment, models = small(parse("bapo(target=0.9)+ppo"))
    logs = next(run(method, environment, models, until=1)).logs
    assert logs["bound_high"] == pytest.approx(3.0)  # the share is out of reach, so both bounds go all the way
    assert logs["bound_low"] == pytest.approx(0.9)


@pytest.mark.parametrize(("expression", "words"), [("bnpo+ppo", "group"), ("bapo+a2c", "score_function")])
def test_what_does_not_compose_is_refused_before_the_first_step(expression: str, words: str) -> None:
    def begun() -> None:
        method, environment, models = small(parse(expression))
        next(run(method, environment, models, until=1))

    with pytest.raises(MethodError, match=words):
        begun()


def test_an_unread_option_is_refused() -> None:
    with pytest.raises(MethodError, match="has no option"):
        find("ppo")(clip_range=0.1)
