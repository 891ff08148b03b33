"""(N)-HARPG and N-PG-IGT: the card's exact checks, exact unbiasedness by enumeration, resume, memory."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.spikes import harpg as spike
from tests.spikes.harpg import (
    CASES,
    CURRENT,
    MIDPOINT,
    RandomMDP,
    TableSoftmax,
    corrected,
    follow,
    gpomdp,
    harpg,
    hessian_vector,
    n_pg_igt,
    n_sgdm,
    transported,
)
from trimtab.core.batch import Batch
from trimtab.core.closure import Closure
from trimtab.core.copies import mix, previous
from trimtab.core.kit import Kit
from trimtab.core.loop import begin, run
from trimtab.core.method import Method, Track
from trimtab.core.piece import piece
from trimtab.core.schedules import inverse
from trimtab.core.state import load, save
from trimtab.core.terms import Term

torch.set_num_threads(1)


def trained(method: Method, turns: int, **how: Any) -> Tensor:
    environment, models = spike.case(1)
    for _ in run(method, environment, models, until=turns, seed=5, **how):
        pass
    return models["policy"].logits.detach()


# -- rows of a batch, made by hand ----------------------------------------------------------------------------------


def every_trajectory(mdp: RandomMDP, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`obs`, `action` `[N, H]` of all trajectories, and their probabilities `[N]`."""
    steps = list(itertools.product(range(mdp.states), range(mdp.actions)))
    paths = torch.tensor(list(itertools.product(steps, repeat=mdp.horizon)))
    obs, action = paths[..., 0], paths[..., 1]
    chance = probs[obs, action].prod(1) / mdp.states
    return obs, action, chance * mdp.transition[obs[:, :-1], action[:, :-1], obs[:, 1:]].prod(1)


def enumerated(kit: Kit, name: str, n: int, point: int) -> Batch:
    """All trajectories of a model; rewards times `N p(tau)`, so that a mean over rows is an expectation."""
    policy: Any = kit.models[name]
    obs, action, chance = every_trajectory(kit.environment, policy.logits.softmax(-1))
    return rows(obs, action, kit.environment.reward[obs, action] * (len(obs) * chance)[:, None], point)


def rows(obs: Tensor, action: Tensor, reward: Tensor, point: int) -> Batch:
    n = len(obs)
    zeros = torch.zeros(n, dtype=torch.long)
    return Batch(
        {
            "obs": obs,
            "action": action,
            "mask": torch.ones_like(obs, dtype=torch.bool),
            "reward": reward,
            "logp_behavior": torch.zeros_like(reward),
            "source": zeros,
            "age": zeros,
            "point": torch.full((n,), point),
        }
    )


def closure_on(batch: Batch, policy: TableSoftmax, mdp: RandomMDP, memory: int | None = None) -> Closure:
    method = gpomdp(discount=mdp.discount) if mdp.discount != 0.9 else gpomdp()
    state = begin(method, mdp, {"policy": policy})
    kit = Kit(state, method, memory, False)
    (credit,) = (p for p in method.pieces if p.stage == "credit")
    return Closure(kit, method.tracks[0], kit.annotate(credit, batch))


@pytest.fixture
def tiny() -> tuple[RandomMDP, TableSoftmax, Closure]:
    mdp = RandomMDP(states=2, actions=2, horizon=2, seed=3)
    policy = TableSoftmax(2, 2, seed=4)
    obs, action, chance = every_trajectory(mdp, policy.logits.detach().softmax(-1))
    assert chance.sum() == pytest.approx(1)
    batch = rows(obs, action, mdp.reward[obs, action] * (len(obs) * chance)[:, None], MIDPOINT)
    return mdp, policy, closure_on(batch, policy, mdp)


def along(closure: Closure, v: Tensor) -> Tensor:
    at = {n: p.detach() for n, p in closure.params.items()}
    return hessian_vector(closure, at, torch.ones(len(closure.batch), dtype=torch.bool), {"logits": v})["logits"]


# -- the estimators are unbiased, exactly ---------------------------------------------------------------------------


def test_gradient_is_unbiased_by_enumeration(tiny: tuple[RandomMDP, TableSoftmax, Closure]) -> None:
    mdp, policy, closure = tiny
    (exact,) = torch.autograd.grad(mdp.objective(policy.logits), policy.logits)
    assert (closure().grads["logits"] + exact).abs().max() < 1e-12


def test_hessian_vector_is_unbiased_by_enumeration(tiny: tuple[RandomMDP, TableSoftmax, Closure]) -> None:
    mdp, policy, closure = tiny
    hessian = torch.autograd.functional.hessian(mdp.objective, policy.logits.detach()).reshape(4, 4)
    for v in torch.eye(4, dtype=torch.float64):
        assert (along(closure, v.reshape(2, 2)).flatten() + hessian @ v).abs().max() < 1e-10
    assert hessian.abs().max() > 1e-2


@pytest.mark.parametrize("mutant", ["flipped", "missing", "batch means"])
def test_a_wrong_outer_term_is_seen(
    tiny: tuple[RandomMDP, TableSoftmax, Closure], monkeypatch: pytest.MonkeyPatch, mutant: str
) -> None:
    mdp, policy, closure = tiny
    right = spike.score_along
    wrong = {
        "flipped": lambda *a: -right(*a),
        "missing": lambda *a: 0 * right(*a),
        "batch means": lambda *a: right(*a).mean().expand(len(a[0])),
    }[mutant]
    monkeypatch.setattr(spike, "score_along", wrong)
    v = torch.tensor([[1.0, -0.5], [0.3, 0.2]], dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(mdp.objective, policy.logits.detach()).reshape(4, 4)
    assert (along(closure, v).flatten() + hessian @ v.flatten()).abs().max() > 1e-2


def test_path_identity() -> None:
    """Check 4: the mean over q of `hess J D` on the segment is the gradient difference (Gauss-Legendre, 12 points)."""
    mdp = RandomMDP(states=2, actions=2, horizon=2, seed=3)
    before, after = TableSoftmax(2, 2, seed=4).logits.detach(), TableSoftmax(2, 2, seed=5).logits.detach()
    nodes, share = torch.from_numpy(np.stack(np.polynomial.legendre.leggauss(12)))
    total = torch.zeros(2, 2, dtype=torch.float64)
    for x, w in zip(nodes, share):
        policy = TableSoftmax(2, 2)
        policy.logits.data.copy_(before + (x + 1) / 2 * (after - before))
        obs, action, chance = every_trajectory(mdp, policy.logits.detach().softmax(-1))
        batch = rows(obs, action, mdp.reward[obs, action] * (len(obs) * chance)[:, None], MIDPOINT)
        total += w / 2 * along(closure_on(batch, policy, mdp), after - before)
    gradients = []
    for table in (before, after):
        leaf = table.clone().requires_grad_()
        gradients.append(torch.autograd.grad(mdp.objective(leaf), leaf)[0])
    assert (total + gradients[1] - gradients[0]).abs().max() < 1e-9


def test_closed_form_of_one_decision() -> None:
    """Checks 6 and 9: `hess log pi(a|s) v = -pi o (v_s - <pi, v_s>)` on row s, independent of a."""
    mdp = RandomMDP(states=2, actions=3, horizon=1, seed=0)
    policy = TableSoftmax(2, 3, seed=1)
    pi = policy.logits.detach().softmax(-1)[1]
    v = torch.tensor([[0.1, 0.2, 0.3], [1.0, -2.0, 0.5]], dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)
    for a in range(3):
        batch = rows(torch.tensor([[1]]), torch.tensor([[a]]), one, MIDPOINT)
        score = torch.eye(3, dtype=torch.float64)[a] - pi
        exact = -pi * (v[1] - pi @ v[1]) + score * (score @ v[1])
        made = along(closure_on(batch, policy, mdp), v)
        assert torch.allclose(-made[1], exact, atol=1e-14)
        assert (made[0] == 0).all()
    uniform = TableSoftmax(1, 2)
    for a, expected in ((0, [0.5, -0.5]), (1, [0.0, 0.0])):
        batch = rows(torch.tensor([[0]]), torch.tensor([[a]]), one * (a == 0), CURRENT)
        assert (-closure_on(batch, uniform, mdp)().grads["logits"][0]).tolist() == expected


# -- exact transport on a noise-free quadratic (check 2) -------------------------------------------------------------


class Quadratic(nn.Module):
    """`J(x) = b x - x A x / 2`, whatever the rows are; its trajectories have probability one."""

    provides = frozenset({"energy"})

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))

    def gradient(self) -> Tensor:
        return QUADRATIC[1] - QUADRATIC[0] @ self.x.detach()

    def evaluate(self, batch: Batch, want: frozenset[str]) -> dict[str, Tensor]:
        objective = QUADRATIC[1] @ self.x - self.x @ QUADRATIC[0] @ self.x / 2
        return {"energy": objective.expand(len(batch), 1)}


QUADRATIC = (
    torch.tensor([[2.0, 0.3, 0.0], [0.3, 1.0, 0.1], [0.0, 0.1, 0.5]], dtype=torch.float64),
    torch.tensor([0.2, 1.0, -0.4], dtype=torch.float64),
)


@piece("loss", slot="objective", wants=("energy",), per="row_sum")
def energy(batch: Batch, now: Any) -> list[Term]:
    return [Term(-now["energy"], "objective"), Term(0 * now["energy"], "log_prob", metric=True)]


@piece("collect", writes=("mask", "point", "source"))
def two_rows() -> Batch:
    ones = torch.ones(2, 1, dtype=torch.bool)
    return Batch({"mask": ones, "point": torch.tensor([CURRENT, MIDPOINT]), "source": torch.zeros(2, dtype=torch.long)})


@pytest.mark.parametrize("eta", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("direction", ["transported", "corrected", "averaging"])
def test_transport_is_exact_on_a_quadratic(direction: str, eta: float) -> None:
    part = getattr(spike, direction)(eta)
    method = Method(
        "quadratic",
        pieces=(two_rows(),),
        tracks=(Track("policy", trains="policy", pieces=(energy(),), update=follow(direction=part, lr=0.3)),),
        copies={
            "previous": previous("policy"),
            "midpoint": mix("policy", "previous", "uniform"),
            "lookahead": mix("policy", "previous", 1 / eta),
        },
    )
    model, worst = Quadratic(), 0.0
    exact = model.gradient()
    for step in run(method, nothing(), {"policy": model}, until=15):
        d = step.state.pieces["policy/estimate"]["d"]["x"]
        worst = max(worst, float((d + exact).abs().max()))
        exact = model.gradient()
    if direction == "averaging" and eta < 1:
        assert worst > 1e-2  # plain momentum lags behind
    else:
        assert worst < 1e-12


def nothing() -> RandomMDP:
    """An environment that nobody asks."""
    return RandomMDP(states=2, actions=2, horizon=1)


# -- neutral settings (check 1) --------------------------------------------------------------------------------------

NEUTRAL = {
    "n_sgdm": (n_sgdm, {}),
    "n_pg_igt": (n_pg_igt, {}),
    "harpg": (harpg, {}),
    "n_harpg": (harpg, {"unit": True, "decay": 1.0}),
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_eta_one_is_the_base(name: str) -> None:
    definition, options = NEUTRAL[name]
    assert definition.neutral is not None
    base = gpomdp(**{**definition.neutral.base_options, **options})
    method = definition(**{**definition.neutral.options, **options})
    assert torch.equal(trained(method, 20), trained(base, 20))
    assert not torch.equal(trained(definition(**options), 20), trained(base, 20))


# -- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["n_pg_igt", "n_harpg", "n_sgdm"])
def test_a_normalised_step_has_length_lr(name: str) -> None:
    environment, models = spike.case(2)
    before = models["policy"].logits.detach().clone()
    for t, _ in enumerate(run(CASES[name][0](lr=0.7), environment, models, until=10)):
        now = models["policy"].logits.detach().clone()
        assert (now - before).norm() == pytest.approx(0.7 * 2 / (t + 2), abs=1e-14)
        before = now


@pytest.mark.parametrize("name", CASES)
def test_zero_reward_does_not_move_nor_give_nan(name: str) -> None:
    environment, models = spike.case(2)
    environment.reward.zero_()
    before = models["policy"].logits.detach().clone()
    for _ in run(CASES[name][0](), environment, models, until=4):
        assert torch.equal(models["policy"].logits.detach(), before)


def test_zero_reward_decays_the_direction_geometrically() -> None:
    """Check 7: with g = v = 0 from turn 5 on, `d <- (1 - eta) d`."""
    environment, models = spike.case(2)
    norms = []
    for step in run(harpg(eta0=0.25, eta_decay=0.0), environment, models, until=10):
        if step.turn == 5:
            environment.reward.zero_()
        norms.append(float(step.state.pieces["policy/estimate"]["d"]["logits"].norm()))
    for old, new in itertools.pairwise(norms[4:]):
        assert new == pytest.approx(0.75 * old)


def test_no_move_no_correction() -> None:
    """Check 7: `theta_t = theta_{t-1}` gives `v_t = 0`, exactly; also at the first turn."""
    seen = []

    def spy(*args: Any) -> Any:
        made = hessian_vector(*args)
        seen.append(float(made["logits"].abs().max()))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spike, "hessian_vector", spy)
        trained(harpg(lr=0.0), 3)
        assert seen == [0.0, 0.0, 0.0]
        seen.clear()
        trained(harpg(), 3)
        assert seen[0] == 0.0
        assert min(seen[1:]) > 0


@pytest.mark.parametrize("name", ["n_pg_igt", "harpg"])
def test_parameters_are_restored_after_evaluating_elsewhere(name: str) -> None:
    """Check 8: with a step of 0 the parameters keep their bits and their identity."""
    environment, models = spike.case(3)
    policy = models["policy"]
    parameter, before = policy.logits, policy.logits.detach().clone()
    for _ in run(CASES[name][0](lr=0.0), environment, models, until=3):
        pass
    assert policy.logits is parameter
    assert torch.equal(policy.logits.detach(), before)


def test_points_are_where_the_card_puts_them() -> None:
    """`theta~ = theta_t / eta_t + (1 - 1 / eta_t) theta_{t-1}`; `theta^ = q theta_t + (1 - q) theta_{t-1}`."""
    environment, models = spike.case(3)
    tables = [models["policy"].logits.detach().clone()] * 2  # theta_{t-1}, theta_t
    for t, step in enumerate(run(n_pg_igt(lr=0.5), environment, models, until=5)):
        eta = min(1.0, (2 / (t + 2)) ** 0.8)
        looked = step.state.copies["lookahead"].module.logits
        assert torch.allclose(looked, tables[1] + (1 - eta) / eta * (tables[1] - tables[0]), atol=1e-14)
        tables = [tables[1], models["policy"].logits.detach().clone()]
    environment, models = spike.case(3)
    tables, qs = [models["policy"].logits.detach().clone()] * 2, []
    for step in run(harpg(lr=0.5), environment, models, until=5):
        kept = step.state.copies["midpoint"]
        q = kept.memory["q"]
        qs.append(q)
        assert torch.allclose(kept.module.logits, q * tables[1] + (1 - q) * tables[0], atol=1e-14)
        assert torch.equal(step.state.copies["previous"].module.logits, tables[1]), (
            "after its turn, the point before it"
        )
        tables = [tables[1], models["policy"].logits.detach().clone()]
    assert len(set(qs)) == 5


# -- resume, memory, debug -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_resume_is_bitwise(name: str, tmp_path: Path) -> None:
    method = CASES[name][0]()
    whole = trained(method, 8)
    environment, models = spike.case(1)
    *_, last = run(method, environment, models, until=4, seed=5)
    save(last.state, tmp_path)
    environment, models = spike.case(9)
    state = begin(method, environment, models, seed=77)
    load(state, tmp_path)
    for _ in run(method, environment, models, until=8, state=state):
        pass
    assert torch.equal(models["policy"].logits.detach(), whole)
    assert environment.episodes == (16 if "harpg" in name else 8)


@pytest.mark.parametrize("memory", [1, 3])
def test_memory_changes_nothing(memory: int) -> None:
    method = harpg(gpomdp(episodes=5), hessian_episodes=4)
    assert (trained(method, 6, memory=memory) - trained(method, 6)).abs().max() < 1e-10


@pytest.mark.parametrize("name", CASES)
def test_declarations_are_complete(name: str) -> None:
    assert torch.equal(trained(CASES[name][0](), 3, debug=True), trained(CASES[name][0](), 3))


# -- noise-free HARPG through the loop; tracking ----------------------------------------------------------------------


def test_noise_free_error_is_the_path_error_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With exact expectations `d_t - grad` obeys `e_t = (1 - eta) (e_{t-1} + H(theta^) D - (g_t - g_{t-1}))`."""
    mdp, policy = RandomMDP(states=2, actions=2, horizon=2, seed=3), TableSoftmax(2, 2, seed=4)
    monkeypatch.setattr(spike, "episodes_of", enumerated)
    method = harpg(lr=0.5, eta0=0.5, eta_decay=0.0)

    def exact(table: Tensor) -> Tensor:
        leaf = table.clone().requires_grad_()
        return -torch.autograd.grad(mdp.objective(leaf), leaf)[0]

    tables = [policy.logits.detach().clone()]
    error = torch.zeros(2, 2, dtype=torch.float64)
    for step in run(method, mdp, {"policy": policy}, until=6):
        if len(tables) > 1:
            at, moved = step.state.copies["midpoint"].module.logits.detach(), tables[-1] - tables[-2]
            change = torch.autograd.functional.hvp(lambda x: -mdp.objective(x), at, moved)[1]
            error = 0.5 * (error + change - (exact(tables[-1]) - exact(tables[-2])))
        d = step.state.pieces["policy/estimate"]["d"]["logits"]
        assert (d - exact(tables[-1]) - error).abs().max() < 1e-12
        tables.append(policy.logits.detach().clone())


def test_tracking_error_falls() -> None:
    """RMS |d - grad J| of N-HARPG, one trajectory per gradient: it falls, and ends below a single gradient's noise."""
    squares: dict[int, list[float]] = {1: [], 10: [], 80: []}
    for seed in range(3):
        mdp, policy = RandomMDP(horizon=8), TableSoftmax(6, 3)
        before = policy.logits.detach().clone()
        for step in run(harpg(preset="normalised", lr=1.0), mdp, {"policy": policy}, until=80, seed=seed):
            if step.turn in squares:
                leaf = before.clone().requires_grad_()
                (exact,) = torch.autograd.grad(mdp.objective(leaf), leaf)
                d = step.state.pieces["policy/estimate"]["d"]["logits"]
                squares[step.turn].append(float((d + exact).square().sum()))
            before = policy.logits.detach().clone()
    rms = {t: math.sqrt(sum(s) / len(s)) for t, s in squares.items()}
    assert rms[80] < 0.5 * rms[1]
    assert rms[80] < 0.5 * rms[10]


def test_the_methods_say_what_they_change() -> None:
    method = harpg(preset="normalised", eta0=0.5)
    assert method.get("update.direction").name == "corrected"
    assert n_pg_igt().get("update.direction.eta") == n_pg_igt().copies["lookahead"].options["q"].other
    assert isinstance(n_pg_igt().copies["lookahead"].options["q"], inverse)
    assert {p.name for p in (transported(1.0), corrected(1.0))} == {"transported", "corrected"}
