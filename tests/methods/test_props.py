"""PROPS and ROS: a literal twin, the card's exact checks, the buffer and its normalisation, the meter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden.props_twin import Adam, Linear, behavior
from trimtab.core.batch import Batch
from trimtab.core.closure import Closure
from trimtab.core.errors import MethodError
from trimtab.core.kit import Kit
from trimtab.core.loop import begin, run
from trimtab.core.method import Method, Track
from trimtab.core.piece import piece
from trimtab.core.registry import find
from trimtab.environments.tabular import grid
from trimtab.environments.toy import PointEnvironment
from trimtab.methods.cases import case
from trimtab.methods.control.props import behaving, keeping
from trimtab.policies.networks import build_networks
from trimtab.policies.tabular import TableSoftmax
from trimtab.stages import behavior as stage
from trimtab.stages.behavior import held, repair, sweeps
from trimtab.stages.sampling import count_error, sampling_error
from trimtab.stages.steps import steps
from trimtab.stages.update import sgd

torch.set_num_threads(1)


def toy(method: Method, seed: int = 0) -> tuple[PointEnvironment, dict[str, Any]]:
    environment = PointEnvironment(seed=seed)
    return environment, build_networks(method, environment, seed, dtype=torch.float64)


def short(name: str, *, horizon: int = 6, **options: Any) -> Method:
    base = find("ppo")(horizon=horizon, rows=9, passes=2, hidden=(), lr=1e-2)
    made: Method = find(name)(base, **options)
    return made


# -- the twin ----------------------------------------------------------------------------------------------------


def linear(model: Any) -> Linear:
    (layer,) = model.actor.mean.layers
    return Linear(layer.weight[0].tolist(), layer.bias.item(), model.actor.log_std.item())


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("eps", "limit"), [(0.3, 10.0), (0.05, 10.0), (0.3, 0.004)])
def test_behavior_agrees_with_its_twin(seed: int, eps: float, limit: float) -> None:
    method = short("props", lr=0.02, eps=eps, limit=limit, epochs=5, minibatches=1, kl_coef=0.2)
    environment, models = toy(method, seed)
    adam, made = Adam(4, 0.02), []
    for step in run(method, environment, models, until=5, seed=seed):
        batch = step.batch
        stays = [i for i in range(len(batch)) if not bool(batch.leaving[i, 0])]
        rows = [(batch.obs[i, 0].tolist(), float(batch.action[i, 0, 0])) for i in stays]
        options = {"eps": eps, "kl_coef": 0.2, "limit": limit, "epochs": 5, "clip": 0.5}
        phi, taken = behavior(linear(models["policy"]), rows, adam, **options)  # type: ignore[arg-type]
        error = max(abs(x - y) for x, y in zip(phi.flat(), linear(models["behavior"]).flat()))
        assert error < 1e-12, f"off its twin by {error:.2e} in turn {step.turn}"
        assert step.logs["behavior/steps"] == taken
        made.append(taken)
    assert (min(made) < 5) == (limit == 0.004), "the limit is what ends it early"


# -- what the loss does (checks 1 to 4, 6) -------------------------------------------------------------------------


def still(*losses: Any, update: Any, horizon: int = 1, blocks: int = 64) -> Method:
    """A behavior policy beside a policy that nobody trains."""
    base = Method("still", pieces=(steps(horizon=horizon),), tracks=())
    return behaving(keeping(base, blocks), losses, update, moments=False)


def descent(actions: list[int], phi: Tensor | None = None, *, eps: float = 0.3) -> Tensor:
    """The gradient of the repair loss in the logits of one state, for these actions and a uniform theta of two."""
    policy, behaving_ = TableSoftmax(2, 2), TableSoftmax(2, 2)
    if phi is not None:
        behaving_.logits.data[0] = phi
    n = len(actions)
    batch = Batch(
        {
            "obs": torch.zeros(n, 1, dtype=torch.long),
            "action": torch.tensor(actions)[:, None],
            "mask": torch.ones(n, 1, dtype=torch.bool),
            "logp_target": torch.full((n, 1), math.log(0.5), dtype=torch.float64),
        }
    )
    method = still(repair(eps=eps), update=sgd(lr=1.0))
    environment = grid(2)
    models = {"policy": policy, "behavior": behaving_}
    kit = Kit(begin(method, environment, models), method, None, False)
    if phi is not None:
        behaving_.logits.data[0] = phi  # `begin` made it the policy
    track = Track("behavior", trains="behavior", pieces=(repair(eps=eps),), update=sgd(lr=1.0))
    made: Tensor = Closure(kit, track, batch)().grads["logits"][0]
    return made


@pytest.mark.parametrize("eps", [0.0, 0.05, 0.3, 1.0])
def test_the_first_step_lowers_what_is_held_too_often(eps: float) -> None:
    """Check 1: {a0: 3, a1: 1} gives +1/4 on a0, whatever eps (check 4); {2, 2} gives exactly 0."""
    assert descent([0, 0, 0, 1], eps=eps).tolist() == [0.25, -0.25]
    assert descent([0, 0, 1, 1], eps=eps).tolist() == [0.0, 0.0]


def test_an_action_is_pushed_to_its_floor_and_no_further() -> None:
    """Check 3: rho below 1 - eps has no gradient; rho above 1 + eps still has all of it."""
    rare = torch.tensor([0.3, 0.7], dtype=torch.float64).log()  # rho of a0 is 0.6, of a1 1.4
    assert descent([0], rare).tolist() == [0.0, 0.0]
    expected = 1.4 * torch.tensor([-0.3, 0.3], dtype=torch.float64)  # rho grad log pi(a1)
    assert torch.allclose(descent([1], rare), expected, atol=1e-15)


def test_kl_of_two_gaussians() -> None:
    """Check 6: 0.323147 for mu .1 and sigma .5 under N(0, 1); averaged over the numbers of an action; 0 when equal."""
    one = torch.ones(1, 1, 2, dtype=torch.float64)
    now = {"mean": 0.1 * one, "std": 0.5 * one}
    batch = Batch({"mean_target": 0 * one, "std_target": one, "mask": torch.ones(1, 1, dtype=torch.bool)})
    table = TableSoftmax(2, 2)
    method = still(repair(), update=sgd(lr=1.0))
    kit = Kit(begin(method, grid(2), {"policy": table, "behavior": TableSoftmax(2, 2)}), method, None, False)
    assert float(held(coef=1.0)(kit, batch, now).value) == pytest.approx(0.323147, abs=1e-6)
    assert float(held(coef=1.0)(kit, batch, {"mean": 0 * one, "std": one}).value) == 0.0


def test_counts_in_proportion_leave_phi_where_it_is() -> None:
    """Check 2: with counts(.|s) proportional to pi(.|s) the gradient is exactly 0, for any eps."""
    for eps in (0.0, 0.3):
        assert descent([0, 1] * 5, eps=eps).tolist() == [0.0, 0.0]


def test_a_large_kl_price_holds_phi_at_theta() -> None:
    """Check 4."""
    free, dear = (short("props", kl_coef=c, epochs=8, minibatches=1, limit=None) for c in (0.0, 1e6))
    moved = []
    for method in (free, dear):
        environment, models = toy(method)
        *_, _ = run(method, environment, models, until=4)
        moved.append(
            max(abs(a - b) for a, b in zip(linear(models["policy"]).flat(), linear(models["behavior"]).flat()))
        )
    assert moved[0] > 5e-3
    assert moved[1] < 0.3 * moved[0], "Adam's step has a length of its own, so phi trembles about theta"


# -- the buffer (checks 5 and 7) ---------------------------------------------------------------------------------


def test_the_first_block_is_on_policy_and_the_ratio_begins_at_one() -> None:
    """Checks 5 and 7: phi = theta bit for bit before anything is held; PPO's ratio is 1 whoever collected."""
    method = short("props", horizon=12, kl_coef=0.0)
    environment, models = toy(method)
    turns = run(method, environment, models, until=6)
    gaps = []
    for step in turns:
        logp = step.batch.logp_old
        gaps.append(float((logp - step.batch.logp_behavior).abs().max()))
    assert gaps[0] == 0.0
    assert min(gaps[1:]) > 1e-3
    state = begin(method, environment, models)
    assert linear(state.models["policy"]).flat() == linear(state.models["behavior"]).flat()


def test_batches_are_kept_in_time_order_and_only_new_steps_count() -> None:
    method = short("props", horizon=12, batches=2, blocks=3).drop("flat")
    environment, models = toy(method)
    played = []
    for step in run(method.but(rows=None), environment, models, until=9):
        batch, new = step.batch, step.batch.fresh.sum(1)
        assert new.tolist() == [4, 4, 4]
        played.append(batch.action[:, -4:])
        assert torch.equal(batch.action, torch.cat(played[-6:], 1)), "the last six blocks, oldest first"
        inside = ~(batch.terminated | batch.truncated)[:, :-1]
        assert torch.equal(batch.episode[:, 1:][inside], batch.episode[:, :-1][inside]), "episodes go on across blocks"
        assert step.state.clock.decisions == 12 * step.turn
        assert int(batch.leaving.sum(1)[0]) == (4 if step.turn >= 6 else 0)
        due = step.turn % 3 == 0
        assert ("policy/loss" in step.logs) == due, "the learner waits until its batch is complete"


def test_old_steps_are_shown_under_the_moments_of_today() -> None:
    method = short("props", batches=3, blocks=1).drop("flat")
    environment, models = toy(method)
    seen: list[Tensor] = []
    for step in run(method.but(rows=None), environment, models, until=4):
        moments = step.state.pieces["/obs_moments"]
        raws = step.state.pieces["/kept"]
        seen.append(step.batch.obs[:, -6:])
        raw = torch.cat([b["raw_obs"] for b in raws], 1)
        shown = moments.normalise(raw.flatten(0, 1), 10.0).unflatten(0, raw.shape[:2])
        old = step.batch.obs[:, :-6]
        if step.turn > 1:
            length = min(raw.shape[1] - 6, old.shape[1])
            assert torch.equal(old[:, -length:], shown[:, -6 - length : -6])
    assert not torch.equal(step.batch.obs[:, :6], seen[1]), "no longer as the policy saw them then"


def test_rewards_are_counted_once_by_their_running_scale() -> None:
    plain, kept = short("buffered", batches=1), short("buffered", batches=3)
    counts = []
    for method in (plain, kept):
        environment, models = toy(method)
        *_, last = run(method, environment, models, until=4)
        counts.append(last.state.pieces["/return_moments"].count)
    assert counts[0] == counts[1] == 4 * 18


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(MethodError, match="cannot be collected in 5 equal parts"):
        short("props", blocks=5)
    with pytest.raises(MethodError, match="both be at least 1"):
        short("props", batches=0)
    with pytest.raises(MethodError, match=r"eps=1\.5 must be in"):
        short("props", eps=1.5)
    with pytest.raises(MethodError, match="epochs=0 must be at least 1"):
        sweeps(epochs=0)
    with pytest.raises(MethodError, match="limit=0 must be above 0"):
        sweeps(limit=0)
    with pytest.raises(MethodError, match="blocks=0 must be at least 1"):
        stage.kept(blocks=0)
    for twice in (("ros", "props"), ("props", "buffered")):
        with pytest.raises(MethodError, match="keeps earlier batches already"):
            find(twice[0])(find(twice[1])())
    with pytest.raises(MethodError, match="no option 'horizon'"):
        find("buffered")(find("gpomdp")())


def test_numbered_actions_are_told_what_to_set() -> None:
    k = case("choices", 0)
    method = k.shrink(find("props")(find("ppo")()))
    with pytest.raises(MethodError, match=r"wants 'mean' .* props\(kl_coef=0\), .* props\(preset='discrete'\)"):
        next(run(method, k.environment, k.models_of(method), until=1))


# -- the meter (checks 8 and 9) ----------------------------------------------------------------------------------


def test_count_error_by_hand() -> None:
    probs = torch.tensor([[0.5, 0.5], [0.25, 0.75]], dtype=torch.float64)
    obs, action = torch.tensor([0, 0, 1, 1, 1, 1]), torch.tensor([0, 1, 0, 1, 1, 1])
    assert count_error(probs, obs, action) == pytest.approx(0.0, abs=1e-15)
    assert count_error(probs, obs[:2], torch.tensor([0, 0])) == pytest.approx(math.log(2))


def test_count_error_of_a_sample_of_the_policy_is_what_theory_says() -> None:
    """Check 8: about `S (A - 1) / (2 N)`; 25 states, 4 actions, N = 1024 give .037 (the card's pilot: .0392)."""
    policy = TableSoftmax(25, 4, scale=0.5, seed=0)
    rng, made = torch.Generator().manual_seed(0), []
    for seed in range(40):
        environment = grid(seed=seed)
        rows = environment.rollout(policy.probs, 52, rng)
        obs, action = rows.obs.flatten()[:1024], rows.action.flatten()[:1024]
        error = count_error(policy.probs.detach(), obs, action)
        assert error >= 0
        made.append(error)
    assert 0.033 < sum(made) / len(made) < 0.042


def test_the_fitted_meter_agrees_with_the_counts_and_changes_nothing() -> None:
    """A table can fit the counts exactly, so both meters must agree; the run goes on bit for bit as without."""
    results, logged = [], 0.0
    for watched in (False, True):
        policy, phi = TableSoftmax(25, 4, scale=0.5, seed=1), TableSoftmax(25, 4)
        method = still(repair(), update=sgd(lr=20.0), horizon=64)
        if watched:
            method = method.then(sampling_error(every=1, epochs=400, lr=0.05))
        start = policy.logits.detach().clone()
        *_, last = run(method, grid(seed=1), {"policy": policy, "behavior": phi}, until=3, seed=1)
        assert torch.equal(policy.logits, start)
        results.append(phi.logits.detach().clone())
        logged = last.logs.get("sampling_error", 0.0)
    assert torch.equal(*results)
    batch = last.batch
    exact = count_error(policy.probs.detach(), batch.obs.flatten(), batch.action.flatten())
    assert logged == pytest.approx(exact, rel=0.05)


@piece("update")
def along(kit: Kit, closure: Closure, *, lr: float) -> tuple[dict[str, Any], bool]:
    """One gradient step, upwards for a negative lr: the sign that the released continuous code has for ROS."""
    made = closure()
    with torch.no_grad():
        for name, gradient in made.grads.items():
            closure.params[name].sub_(lr * gradient)
    return {}, False


def test_repair_lowers_the_sampling_error_and_the_wrong_sign_raises_it() -> None:
    """The mechanism, small: 192 steps on the grid, one seed a sign; what `claims/props.py` measures in full."""
    errors = {}
    for name, lr in (("away", 40.0), ("towards", -40.0), ("none", 0.0)):
        made = []
        for seed in range(3):
            policy, phi = TableSoftmax(25, 4, scale=0.5, seed=seed), TableSoftmax(25, 4)
            method = still(repair(eps=1.0), update=along(lr=lr), horizon=4)
            *_, last = run(method, grid(seed=seed), {"policy": policy, "behavior": phi}, until=48, seed=seed)
            batch = last.batch
            made.append(count_error(policy.probs.detach(), batch.obs.flatten(), batch.action.flatten()))
        errors[name] = sum(made) / len(made)
    assert errors["away"] < 0.8 * errors["none"] < 0.8 * errors["towards"]
