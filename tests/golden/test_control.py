"""Law 7 for the on-policy control methods: one turn against the literal twin, in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.golden import control_twins as twins
from trimtab.core.batch import Batch
from trimtab.core.loop import run
from trimtab.core.method import Method
from trimtab.core.registry import find
from trimtab.environments.toy import PointEnvironment
from trimtab.methods.cases import case
from trimtab.policies.networks import build_networks
from trimtab.stages.steps import episodes

torch.set_num_threads(1)

PLAIN = {"normalise_obs": False, "scale_reward": False}


def built(method: Method, seed: int, **sizes: Any) -> tuple[Any, Any]:
    environment = PointEnvironment(seed=seed)
    networks = {name: replace(n, hidden=(3,)) for name, n in method.networks.items()}
    models = build_networks(method.but(networks=networks), environment, seed, dtype=torch.float64)
    with torch.no_grad():  # a policy that does something: its last layer starts almost at zero
        for model in models.values():
            for p in model.parameters():
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed), dtype=p.dtype))
    return environment, models


def params(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def table(batch: Batch, n: int) -> Batch:
    """The `[N, T]` columns of a batch that was made flat, as they were collected."""
    names = ("obs", "action", "next_obs", "reward", "terminated", "truncated", "mask")
    return Batch({k: batch[k][:, 0].reshape(n, -1, *batch[k].shape[2:]) for k in names})


def agree(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], start: dict[str, torch.Tensor],
          tolerance: float = 1e-12) -> None:  # fmt: skip
    error = max(float((got[n] - expected[n]).abs().max()) for n in got)
    moved = max(float((expected[n] - start[n]).abs().max()) for n in got)
    assert error < tolerance, f"off its twin by {error:.2e}"
    assert moved > 1e-4, "it did not move, so nothing was compared"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a2c_agrees_with_its_twin_over_two_turns(seed: int) -> None:
    method = find("a2c")(horizon=6, lr=1e-2, lam=0.9, entropy_coef=0.02)
    environment, models = built(method, seed)
    optimizer, before = twins.RMSprop(1e-2), params(models["policy"])
    ended = 0
    for _, step in zip(range(2), run(method, environment, models, until=2, seed=seed)):
        batch = table(step.batch, 3)
        ended += int(batch.truncated.sum()) + int(batch.terminated.sum())
        expected = twins.a2c(batch, before, optimizer, lam=0.9, entropy_coef=0.02)
        agree(params(models["policy"]), expected, before)
        before = params(models["policy"])
    assert ended, "no episode ended, so no end was compared"


@pytest.mark.parametrize("options", [{}, {"value_clip": None, "value_coef": 0.5, "entropy_coef": 0.01}])
@pytest.mark.parametrize("seed", [0, 1])
def test_ppo_agrees_with_its_twin_over_two_turns(seed: int, options: dict[str, Any]) -> None:
    method = find("ppo")(horizon=6, rows=7, passes=2, lr=1e-2, **PLAIN, **options)
    environment, models = built(method, seed)
    optimizer, before = twins.Adam(1e-2, 1e-5), params(models["policy"])
    shuffle = None
    for _, step in zip(range(2), run(method, environment, models, until=2, seed=seed)):
        batch = table(step.batch, 3)
        shuffle = shuffle or fresh_stream(step.state.seed)
        chosen = [[divmod(r, 6) for r in part] for _ in range(2) for part in parts(18, 7, shuffle)]
        expected = twins.ppo(batch, before, optimizer, chosen, **options)
        agree(params(models["policy"]), expected, before)
        before = params(models["policy"])


def fresh_stream(seed: int) -> torch.Generator:
    """The stream that shuffles rows, as it stood when the run began."""
    from trimtab.core.state import State

    return State.stream(type("S", (), {"seed": seed, "streams": {}})(), "shuffle")  # type: ignore[arg-type]


def parts(n: int, size: int, rng: torch.Generator) -> list[list[int]]:
    """A new random order, cut: every row once in each pass."""
    rows = torch.randperm(n, generator=rng).tolist()
    return [rows[k : k + size] for k in range(0, n, size)]


@pytest.mark.parametrize("name", ["npg", "trpo"])
@pytest.mark.parametrize("seed", [0, 1])
def test_natural_steps_agree_with_a_dense_solve(name: str, seed: int) -> None:
    """Conjugate gradient with as many iterations as there are parameters solves exactly, but for rounding."""
    base = find("npg")(horizon=6, rows=9, passes=2, iterations=40, max_kl=0.05)
    base = base.set("policy:update.tolerance", 0.0)
    method = find("trpo")(base) if name == "trpo" else base
    environment, models = built(method, seed)
    before, critic = params(models["policy"]), params(models["critic"])
    step = next(run(method, environment, models, until=1, seed=seed))
    batch = table(step.batch, 3)
    expected = twins.trpo(
        batch, before, lambda s: float(twins.value(critic, "", s)), search=name == "trpo", max_kl=0.05
    )
    agree(params(models["policy"]), expected, before, tolerance=1e-10)


def test_advantages_of_ragged_episodes_agree_with_the_sum_that_defines_them() -> None:
    method = find("a2c")().swap("collect", episodes(count=5)).drop("flat").set("credit.lam", 0.8)
    environment, models = built(method, 4)
    start = params(models["policy"])
    batch = next(run(method, environment, models, until=1, seed=4)).batch
    assert not bool(batch["mask"].all())
    expected = twins.advantages(batch, lambda s: float(twins.value(start, "critic.", s)), 0.99, 0.8)
    for (i, t), (a, target) in expected.items():
        assert float(batch["advantage"][i, t]) == pytest.approx(a, abs=1e-12)
        assert float(batch["value_target"][i, t]) == pytest.approx(target, abs=1e-12)
    assert bool((batch["advantage"][~batch["mask"]] == 0).all())


def test_cases_have_both_kinds_of_ends() -> None:
    k = case("steps", 0)
    method = k.shrink(find("a2c")(horizon=40))
    batch = next(run(method.set("collect.horizon", 40), k.environment, k.models_of(method), until=1)).batch
    assert int(batch["terminated"].sum()) > 0
    assert int(batch["truncated"].sum()) > 0
