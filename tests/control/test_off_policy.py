"""The card's exact checks of TD3, SAC and DQN, exploration, and what their networks refuse."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from trimtab.core.batch import Batch
from trimtab.core.errors import MethodError
from trimtab.core.kit import Kit
from trimtab.core.loop import begin, run
from trimtab.core.method import Method
from trimtab.core.registry import find
from trimtab.core.schedules import ramp
from trimtab.core.state import Clock
from trimtab.environments.toy import PointEnvironment
from trimtab.policies.layers import MLP, Inputs
from trimtab.policies.networks import Spaces, build_networks
from trimtab.policies.squashed import Bounds, SquashedGaussian
from trimtab.stages import critics
from trimtab.stages.explore import epsilon_greedy, gaussian_noise, uniform, uniform_first

torch.set_num_threads(1)
F64 = torch.float64
SMALL = {"batch": 8, "warmup": 12, "capacity": 60, "hidden": (8, 8)}


def started(method: Method, discrete: bool = False, seed: int = 0) -> Any:
    environment = PointEnvironment(discrete=discrete, seed=seed)
    return begin(method, environment, build_networks(method, environment, seed, dtype=F64), seed=seed)


def turns(method: Method, state: Any, count: int) -> Any:
    for _, step in zip(range(count), run(method, state.environment, state.models, until=1000, state=state)):
        yield step


def copied(state: Any) -> dict[str, list[Tensor]]:
    return {n: [p.detach().clone() for p in m.parameters()] for n, m in state.lookup().items()}


def moved(before: dict[str, list[Tensor]], after: dict[str, list[Tensor]]) -> set[str]:
    return {n for n in before if any(not torch.equal(a, b) for a, b in zip(before[n], after[n]))}


# -- check 5: the squashed Gaussian ------------------------------------------------------------------------------


def gaussian(low: float = -1.0, high: float = 1.0, actions: int = 1, spread: str = "tanh") -> SquashedGaussian:
    inputs = Inputs(spaces.Box(-1, 1, (2,)), F64)
    net = MLP(2, (4,), 2 * actions, activation="relu", init="torch", dtype=F64)
    bounds = Bounds(torch.full((actions,), low, dtype=F64), torch.full((actions,), high, dtype=F64))
    return SquashedGaussian(inputs, net, bounds, (actions,), spread)


@pytest.mark.parametrize(("u", "logp"), [(0.0, -0.918940), (1.0, -0.551379)])
def test_tanh_log_density_of_the_card(u: float, logp: float) -> None:
    x = torch.tensor([[u]], dtype=F64)
    # The card's numbers have CleanRL's 1e-6 beside 1 - tanh^2, which the stable form has no need of.
    assert float(gaussian().density(x, x, torch.zeros_like(x))) == pytest.approx(logp, abs=4e-6)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (-2.0, 2.0), (0.0, 5.0)])
def test_the_density_integrates_to_one_and_both_ways_to_it_agree(low: float, high: float) -> None:
    torch.manual_seed(0)
    policy = gaussian(low, high)
    obs = torch.tensor([0.3, -0.7], dtype=F64)
    n = 200_001
    action = torch.linspace(low, high, n + 2, dtype=F64)[1:-1].reshape(-1, 1, 1)
    batch = Batch({"obs": obs.expand(n, 1, 2), "action": action, "mask": torch.ones(n, 1, dtype=torch.bool)})
    logp = policy.evaluate(batch, frozenset({"logp"}))["logp"]
    assert float(logp.detach().exp().sum() * (high - low) / (n + 1)) == pytest.approx(1.0, abs=1e-4)
    made = policy.evaluate(batch.put(noise=torch.randn(n, 1, 1, dtype=F64)), frozenset({"sample", "sample_logp"}))
    again = policy.evaluate(batch.put(action=made["sample"]), frozenset({"logp"}))["logp"]
    torch.testing.assert_close(again, made["sample_logp"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("spread", ["tanh", "clamp"])
def test_far_out_nothing_is_infinite_and_log_sigma_stays_in_its_range(spread: str) -> None:
    policy = gaussian(spread=spread)
    far = torch.tensor([[1e4], [-1e4]], dtype=F64)
    density = policy.density(far, torch.zeros_like(far), torch.zeros_like(far))
    assert bool(torch.isfinite(density).all())
    with torch.no_grad():
        policy.net.layers[-1].bias.fill_(1e3)  # type: ignore[union-attr]
    assert float(policy.moments(torch.zeros(1, 2, dtype=F64))[1].max()) == 2.0
    with torch.no_grad():
        policy.net.layers[-1].bias.fill_(-1e3)  # type: ignore[union-attr]
    lowest = {"tanh": -5.0, "clamp": -20.0}[spread]
    assert float(policy.moments(torch.zeros(1, 2, dtype=F64))[1].min()) == lowest


def test_acting_says_the_log_density_of_what_it_does() -> None:
    policy, obs = gaussian(-3.0, 1.0, actions=2), torch.randn(50, 2, dtype=F64)
    (action, logp), _ = policy.act(obs, None, torch.Generator().manual_seed(0))
    batch = Batch({"obs": obs[:, None], "action": action[:, None], "mask": torch.ones(50, 1, dtype=torch.bool)})
    torch.testing.assert_close(policy.evaluate(batch, frozenset({"logp"}))["logp"][:, 0], logp, atol=1e-6, rtol=0)
    assert bool(((action >= -3) & (action <= 1)).all())
    assert policy.mode(obs).shape == (50, 2)


# -- check 6: SAC ------------------------------------------------------------------------------------------------


def transitions(n: int = 20) -> Batch:
    g = torch.Generator().manual_seed(3)
    r = lambda *s: torch.randn(*s, generator=g, dtype=F64)  # noqa: E731
    return Batch({
        "obs": r(n, 1, 2), "action": r(n, 1, 1).tanh(), "next_obs": r(n, 1, 2), "reward": r(n, 1),
        "terminated": torch.rand(n, 1, generator=g) < 0.3, "truncated": torch.rand(n, 1, generator=g) < 0.3,
        "mask": torch.ones(n, 1, dtype=torch.bool),
    })  # fmt: skip


def kit_of(method: Method, discrete: bool = False) -> tuple[Kit, Any]:
    state = started(method, discrete)
    return Kit(state, method, None, False), state


def test_sac_without_temperature_and_spread_has_the_target_of_td3_without_smoothing() -> None:
    soft, _ = kit_of(find("sac")(**SMALL, alpha=0.0))
    kit, state = kit_of(find("td3")(find("ddpg")(**SMALL), smoothing=0.0))
    policy: Any = soft.models["policy"]
    with torch.no_grad():  # the same mean, and a spread too small to matter
        for ours, theirs in zip(state.lookup()["policy_target"].net.layers, policy.net.layers):
            rows = len(ours.weight)
            theirs.weight[:rows], theirs.bias[:rows] = ours.weight, ours.bias
        policy.net.layers[-1].weight[1:].zero_()
        policy.net.layers[-1].bias[1:] = -1e3
        policy.spread = "clamp"
        soft.models["critic_target"].load_state_dict(kit.models["critic_target"].state_dict())
    a = critics.soft_target(temperature=critics.constant(0.0))(soft, transitions(), {})
    b = critics.smoothed_target(smoothing=0.0)(kit, transitions(), {})
    torch.testing.assert_close(a["target"], b["target"], atol=1e-7, rtol=0)
    assert "next_noise" not in b


@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize(("logp", "rises"), [(2.0, True), (-2.0, False)])
def test_an_entropy_below_its_target_makes_alpha_rise(logp: float, rises: bool, log: bool) -> None:
    from trimtab.policies.critics import Temperature

    model = Temperature(0.7, F64)
    batch = Batch({"sample_logp": torch.full((4, 1), logp, dtype=F64), "action": torch.zeros(4, 1, 1, dtype=F64),
                   "mask": torch.ones(4, 1, dtype=torch.bool)})  # fmt: skip
    now = model.evaluate(batch, frozenset({"temperature", "log_temperature"}))
    (loss, alpha) = critics.hold_entropy(log=log)(kit_of(find("sac")(**SMALL))[0], batch, now)
    (slope,) = torch.autograd.grad(loss.value.mean(), model.log)
    # Entropy -logp against the target -1: below it where logp > 1. A falling loss raises log alpha.
    assert (float(slope) < 0) == rises
    assert float(slope) == pytest.approx(-(logp - 1) * (1.0 if log else 0.7))
    assert float(alpha.value[0, 0]) == pytest.approx(0.7)


def test_sac_has_no_gradient_into_what_is_a_constant() -> None:
    method = find("sac")(**SMALL)
    state = started(method)
    named = {"critic/td_error", "policy/soft_climb", "policy/entropy", "temperature/alpha"}
    for step in turns(method, state, 3):
        assert all(p.grad is None and p.requires_grad for m in state.models.values() for p in m.parameters())
        assert named <= step.logs.keys()


# -- check 7: TD3 ------------------------------------------------------------------------------------------------


def test_actor_and_targets_rest_on_every_other_critic_step() -> None:
    method = find("td3")(find("ddpg")(**SMALL))
    state = started(method)
    before = copied(state)
    for i, _ in enumerate(turns(method, state, 6)):
        after = copied(state)
        resting = {"critic"} if i % 2 else {"critic", "policy", "critic_target", "policy_target"}
        assert moved(before, after) == resting, f"update {i}"
        before = after


def test_the_first_critic_alone_is_climbed() -> None:
    method = find("td3")(find("ddpg")(**SMALL))
    kit, _ = kit_of(method)
    batch = transitions()
    now = kit.models["policy"].evaluate(batch, frozenset({"sample"}))  # type: ignore[operator]
    climbed = critics.climb()(kit, batch, now).value
    both = kit.evaluate("critic", batch.put(action=now["sample"].detach()), {"value"})["value"]
    torch.testing.assert_close(climbed, -both[..., 0], atol=1e-14, rtol=0)
    assert float((both[..., 0] - both[..., 1]).abs().max()) > 1e-3


def test_smoothing_noise_is_clipped_and_so_is_the_action() -> None:
    kit, _ = kit_of(find("td3")(find("ddpg")(**SMALL)))
    made = critics.smoothed_target(smoothing=5.0, clip=0.3)(kit, transitions(400), {})
    noise = made["next_noise"]
    assert float(noise.abs().max()) == pytest.approx(0.3)
    assert float((noise.abs() < 0.3).double().mean()) < 0.1


# -- check 8: DQN ------------------------------------------------------------------------------------------------


def test_dqn_target_ends_with_termination_and_goes_on_through_truncation() -> None:
    kit, _ = kit_of(find("dqn")(**{**SMALL, "train_every": 1}), discrete=True)
    batch = transitions()
    target = critics.greedy_target(gamma=0.9)(kit, batch, {})["target"]
    best = kit.evaluate("policy_target", Batch({"obs": batch.next_obs, "mask": batch.mask}), {"values"})["values"].amax(
        -1
    )
    ended = batch.terminated
    assert torch.equal(target[ended], batch.reward[ended])
    torch.testing.assert_close(target[~ended], (batch.reward + 0.9 * best)[~ended])
    assert bool((batch.truncated & ~ended).any())


def test_dqn_copies_its_target_at_its_moments_alone() -> None:
    method = find("dqn")(**{**SMALL, "train_every": 2, "target_every": 6})
    state = started(method, discrete=True)
    before = copied(state)
    for i, _ in enumerate(turns(method, state, 7)):
        after = copied(state)
        assert ("policy_target" in moved(before, after)) == (i in (2, 5)), f"update {i}"
        before = after


def test_the_huber_loss_is_linear_beyond_its_corner() -> None:
    value = torch.tensor([[0.5], [3.0], [-3.0]], dtype=F64, requires_grad=True)
    batch = Batch(
        {"target": torch.zeros(3, 1, dtype=F64), "action": torch.zeros(3, 1), "mask": torch.ones(3, 1).bool()}
    )
    term, q = critics.td_error(huber=1.0)(kit_of(find("sac")(**SMALL))[0], batch, {"value": value})
    assert term.value[:, 0].tolist() == [0.125, 2.5, 2.5]
    (slope,) = torch.autograd.grad(term.value.sum(), value)
    assert slope[:, 0].tolist() == [0.5, 1.0, -1.0]
    assert torch.equal(q.value, value.detach())


# -- exploration -------------------------------------------------------------------------------------------------


class Still:
    """Always decides 0."""

    def act(self, obs: Tensor, carry: Any, rng: torch.Generator) -> Any:
        from trimtab.core.contracts import Decision

        return Decision(torch.zeros(len(obs), 1, dtype=obs.dtype)), carry

    def mode(self, obs: Tensor) -> Tensor:
        return torch.zeros(len(obs), 1, dtype=obs.dtype)


def exploring(piece: Any, discrete: bool = False) -> Any:
    method = find("dqn" if discrete else "sac")(**SMALL)
    made = replace(method, pieces=(*(p for p in method.pieces if p.stage != "act"), piece), explicit=())
    kit, _ = kit_of(made, discrete)
    return kit


def test_noise_has_its_deviation_and_stays_in_the_box() -> None:
    kit = exploring(gaussian_noise(scale=0.1))
    obs, rng = torch.zeros(20_000, 2, dtype=F64), torch.Generator().manual_seed(0)
    actor = gaussian_noise(scale=0.1)(kit, Still())
    action = actor.act(obs, None, rng)[0].action
    assert float(action.std()) == pytest.approx(0.1, rel=0.03)
    wild = gaussian_noise(scale=3.0)(kit, Still()).act(obs, None, rng)[0].action
    assert float(wild.abs().max()) == 1.0
    assert torch.equal(actor.mode(obs), Still().mode(obs)), "an evaluation without chance does not explore"


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_epsilon_is_the_share_of_random_decisions(epsilon: float) -> None:
    kit = exploring(epsilon_greedy(epsilon=epsilon), discrete=True)
    obs, rng = torch.randn(9000, 2, dtype=F64), torch.Generator().manual_seed(0)
    policy: Any = kit.models["policy"]
    action = epsilon_greedy(epsilon=epsilon)(kit, policy).act(obs, None, rng)[0].action
    changed = float((action != policy.mode(obs)).double().mean())
    assert changed == pytest.approx(epsilon * 2 / 3, abs=0.02)


def test_the_first_decisions_are_uniform_and_then_the_policy_decides() -> None:
    kit = exploring(uniform_first(decisions=5))
    obs, rng = torch.zeros(3, 2, dtype=F64), torch.Generator().manual_seed(0)
    actor = kit.actor()
    assert kit.environment.envs == 3
    drawn = [actor.act(obs, None, rng)[0] for _ in range(3)]
    assert [d.logp is None for d in drawn] == [True, True, False]
    assert kit.actor() is kit.models["policy"], "afterwards the wrap is not even there"


def test_an_evaluation_uses_up_none_of_the_first_decisions() -> None:
    kit = exploring(uniform_first(decisions=5))
    with kit.aside():
        kit.actor().act(torch.zeros(9, 2, dtype=F64), None, torch.Generator().manual_seed(0))
    assert kit._tree.pieces["/uniform_made"] == 0


def test_uniform_actions_cover_every_kind_of_space() -> None:
    rng = torch.Generator().manual_seed(0)
    box = uniform(spaces.Box(-2.0, 4.0, (2,)), 5000, rng, torch.float32)
    assert -2 <= float(box.min()) < -1.9
    assert 3.9 < float(box.max()) <= 4
    assert set(uniform(spaces.Discrete(3), 100, rng, torch.float32).tolist()) == {0, 1, 2}
    both = uniform(spaces.MultiDiscrete([2, 3]), 200, rng, torch.float32)
    assert both.dtype == torch.long
    assert both.amax(0).tolist() == [1, 2]
    with pytest.raises(MethodError, match="finite sides"):
        uniform(spaces.Box(-math.inf, math.inf, (1,)), 1, rng, torch.float32)


def test_a_ramp_ends_where_it_is_told() -> None:
    half = ramp(1.0, 0.05, 0.5)
    clock = Clock(budget={"decisions": 100})
    seen = []
    for clock.decisions in (0, 25, 50, 75, 100):
        seen.append(half(clock))
    assert seen == pytest.approx([1.0, 0.525, 0.05, 0.05, 0.05])
    with pytest.raises(MethodError, match="share of the run"):
        ramp(1.0, 0.0, 0.0)


# -- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "action", "said"),
    [("sac", spaces.Discrete(3), "makes real-valued actions|real-valued"),
     ("td3", spaces.Box(-math.inf, math.inf, (1,)), "finite sides"),
     ("dqn", spaces.Box(-1, 1, (1,)), "numbered actions"),
     ("dqn", spaces.MultiDiscrete([2, 2]), "one choice")],
)  # fmt: skip
def test_a_space_that_does_not_fit_is_refused_with_the_reason(name: str, action: Any, said: str) -> None:
    environment = PointEnvironment()
    environment.action_space = action
    with pytest.raises(MethodError, match=said):
        build_networks(find(name)(), environment, 0)


@pytest.mark.parametrize(
    ("make", "said"),
    [(lambda: critics.soft_target(temperature=critics.learned(), gamma=1.5), "gamma"),
     (lambda: critics.smoothed_target(smoothing=-0.1), "smoothing"), (lambda: critics.td_error(scale=0.0), "scale"),
     (lambda: critics.td_error(huber=0.0), "huber"), (lambda: critics.constant(-1.0), "at least 0"),
     (lambda: epsilon_greedy(epsilon=1.2), "epsilon"), (lambda: gaussian_noise(scale=-1.0), "scale"),
     (lambda: uniform_first(decisions=-1), "at least 0")],
)  # fmt: skip
def test_an_option_out_of_range_is_refused(make: Any, said: str) -> None:
    with pytest.raises(MethodError, match=said):
        make()


def test_presets_are_the_rows_of_the_card() -> None:
    sac, sb3 = find("sac")(preset="cleanrl"), find("sac")(preset="sb3")
    assert [sac.get(f"{t}:update.lr") for t in ("policy", "critic", "temperature")] == [3e-4, 1e-3, 1e-3]
    assert [sb3.get(f"{t}:update.lr") for t in ("policy", "critic", "temperature")] == [3e-4] * 3
    assert (sac.get("collect.warmup"), sb3.get("collect.warmup")) == (5000, 100)
    assert (sac.track("policy").every, sb3.track("policy").every) == (2, 1)
    assert sac.get("policy:repeated.times") == 2
    td3, mine = find("td3")(preset="sb3"), find("td3")()
    assert (mine.get("policy:update.lr"), td3.get("critic:update.lr")) == (3e-4, 1e-3)
    assert (mine.networks["policy"].hidden, td3.networks["critic"].hidden) == ((256, 256), (400, 300))
    assert (mine.get("gaussian_noise.scale"), td3.get("gaussian_noise.scale")) == (0.1, 0.0)
    assert (mine.get("collect.warmup"), td3.get("collect.warmup")) == (25_000, 100)
    dqn, other = find("dqn")(preset="cleanrl"), find("dqn")(preset="sb3")
    assert (dqn.copies["policy_target"].options["n"], other.copies["policy_target"].options["n"]) == (50, 2500)
    assert (dqn.get("collect.steps"), other.get("collect.steps")) == (10, 4)
    assert (dqn.get("td_error.huber"), other.get("td_error.huber")) == (None, 1.0)
    assert Spaces(spaces.Box(-1, 1, (2,)), spaces.Discrete(2)).choices("") == (2,)
