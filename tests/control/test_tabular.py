"""Tabular environments: stepped and rolled out alike, their objective exact, their state bitwise; what is refused."""

from __future__ import annotations

import pytest
import torch

from trimtab.claims.tables import table_episodes
from trimtab.core.errors import EnvironmentFailure, MethodError
from trimtab.core.kit import Kit
from trimtab.core.loop import begin, run
from trimtab.core.registry import find
from trimtab.environments.gym import GymEnvironment
from trimtab.environments.tabular import TabularEnvironment, grid, random_mdp
from trimtab.policies.networks import build_networks
from trimtab.policies.tabular import TableSoftmax
from trimtab.stages.steps import episodes

torch.set_num_threads(1)


def test_the_objective_is_the_mean_return_of_episodes() -> None:
    """By Monte Carlo, with a state that ends episodes, stepped and rolled out: within 4 standard errors."""
    environment = random_mdp(states=4, horizon=6, final=True, seed=3)
    policy = TableSoftmax(4, 3, scale=1.0, seed=3)
    exact = float(environment.objective(policy.probs, 0.9).detach())
    rows = environment.rollout(policy.probs, 4000, torch.Generator().manual_seed(0))
    time = 0.9 ** torch.arange(rows.reward.shape[1], dtype=torch.float64)
    returns = (rows.reward * rows.mask * time).sum(1)
    assert abs(float(returns.mean()) - exact) < 4 * float(returns.std()) / 4000**0.5
    assert bool((rows.mask.sum(1) < 6).any())
    assert torch.equal(rows.terminated.any(1), rows.mask.sum(1) < 6) or bool(rows.terminated[:, -1].any())

    method = find("gpomdp")()
    many = random_mdp(states=4, horizon=6, final=True, envs=16, seed=3)
    kit = Kit(begin(method, many, {"policy": policy}), method, None, False)
    batch = episodes(count=600)(kit)
    returns = (batch.reward * batch.mask * time[: batch.mask.shape[1]]).sum(1)
    assert abs(float(returns.mean()) - exact) < 4 * float(returns.std()) / 600**0.5


def test_many_objectives_at_once_are_each_of_them() -> None:
    environment = random_mdp(horizon=7)
    tables = torch.stack([TableSoftmax(6, 3, scale=1.0, seed=s).probs.detach() for s in range(3)])
    together = environment.objective(tables, 0.8)
    assert torch.allclose(together, torch.stack([environment.objective(t, 0.8) for t in tables]), atol=1e-14)


def test_quick_episodes_have_the_columns_of_episodes() -> None:
    environment, policy = random_mdp(states=4, horizon=5, final=True), TableSoftmax(4, 3, scale=1.0)
    method = find("gpomdp")()
    kit = Kit(begin(method, environment, {"policy": policy}), method, None, False)
    slow, quick = episodes(count=30)(kit), table_episodes(count=30)(kit)
    assert set(slow.columns) == set(quick.columns)
    for batch in (slow, quick):
        last = batch.mask.sum(1) - 1
        ended = (batch.terminated | batch.truncated).gather(1, last[:, None])
        assert bool(ended.all())
        assert int((batch.terminated | batch.truncated).sum()) == 30
        assert bool((batch.truncated.any(1) <= (last == 4)).all()), "only the clock truncates"
        for name in ("reward", "logp_behavior", "obs", "action", "next_obs"):
            assert slow[name].dtype == quick[name].dtype
            assert bool((batch[name][~batch.mask] == 0).all())
        logp = policy.evaluate(batch, frozenset({"logp"}))["logp"]
        assert torch.allclose(logp, batch.logp_behavior, atol=1e-14)


def test_steps_in_a_grid() -> None:
    """Up and left of the corner are walls; the clock ends an episode and the next begins in the corner."""
    environment = grid(size=3, horizon=5)
    walk = [environment.step(torch.tensor([a])) for a in (0, 3, 1, 2, 1)]
    assert [int(t.next_obs) for t in walk] == [0, 0, 1, 4, 5]
    assert [bool(t.truncated) for t in walk] == [False] * 4 + [True]
    assert environment.obs.tolist() == [0]
    assert environment.finished[0].length == 5
    paid = grid(size=2, horizon=5)
    assert float(paid.step(torch.tensor([1])).reward) == 0.0
    assert float(paid.step(torch.tensor([2])).reward) == 1.0


def test_state_goes_on_bit_for_bit() -> None:
    actions = torch.randint(3, (40, 2), generator=torch.Generator().manual_seed(0))
    straight = random_mdp(states=4, horizon=5, final=True, envs=2, seed=1)
    for a in actions[:20]:
        straight.step(a)
    other = random_mdp(states=4, horizon=5, final=True, envs=2, seed=9)
    other.load_state_dict(straight.state_dict())
    for a in actions[20:]:
        one, two = straight.step(a), other.step(a)
        assert all(torch.equal(x, y) for x, y in zip(one, two))
    assert straight.finished == other.finished


def test_tables_that_are_no_process_are_refused() -> None:
    start, reward = torch.tensor([1.0, 0.0]), torch.zeros(2, 1)
    with pytest.raises(EnvironmentFailure, match="no probabilities"):
        TabularEnvironment(torch.full((2, 1, 2), 0.6), reward, start=start, horizon=3)
    with pytest.raises(EnvironmentFailure, match="they must be"):
        TabularEnvironment(torch.full((2, 2, 2), 0.5), reward, start=start, horizon=3)
    with pytest.raises(EnvironmentFailure, match="horizon=0"):
        TabularEnvironment(torch.full((2, 1, 2), 0.5), reward, start=start, horizon=0)
    with pytest.raises(EnvironmentFailure, match="from 0 to 3"):
        grid(2).step(torch.tensor([4]))


@pytest.mark.parametrize("name", ["gpomdp", "n_sgdm", "n_pg_igt", "harpg"])
def test_the_gradient_methods_run_in_gymnasium(name: str) -> None:
    method = find(name)(lr=0.1)
    environment = GymEnvironment("CartPole-v1", envs=2, seed=0)
    models = build_networks(method, environment, 0)
    before = [p.detach().clone() for p in models["policy"].parameters()]
    *_, last = run(method, environment, models, until=4)
    assert last.logs["return"] > 0
    assert any(not torch.equal(p, q) for p, q in zip(models["policy"].parameters(), before))
    environment.close()


def test_props_learns_numbered_actions_without_a_kl_price_alone() -> None:
    environment = GymEnvironment("CartPole-v1", envs=2, seed=0)
    small = find("ppo")(preset="cleanrl_discrete", horizon=32, rows=32, hidden=(8,))
    method = find("props")(small, kl_coef=0.0, epochs=2, minibatches=2)
    *_, last = run(method, environment, build_networks(method, environment, 0), until=4)
    assert last.state.clock.decisions == 4 * 32
    refused = find("props")(small)
    with pytest.raises(MethodError, match="wants 'mean' from the model 'behavior'"):
        next(run(refused, environment, build_networks(refused, environment, 0), until=1))
    environment.close()
