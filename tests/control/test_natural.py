"""NPG and TRPO: closed forms, the KL of the step, and steps that are not made."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.laws import checks
from trimtab.core.batch import Batch
from trimtab.core.closure import Closure
from trimtab.core.loop import run
from trimtab.core.method import Method, Track
from trimtab.core.piece import piece
from trimtab.core.registry import find
from trimtab.methods.cases import case
from trimtab.stages.annotate import logp_old
from trimtab.stages.natural import conjugate_gradient, distribution_old, kl_from_old, natural
from trimtab.stages.surrogate import pessimistic, surrogate, token_ratio


class Table(nn.Module):
    """`pi(a|s) = softmax(logits[s])`."""

    provides = frozenset({"logp", "distribution"})

    def __init__(self, states: int, actions: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(states, actions, dtype=torch.float64))

    def evaluate(self, batch: Batch, want: frozenset[str]) -> dict[str, Tensor]:
        every = self.logits.log_softmax(-1)[batch["obs"]]
        return {"logp": every.gather(-1, batch["action"][..., None])[..., 0], "distribution": every}

    def divergence(self, new: Tensor, old: Tensor) -> Tensor:
        return (new.exp() * (new - old)).sum(-1)


class Nothing:
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None: ...


ADVANTAGES = torch.tensor([[1.0, -1.0], [3.0, 0.0]], dtype=torch.float64)


@piece("collect", writes=("obs", "action", "advantage", "mask", "logp_behavior", "source"))
def every_pair(*, states: int = 1, size: float = 1.0) -> Batch:
    """Every action of every state once: the exact expectation under a uniform policy. A has mean 0 in each state."""
    advantage = ADVANTAGES[:states] - ADVANTAGES[:states].mean(1, keepdim=True)
    n = advantage.numel()
    return Batch(
        {
            "obs": torch.arange(states).repeat_interleave(2)[:, None],
            "action": torch.arange(2).repeat(states)[:, None],
            "advantage": size * advantage.reshape(n, 1),
            "mask": torch.ones(n, 1, dtype=torch.bool),
            "logp_behavior": torch.full((n, 1), math.log(0.5), dtype=torch.float64),
            "source": torch.zeros(n, dtype=torch.long),
        }
    )


def tabular(states: int = 1, size: float = 1.0, **options: Any) -> Method:
    losses = (surrogate(ratio=token_ratio(), shape=pessimistic()), kl_from_old())
    return Method(
        "tabular",
        pieces=(every_pair(states=states, size=size), logp_old(), distribution_old()),
        tracks=(Track("policy", trains="policy", pieces=losses, update=natural(damping=0.0, **options)),),
    )


@pytest.mark.parametrize("states", [1, 2])
def test_card_check_9_the_tabular_step_multiplies_odds(states: int) -> None:
    """`pi_new ~ pi exp(eta A / (1 - gamma))`: with A = (1, -1) and eta / (1 - gamma) = 0.1 the odds are e^0.2.

    The Fisher matrix is weighted by how often a state is visited and so is the gradient: the step is the same in each.
    """
    policy = Table(states, 2)
    next(run(tabular(states, lr=0.1), Nothing(), {"policy": policy}, until=1))
    probs = policy.logits.detach().softmax(-1)
    for s in range(states):
        gap = float(ADVANTAGES[s, 0] - ADVANTAGES[s, 1])
        assert float(probs[s, 0] / probs[s, 1]) == pytest.approx(math.exp(0.1 * gap), rel=1e-12)


def test_a_zero_gradient_makes_no_step() -> None:
    policy = Table(1, 2)
    step = next(run(tabular(size=0.0), Nothing(), {"policy": policy}, until=1))
    assert step.logs["step"] == 0
    assert bool((policy.logits == 0).all())


def kl_of_the_step(method: Method, world: str, seed: int) -> tuple[float, float, dict[str, Tensor], dict[str, Tensor]]:
    """(mean KL of the policy's step on its own batch, the step's share, parameters before and after)."""
    k = case(world, seed)
    method, models = k.shrink(method), k.models_of(method)
    before = checks.parameters({"policy": models["policy"]})
    step = next(run(method, k.environment, models, until=1, seed=seed))
    policy: Any = models["policy"]
    with torch.no_grad():
        now = policy.evaluate(step.batch, frozenset({"distribution"}))["distribution"]
        kl = float(policy.divergence(now, step.batch["distribution_old"]).mean())
    return kl, step.logs["policy/step"], before, checks.parameters({"policy": policy})


@pytest.mark.parametrize("world", ["steps", "choices"])
@pytest.mark.parametrize("max_kl", [1e-4, 0.05, 2.0])
def test_trpo_keeps_the_kl_or_the_parameters(world: str, max_kl: float) -> None:
    for seed in range(3):
        base = find("npg")(max_kl=max_kl, damping=1e-3)
        kl, share, before, after = kl_of_the_step(find("trpo")(base), world, seed)
        assert kl <= max_kl
        if share == 0:
            assert all(torch.equal(before[n], after[n]) for n in before)


def test_without_the_search_the_kl_is_only_about_right() -> None:
    base = find("npg")(max_kl=2.0, damping=1e-3)
    assert kl_of_the_step(base, "steps", 0)[0] != pytest.approx(2.0, rel=0.05)
    small = find("npg")(max_kl=1e-6, damping=0.1)
    assert 0 < kl_of_the_step(small, "steps", 0)[0] < 1.05e-6  # damping counts as KL, so it is less


def test_where_no_share_will_do_nothing_moves() -> None:
    never = find("trpo")(least=1e9)
    _, share, before, after = kl_of_the_step(never, "steps", 0)
    assert share == 0
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_the_search_shortens() -> None:
    base = find("npg")(max_kl=2.0, damping=1e-6)
    shares = [kl_of_the_step(find("trpo")(base, shrink=0.5), "steps", seed)[1] for seed in range(4)]
    assert any(0 < s < 1 for s in shares)


def test_conjugate_gradient_solves() -> None:
    g = torch.Generator().manual_seed(0)
    a = torch.randn(6, 6, generator=g, dtype=torch.float64)
    a = a @ a.t() + torch.eye(6, dtype=torch.float64)
    b = [torch.randn(2, generator=g, dtype=torch.float64), torch.randn(4, generator=g, dtype=torch.float64)]

    def product(v: list[Tensor]) -> list[Tensor]:
        return list((a @ torch.cat(v)).split([2, 4]))

    x = conjugate_gradient(product, b, 6, 0.0)
    assert float((a @ torch.cat(x) - torch.cat(b)).abs().max()) < 1e-10


@pytest.mark.parametrize("world", ["steps", "choices"])
def test_the_curvature_does_not_depend_on_memory(world: str) -> None:
    made = []
    for memory in (None, 4):
        k = case(world)
        method = find("trpo")(find("npg")(max_kl=0.02))
        models = k.models_of(method)
        next(run(k.shrink(method), k.environment, models, until=1, memory=memory))
        made.append(checks.parameters(models))
    for name, value in made[0].items():
        assert float((value - made[1][name]).abs().max()) < 1e-10


def test_the_fisher_product_is_the_hessian_of_the_kl() -> None:
    """Against a dense Hessian by autograd, of a policy with a state-independent deviation."""
    from trimtab.stages.natural import fisher_product

    k = case("steps", 3)
    method = k.shrink(find("npg")())
    models = k.models_of(method)
    found = {}

    def look(closure: Closure) -> None:
        if closure.track.name != "policy":
            return
        names = list(closure.params)
        sizes = [p.numel() for p in closure.params.values()]
        flat = torch.cat([p.detach().flatten() for p in closure.params.values()])

        class Divergence(nn.Module):
            def __init__(self, policy: Any) -> None:
                super().__init__()
                self.policy = policy

            def forward(self, batch: Batch) -> Tensor:
                now = self.policy.evaluate(batch, frozenset({"distribution"}))["distribution"]
                return self.policy.divergence(now, batch["distribution_old"]).mean()

        whole = Divergence(closure.model)

        def of(theta: Tensor) -> Tensor:
            parts = {f"policy.{n}": x.reshape(closure.params[n].shape) for n, x in zip(names, theta.split(sizes))}
            return torch.func.functional_call(whole, parts, (closure.batch,))

        v = torch.randn(len(flat), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        dense = torch.autograd.functional.hessian(of, flat) @ v
        ours = fisher_product(closure, 0.0)(
            [x.reshape(p.shape) for x, p in zip(v.split(sizes), closure.params.values())]
        )
        found["error"] = float((torch.cat([x.flatten() for x in ours]) - dense).abs().max())

    next(run(checks.observed(method, look), k.environment, models, until=1))
    assert found["error"] < 1e-10
