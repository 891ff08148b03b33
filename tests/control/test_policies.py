"""Policies for vectors: densities that integrate, modes, divergences, and what padding must not do."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from trimtab.core.batch import Batch
from trimtab.core.edits import authored_by
from trimtab.core.errors import MethodError
from trimtab.core.loop import run
from trimtab.core.method import Method, diff
from trimtab.core.network import Network
from trimtab.core.registry import find
from trimtab.environments.toy import PointEnvironment
from trimtab.policies.networks import Spaces, build_networks, stochastic, value

F64 = torch.float64
BOX = spaces.Box(-np.inf, np.inf, (3,), np.float32)


def made(action: Any, observation: Any = BOX, **options: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Network("stochastic", (4,), "tanh")
        return stochastic(Spaces(observation, action, F64), network, **{"gain": 1.0, **options})


def rows(policy: Any, n: int = 5, t: int = 2) -> Batch:
    g = torch.Generator().manual_seed(1)
    obs = torch.randn(n * t, 3, generator=g, dtype=F64)
    decision, _ = policy.act(obs, None, g)
    return Batch(
        {
            "obs": obs.reshape(n, t, 3),
            "action": decision.action.clone().reshape(n, t, *decision.action.shape[1:]),
            "logp_behavior": decision.logp.clone().reshape(n, t),
            "mask": torch.ones(n, t, dtype=torch.bool),
        }
    )


SPACES = {
    "box": (spaces.Box(-1, 1, (2,), np.float32), {}),
    "tanh": (spaces.Box(np.array([-1, 0], np.float32), np.array([1, 4], np.float32)), {"action_map": "tanh"}),
    "discrete": (spaces.Discrete(4), {}),
    "multi": (spaces.MultiDiscrete([2, 3]), {}),
}


@pytest.mark.parametrize("kind", SPACES)
def test_what_is_said_when_acting_is_what_is_evaluated(kind: str) -> None:
    space, options = SPACES[kind]
    policy = made(space, **options)
    batch = rows(policy)
    logp = policy.evaluate(batch, frozenset({"logp"}))["logp"]
    assert logp.shape == (5, 2)
    assert float((logp - batch["logp_behavior"]).abs().max()) < 1e-9


@pytest.mark.parametrize("kind", SPACES)
def test_exactly_what_was_asked_comes_back(kind: str) -> None:
    space, options = SPACES[kind]
    policy = made(space, **options)
    for want in ({"logp"}, set(policy.provides)):
        assert set(policy.evaluate(rows(policy), frozenset(want))) == want


@pytest.mark.parametrize("kind", SPACES)
def test_padding_is_zero_and_moves_nothing(kind: str) -> None:
    space, options = SPACES[kind]
    policy = made(space, **options)
    batch = rows(policy)
    mask = batch["mask"].clone()
    mask[1, 1] = False
    padded = Batch({**batch.columns, "mask": mask, "obs": batch["obs"].clone().index_put_((torch.tensor([1]),
                    torch.tensor([1])), torch.full((1, 3), float("nan"), dtype=F64))})  # fmt: skip
    logp = policy.evaluate(padded, frozenset({"logp"}))["logp"]
    assert float(logp.detach()[1, 1]) == 0
    whole = policy.evaluate(batch, frozenset({"logp"}))["logp"]
    assert torch.equal(logp[mask], whole[mask])


def test_card_check_5_the_tanh_density() -> None:
    """mu = 0, sigma = 1, c = 1; the card adds 1e-6 inside the logarithm, which this stable form does not need."""
    policy = made(spaces.Box(-1, 1, (1,), np.float32), action_map="tanh")
    mean = torch.zeros(2, 1, dtype=F64)
    action = torch.tensor([[0.0], [math.tanh(1.0)]], dtype=F64)
    assert policy.density(mean, action).tolist() == pytest.approx([-0.918940, -0.551379], abs=3e-6)
    grid = torch.linspace(-1, 1, 200_001, dtype=F64)[1:-1, None]
    area = torch.trapezoid(policy.density(torch.zeros_like(grid), grid).exp(), grid[:, 0])
    assert float(area.detach()) == pytest.approx(1, abs=1e-4)


def test_tanh_actions_stay_inside_their_bounds_and_have_no_entropy() -> None:
    space, options = SPACES["tanh"]
    policy = made(space, **options, log_std=3.0)
    actions = rows(policy, 200)["action"]
    low, high = torch.as_tensor(space.low), torch.as_tensor(space.high)
    assert bool(((actions > low) & (actions < high)).all())
    assert "entropy" not in policy.provides
    method = find("ppo")(action_map="tanh", entropy_coef=0.01)
    environment = PointEnvironment()
    with pytest.raises(MethodError, match="entropy"):
        next(run(method, environment, build_networks(method, environment, 0, dtype=F64), until=1))


def test_the_gaussian_entropy_is_minus_the_mean_of_its_log_density() -> None:
    policy = made(spaces.Box(-1, 1, (2,), np.float32), log_std=0.3)
    assert float(policy.evaluate(rows(policy), frozenset({"entropy"}))["entropy"].detach()[0, 0]) == pytest.approx(
        2 * (0.5 + 0.5 * math.log(2 * math.pi) + 0.3), abs=1e-12
    )


@pytest.mark.parametrize("kind", ["box", "discrete", "multi"])
def test_divergence_is_the_mean_log_ratio_of_many_draws(kind: str) -> None:
    policy, other = made(SPACES[kind][0]), made(SPACES[kind][0], log_std=0.2) if kind == "box" else None
    if other is None:
        other = made(SPACES[kind][0])
        with torch.no_grad():
            for p in other.parameters():
                p.add_(0.1)
    g = torch.Generator().manual_seed(3)
    obs = torch.randn(1, 3, generator=g, dtype=F64).expand(40_000, 3)
    decision, _ = policy.act(obs, None, g)
    batch = Batch({"obs": obs[:, None], "action": decision.action.clone()[:, None],
                   "mask": torch.ones(40_000, 1, dtype=torch.bool)})  # fmt: skip
    want = frozenset({"logp", "distribution"})
    with torch.no_grad():
        a, b = policy.evaluate(batch, want), other.evaluate(batch, want)
        exact = float(policy.divergence(a["distribution"], b["distribution"])[0, 0])
        drawn = a["logp"] - b["logp"]
    assert exact == pytest.approx(float(drawn.mean()), abs=4 * float(drawn.std()) / 200 + 1e-9)
    assert exact > 0


def test_modes_are_the_most_likely_actions() -> None:
    obs = torch.randn(6, 3, generator=torch.Generator().manual_seed(2), dtype=F64)
    policy = made(SPACES["discrete"][0])
    assert torch.equal(policy.mode(obs), policy.logits(obs).argmax(-1))
    gauss = made(SPACES["box"][0])
    assert torch.equal(gauss.mode(obs), gauss.mean(obs).detach())


# -- building --------------------------------------------------------------------------------------------------------


def test_networks_begin_from_the_seed_and_their_name_alone() -> None:
    method, environment = find("npg")(), PointEnvironment()
    before = torch.get_rng_state()
    a, b = (build_networks(method, environment, 3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    other = build_networks(method, environment, 4)
    for name in a:
        for p, q, r in zip(a[name].parameters(), b[name].parameters(), other[name].parameters()):
            assert torch.equal(p, q)
            assert p.dim() < 2 or not torch.equal(p, r)


def test_orthogonal_layers_begin_orthogonal_with_their_gains() -> None:
    policy: Any = build_networks(find("ppo")(), PointEnvironment(), 0, dtype=F64)["policy"]
    hidden, last = policy.actor.mean.layers[1], policy.actor.mean.layers[2]
    gram = hidden.weight @ hidden.weight.t()
    assert float((gram - 2 * torch.eye(64, dtype=F64)).abs().max()) < 1e-10
    assert float(last.weight.detach().norm()) == pytest.approx(0.01, rel=1e-9)
    assert float(policy.critic.net.layers[2].weight.detach().norm()) == pytest.approx(1.0, rel=1e-9)
    assert all(bool((layer.bias == 0).all()) for layer in policy.actor.mean.layers)


def test_networks_show_in_the_method() -> None:
    a, b = find("ppo")(), find("ppo")(hidden=(32,), activation="relu")
    assert {path for path, _, _ in diff(a, b)} == {"network policy.hidden", "network policy.activation"}
    assert a.fingerprint() != b.fingerprint()
    other = Network("actor_critic", (8,), "relu", b.networks["policy"].options)
    with authored_by("other", frozenset()), pytest.raises(MethodError, match="was set"):
        b.but(networks={"policy": other})


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (Network("magic"), "Known: actor_critic"),
        (Network("value", (4,), "tanh", {"depth": 3}), "no option 'depth'"),
        (Network("value", (4,), "sine"), "activation='sine'"),
        (Network("value", (4,), "tanh", {"init": "zeros"}), "init='zeros'"),
        (Network("stochastic", (4,), "tanh", {"action_map": "clip"}), "action_map='clip'"),
    ],
)
def test_networks_that_cannot_be_built_say_why(network: Network, words: str) -> None:
    with pytest.raises(MethodError, match=words):
        build_networks(Method("m", networks={"policy": network}), PointEnvironment(), 0)


@pytest.mark.parametrize(
    ("observation", "action", "options", "words"),
    [
        (spaces.Box(0, 255, (8, 8, 3), np.uint8), spaces.Discrete(2), {}, "look like images"),
        (spaces.Dict({"a": BOX}), spaces.Discrete(2), {}, "are no vectors"),
        (BOX, spaces.Dict({"a": BOX}), {}, "numbered actions"),
        (BOX, spaces.Discrete(2), {"action_map": "tanh"}, "bounds real-valued actions"),
        (BOX, spaces.Box(-np.inf, np.inf, (1,), np.float32), {"action_map": "tanh"}, "needs bounds"),
    ],
)
def test_spaces_that_do_not_fit_are_refused(observation: Any, action: Any, options: Any, words: str) -> None:
    with pytest.raises(MethodError, match=words):
        made(action, observation, **options)


def test_a_method_without_networks_says_so() -> None:
    with pytest.raises(MethodError, match="names no network"):
        build_networks(find("grpo")(), PointEnvironment(), 0)


def test_numbered_observations_are_one_hot() -> None:
    net = value(Spaces(spaces.Discrete(5, start=1), spaces.Discrete(2), F64), Network("value", ()))
    batch = Batch({"obs": torch.tensor([[1], [5]]), "mask": torch.ones(2, 1, dtype=torch.bool)})
    made = net.evaluate(batch, frozenset({"value"}))["value"][:, 0]
    assert torch.allclose(made, net.net.layers[0].weight[0, [0, 4]])  # type: ignore[index,union-attr]
