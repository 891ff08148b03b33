"""Collecting steps and whole episodes, rows of one decision, and running moments."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from trimtab.core.batch import Batch
from trimtab.core.errors import MethodError
from trimtab.core.loop import run
from trimtab.core.method import Method
from trimtab.core.registry import find
from trimtab.environments.toy import PointEnvironment
from trimtab.methods.cases import case
from trimtab.policies.networks import build_networks
from trimtab.stages.normalise import Moments, NormalisedActor
from trimtab.stages.steps import episodes, flat

F64 = torch.float64


def collected(method: Method, turns: int = 1, seed: int = 0, **environment: Any) -> list[Any]:
    world = PointEnvironment(seed=seed, **environment)
    return list(run(method, world, build_networks(method, world, seed, dtype=F64), until=turns, seed=seed))


def plain(**options: Any) -> Method:
    """A2C whose batch stays as it was collected."""
    return find("a2c")(**options).drop("flat")


def test_steps_run_on_and_next_obs_is_the_true_one() -> None:
    first, second = (s.batch for s in collected(plain(horizon=20), turns=2))
    over = first["terminated"] | first["truncated"]
    assert bool(over.any())
    inside = ~over[:, :-1]
    assert torch.equal(first["next_obs"][:, :-1][inside], first["obs"][:, 1:][inside])
    assert not bool((first["next_obs"][:, :-1][~inside] == first["obs"][:, 1:][~inside]).all(-1).any())
    for i in range(3):
        goes_on = first["episode"][i, -1] == second["episode"][i, 0]
        assert bool(goes_on) == (not bool(over[i, -1]))
        if goes_on:
            assert torch.equal(first["next_obs"][i, -1], second["obs"][i, 0])
    changed = first["episode"][:, 1:] != first["episode"][:, :-1]
    assert torch.equal(changed, over[:, :-1])


def test_episodes_are_whole_padded_and_nobody_is_preferred() -> None:
    steps = collected(find("a2c")().swap("collect", episodes(count=4)).drop("flat"), turns=3)
    seen: list[int] = []
    for step in steps:
        batch = step.batch
        mask = batch["mask"]
        length = mask.sum(1)
        over = batch["terminated"] | batch["truncated"]
        for i in range(4):
            n = int(length[i])
            assert not bool(over[i, : n - 1].any())
            assert bool(over[i, n - 1])
            assert torch.equal(batch["next_obs"][i, : n - 1], batch["obs"][i, 1:n])
            assert bool((batch["reward"][i, n:] == 0).all())
        seen += batch["episode"].tolist()
        assert step.state.clock.rows % 4 == 0
        assert step.state.clock.decisions >= sum(int(s.batch["mask"].sum()) for s in steps[: step.turn])
    assert len(set(seen)) == len(seen), "an episode was given twice"


def test_flat_drops_padding_and_keeps_the_order() -> None:
    mask = torch.tensor([[1, 1], [1, 0]], dtype=torch.bool)
    given = Batch({"x": torch.arange(4.0).reshape(2, 2), "mask": mask, "group": torch.tensor([7, 8]),
                   "episode": torch.tensor([[3, 4], [5, 5]]), "name": ["a", "b"]})  # fmt: skip
    made = flat().fn(given)
    assert made["x"].tolist() == [[0.0], [1.0], [2.0]]
    assert made["group"].tolist() == [7, 7, 8]
    assert made["episode"].tolist() == [3, 4, 5]
    assert made["name"] == ["a", "a", "b"]


def test_an_actor_without_probabilities_is_refused() -> None:
    class Silent(torch.nn.Module):
        provides = frozenset({"logp", "value"})

        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(1))

        def act(self, obs: Tensor, carry: Any, rng: Any) -> Any:
            from trimtab.core.contracts import Decision

            return Decision(torch.zeros(len(obs), 1)), carry

    with pytest.raises(MethodError, match="with what probability"):
        next(run(find("a2c")(), PointEnvironment(), Silent(), until=1))


# -- running moments -------------------------------------------------------------------------------------------------


def test_moments_are_those_of_everything_seen() -> None:
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=F64) * 3 + 1e4
    moments = Moments((3,))
    for part in x.split([1, 7, 30, 12]):
        moments.add(part)
    assert torch.allclose(moments.mean, x.mean(0), rtol=1e-12)
    assert torch.allclose(moments.variance, x.var(0, correction=0), rtol=1e-9)
    assert torch.equal(Moments((3,)).normalise(x, 5.0), x.clamp(-5, 5))  # nothing seen: the variance is 1


def test_the_batch_holds_what_the_policy_saw_and_only_collecting_changes_the_moments() -> None:
    method = find("ppo")(horizon=8, rows=None, passes=1, scale_reward=False).drop("flat")
    (step,) = collected(method)
    moments = step.state.pieces["/obs_moments"]
    assert moments.count == 3 * 9  # the first observations, and one after every step
    batch = step.batch
    policy = step.state.models["policy"]
    before = {k: v.clone() if isinstance(v, Tensor) else v for k, v in moments.state_dict().items()}
    actor = NormalisedActor(policy, moments, 10.0)
    actor.act(step.state.environment.obs, None, torch.Generator())
    actor.mode(step.state.environment.obs)
    assert all(torch.equal(torch.as_tensor(before[k]), torch.as_tensor(v)) for k, v in moments.state_dict().items())
    # The log-probability was that of the observation as it was seen.
    again = collected(method)[0]
    assert torch.equal(again.batch["obs"], batch["obs"])
    assert float((batch["logp_old"] - batch["logp_behavior"]).abs().max()) < 1e-12 if "logp_old" in batch else True


def test_rewards_are_scaled_by_the_deviation_of_the_discounted_return_so_far() -> None:
    """Against a loop over steps, over two batches, with episodes that go on from one to the next."""
    method = find("ppo")(horizon=9, rows=None, passes=1, normalise_obs=False).drop("flat")
    running, seen = torch.zeros(3, dtype=F64), []
    for step in collected(method, turns=2):
        batch = step.batch
        over = batch["terminated"] | batch["truncated"]
        for t in range(9):
            running = 0.99 * running + batch["reward"][:, t]
            seen.append(running.clone())
            deviation = torch.cat(seen).var(correction=0).add(1e-8).sqrt()
            expected = (batch["reward"][:, t] / deviation).clamp(-10, 10)
            assert torch.allclose(batch["scaled_reward"][:, t], expected, rtol=1e-9)
            running = torch.where(over[:, t], 0.0, running)
    assert float(batch["reward"].abs().max()) > 0
    assert not torch.equal(batch["reward"], batch["scaled_reward"]), "the raw reward stays as it was"


def test_scaled_rewards_of_padded_episodes() -> None:
    base = find("ppo")(normalise_obs=False, rows=None, passes=1).swap("collect", episodes(count=4)).drop("flat")
    batch = collected(base)[0].batch
    assert bool((batch["scaled_reward"][~batch["mask"]] == 0).all())
    assert bool(torch.isfinite(batch["scaled_reward"]).all())


def test_numbered_observations_cannot_be_normalised() -> None:
    class States(PointEnvironment):
        """Its observation space says that observations are numbers of states."""

    world = States()
    world.observation_space = spaces.Discrete(4)
    method = find("ppo")()
    with pytest.raises(MethodError, match="normalise_obs=False"):
        next(run(method, world, build_networks(method, world, 0), until=1))


def test_the_case_has_continuous_and_numbered_actions() -> None:
    assert isinstance(case("steps").environment.action_space, spaces.Box)
    assert isinstance(case("choices").environment.action_space, spaces.Discrete)
    assert case("choices").environment.obs.dtype == F64
    assert np.isfinite(case("steps").environment.obs.numpy()).all()
