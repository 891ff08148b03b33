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

from tests.golden.compared import agreed
from tests.golden.momentum_runs import BUILT, fresh, turns
from trimtab.core.batch import Batch
from trimtab.core.closure import Closure
from trimtab.core.copies import mix, previous
from trimtab.core.errors import MethodError, NonFiniteError
from trimtab.core.kit import Kit
from trimtab.core.loop import begin, run
from trimtab.core.method import Method, Track
from trimtab.core.piece import piece
from trimtab.core.registry import find
from trimtab.core.schedules import inverse
from trimtab.core.state import load, save
from trimtab.core.terms import Term
from trimtab.environments.tabular import TabularEnvironment, random_mdp
from trimtab.policies.tabular import TableSoftmax
from trimtab.stages import momentum, returns
from trimtab.stages.momentum import CURRENT, ELSEWHERE, follow, hessian_vector, with_log_prob

torch.set_num_threads(1)


def trained(method: Method, turns: int, **how: Any) -> Tensor:
    environment, policy = fresh(1)
    for _ in run(method, environment, {"policy": policy}, until=turns, seed=5, **how):
        pass
    return policy.logits.detach()


def objective(environment: TabularEnvironment, logits: Tensor) -> Tensor:
    return environment.objective(logits.softmax(-1), 0.99)


def test_the_normalised_method_agrees_with_its_twin() -> None:
    """The others are under `tests/golden/test_twins`."""
    for seed in (0, 1, 2):
        assert agreed(turns("n_harpg", seed), "n_harpg") == 5


# -- rows of a batch, made by hand ----------------------------------------------------------------------------------


def every_trajectory(mdp: TabularEnvironment, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`obs`, `action` `[N, H]` of all trajectories, and their probabilities `[N]`."""
    steps = list(itertools.product(range(mdp.states), range(mdp.actions)))
    paths = torch.tensor(list(itertools.product(steps, repeat=mdp.horizon)))
    obs, action = paths[..., 0], paths[..., 1]
    chance = probs[obs, action].prod(1) / mdp.states
    return obs, action, chance * mdp.transition[obs[:, :-1], action[:, :-1], obs[:, 1:]].prod(1)


def rows(obs: Tensor, action: Tensor, reward: Tensor, point: int) -> Batch:
    n = len(obs)
    return Batch(
        {
            "obs": obs,
            "action": action,
            "mask": torch.ones_like(obs, dtype=torch.bool),
            "reward": reward,
            "logp_behavior": torch.zeros_like(reward),
            "source": torch.zeros(n, dtype=torch.long),
            "age": torch.zeros(n, dtype=torch.long),
            "point": torch.full((n,), point),
        }
    )


def closure_on(batch: Batch, policy: TableSoftmax, mdp: TabularEnvironment, memory: int | None = None) -> Closure:
    method = find("gpomdp")().wrap("surrogate", with_log_prob())
    kit = Kit(begin(method, mdp, {"policy": policy}), method, memory, False)
    (credit,) = (p for p in method.pieces if p.stage == "credit")
    return Closure(kit, method.tracks[0], kit.annotate(credit, batch))


Tiny = tuple[TabularEnvironment, TableSoftmax, Closure]


def tiny_mdp(**how: Any) -> TabularEnvironment:
    return random_mdp(states=2, actions=how.pop("actions", 2), horizon=how.pop("horizon", 2), tables=3, **how)


@pytest.fixture
def tiny() -> Tiny:
    mdp, policy = tiny_mdp(), TableSoftmax(2, 2, scale=1.0, seed=4)
    obs, action, chance = every_trajectory(mdp, policy.probs.detach())
    assert chance.sum() == pytest.approx(1)
    batch = rows(obs, action, mdp.reward[obs, action] * (len(obs) * chance)[:, None], ELSEWHERE)
    return mdp, policy, closure_on(batch, policy, mdp)


def along(closure: Closure, v: Tensor, outer: float = 1.0) -> Tensor:
    at = {n: p.detach() for n, p in closure.params.items()}
    everything = torch.ones(len(closure.batch), dtype=torch.bool)
    return hessian_vector(closure, at, everything, {"logits": v}, outer)["logits"]


# -- the estimators are unbiased, exactly ---------------------------------------------------------------------------


def test_gradient_is_unbiased_by_enumeration(tiny: Tiny) -> None:
    mdp, policy, closure = tiny
    (exact,) = torch.autograd.grad(objective(mdp, policy.logits), policy.logits)
    assert (closure().grads["logits"] + exact).abs().max() < 1e-12


def test_hessian_vector_is_unbiased_by_enumeration(tiny: Tiny) -> None:
    mdp, policy, closure = tiny
    hessian = torch.autograd.functional.hessian(lambda x: objective(mdp, x), policy.logits.detach()).reshape(4, 4)
    for v in torch.eye(4, dtype=torch.float64):
        assert (along(closure, v.reshape(2, 2)).flatten() + hessian @ v).abs().max() < 1e-10
    assert hessian.abs().max() > 1e-2


@pytest.mark.parametrize("mutant", ["flipped", "missing", "batch means"])
def test_a_wrong_outer_term_is_seen(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    mdp, policy, closure = tiny
    right = momentum.score_along
    wrong = {
        "flipped": lambda *a: -right(*a),
        "missing": lambda *a: 0 * right(*a),
        "batch means": lambda *a: right(*a).mean().expand(len(a[0])),
    }[mutant]
    monkeypatch.setattr(momentum, "score_along", wrong)
    v = torch.tensor([[1.0, -0.5], [0.3, 0.2]], dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(lambda x: objective(mdp, x), policy.logits.detach()).reshape(4, 4)
    assert (along(closure, v).flatten() + hessian @ v.flatten()).abs().max() > 1e-2


def test_path_identity() -> None:
    """Check 4: the mean over q of `hess J D` on the segment is the gradient difference (Gauss-Legendre, 12 points)."""
    mdp = tiny_mdp()
    before, after = (TableSoftmax(2, 2, scale=1.0, seed=k).logits.detach() for k in (4, 5))
    nodes, share = torch.from_numpy(np.stack(np.polynomial.legendre.leggauss(12)))
    total = torch.zeros(2, 2, dtype=torch.float64)
    for x, w in zip(nodes, share):
        policy = TableSoftmax(2, 2)
        policy.logits.data.copy_(before + (x + 1) / 2 * (after - before))
        obs, action, chance = every_trajectory(mdp, policy.logits.detach().softmax(-1))
        batch = rows(obs, action, mdp.reward[obs, action] * (len(obs) * chance)[:, None], ELSEWHERE)
        total += w / 2 * along(closure_on(batch, policy, mdp), after - before)
    gradients = []
    for table in (before, after):
        leaf = table.clone().requires_grad_()
        gradients.append(torch.autograd.grad(objective(mdp, leaf), leaf)[0])
    assert (total + gradients[1] - gradients[0]).abs().max() < 1e-9


def test_closed_form_of_one_decision() -> None:
    """Checks 6 and 9: `hess log pi(a|s) v = -pi o (v_s - <pi, v_s>)` on row s, independent of a."""
    mdp = tiny_mdp(actions=3, horizon=1)
    policy = TableSoftmax(2, 3, scale=1.0, seed=1)
    pi = policy.logits.detach().softmax(-1)[1]
    v = torch.tensor([[0.1, 0.2, 0.3], [1.0, -2.0, 0.5]], dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)
    for a in range(3):
        batch = rows(torch.tensor([[1]]), torch.tensor([[a]]), one, ELSEWHERE)
        score = torch.eye(3, dtype=torch.float64)[a] - pi
        exact = -pi * (v[1] - pi @ v[1]) + score * (score @ v[1])
        made = along(closure_on(batch, policy, mdp), v)
        assert torch.allclose(-made[1], exact, atol=1e-14)
        assert (made[0] == 0).all()
    uniform = TableSoftmax(2, 2)
    mdp = tiny_mdp(horizon=1)
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
    return Batch(
        {"mask": ones, "point": torch.tensor([CURRENT, ELSEWHERE]), "source": torch.zeros(2, dtype=torch.long)}
    )


@pytest.mark.parametrize("eta", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("direction", ["transported", "corrected", "averaging"])
def test_transport_is_exact_on_a_quadratic(direction: str, eta: float) -> None:
    part = getattr(momentum, direction)(eta)
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


def nothing() -> TabularEnvironment:
    """An environment that nobody asks."""
    return tiny_mdp()


# -- neutral settings (check 1) --------------------------------------------------------------------------------------


NEUTRAL: dict[str, dict[str, Any]] = {
    "n_sgdm": {"lr": 0.1, "unit": True, "decay": 1.0},
    "n_pg_igt": {"lr": 0.1, "unit": True, "decay": 1.0},
    "harpg": {"decay": 0.5},
    "n_harpg": {"lr": 0.1, "unit": True, "decay": 1.0},
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_eta_one_is_the_base(name: str) -> None:
    base = trained(BUILT["gpomdp"](**NEUTRAL[name]), 20)
    assert torch.equal(trained(BUILT[name](eta_decay=0.0), 20), base)
    assert not torch.equal(trained(BUILT[name](), 20), base)


# -- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["n_pg_igt", "n_harpg", "n_sgdm"])
def test_a_normalised_step_has_length_lr(name: str) -> None:
    environment, policy = fresh(2)
    before = policy.logits.detach().clone()
    for t, _ in enumerate(run(BUILT[name](lr=0.7), environment, {"policy": policy}, until=10)):
        now = policy.logits.detach().clone()
        assert (now - before).norm() == pytest.approx(0.7 * 2 / (t + 2), abs=1e-14)
        before = now


@pytest.mark.parametrize("name", BUILT)
def test_zero_reward_does_not_move_nor_give_nan(name: str) -> None:
    environment, policy = fresh(2)
    environment.reward.zero_()
    before = policy.logits.detach().clone()
    for _ in run(BUILT[name](), environment, {"policy": policy}, until=4):
        assert torch.equal(policy.logits.detach(), before)


def test_zero_reward_decays_the_direction_geometrically() -> None:
    """Check 7: with g = v = 0 from turn 5 on, `d <- (1 - eta) d`."""
    environment, policy = fresh(2)
    norms = []
    for step in run(BUILT["harpg"](eta0=0.25, eta_decay=0.0), environment, {"policy": policy}, until=10):
        if step.turn == 5:
            environment.reward.zero_()
        norms.append(float(step.state.pieces["policy/estimate"]["d"]["logits"].norm()))
    for old, new in itertools.pairwise(norms[4:]):
        assert new == pytest.approx(0.75 * old)


def test_no_move_no_correction() -> None:
    """Check 7: `theta_t = theta_{t-1}` gives `v_t = 0`, exactly."""
    seen = []

    def spy(*args: Any) -> Any:
        made = hessian_vector(*args)
        seen.append(float(made["logits"].abs().max()))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(momentum, "hessian_vector", spy)
        trained(BUILT["harpg"](lr=0.0), 3)
        assert seen == [0.0, 0.0], "at the first turn eta is 1, and nothing is played elsewhere"
        seen.clear()
        trained(BUILT["harpg"](eta0=0.5), 3)
        assert seen[0] == 0.0, "theta_{-1} = theta_0"
        assert min(seen[1:]) > 0


@pytest.mark.parametrize("name", ["n_pg_igt", "harpg"])
def test_parameters_are_restored_after_evaluating_elsewhere(name: str) -> None:
    """Check 8: with a step of 0 the parameters keep their bits and their identity."""
    environment, policy = fresh(3)
    parameter, before = policy.logits, policy.logits.detach().clone()
    for _ in run(BUILT[name](lr=0.0), environment, {"policy": policy}, until=3):
        pass
    assert policy.logits is parameter
    assert torch.equal(policy.logits.detach(), before)


def test_points_are_where_the_card_puts_them() -> None:
    """`theta~ = theta_t / eta_t + (1 - 1 / eta_t) theta_{t-1}`; `theta^ = q theta_t + (1 - q) theta_{t-1}`."""
    environment, policy = fresh(3)
    points = [policy.logits.detach().clone()] * 2  # theta_{t-1}, theta_t
    for t, step in enumerate(run(BUILT["n_pg_igt"](lr=0.5), environment, {"policy": policy}, until=5)):
        eta = min(1.0, (2 / (t + 2)) ** 0.8)
        looked = step.state.copies["lookahead"].module.logits
        assert torch.allclose(looked, points[1] + (1 - eta) / eta * (points[1] - points[0]), atol=1e-14)
        points = [points[1], policy.logits.detach().clone()]
    environment, policy = fresh(3)
    points, qs = [policy.logits.detach().clone()] * 2, []
    for step in run(BUILT["harpg"](lr=0.5), environment, {"policy": policy}, until=5):
        kept = step.state.copies["midpoint"]
        q = kept.memory["q"]
        qs.append(q)
        assert torch.allclose(kept.module.logits, q * points[1] + (1 - q) * points[0], atol=1e-14)
        assert torch.equal(step.state.copies["previous"].module.logits, points[1]), (
            "after its turn, the point before it"
        )
        points = [points[1], policy.logits.detach().clone()]
    assert len(set(qs)) == 5


# -- resume, memory, debug -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILT)
def test_resume_is_bitwise(name: str, tmp_path: Path) -> None:
    method = BUILT[name]()
    whole = trained(method, 8)
    environment, policy = fresh(1)
    *_, last = run(method, environment, {"policy": policy}, until=4, seed=5)
    save(last.state, tmp_path)
    environment, policy = fresh(9)
    state = begin(method, environment, {"policy": policy}, seed=77)
    load(state, tmp_path)
    for _ in run(method, environment, {"policy": policy}, until=8, state=state):
        pass
    assert torch.equal(policy.logits.detach(), whole)
    # One episode a turn, and one more from elsewhere in every turn but the first, whose eta is 1.
    assert environment.state_dict()["next_episode"] - 1 == (15 if "harpg" in name else 8)


@pytest.mark.parametrize("memory", [1, 3])
def test_memory_changes_nothing(memory: int) -> None:
    method = find("harpg")(find("gpomdp")(count=5), count=4)
    assert (trained(method, 6, memory=memory) - trained(method, 6)).abs().max() < 1e-10


@pytest.mark.parametrize("name", BUILT)
def test_declarations_are_complete(name: str) -> None:
    assert torch.equal(trained(BUILT[name](), 3, debug=True), trained(BUILT[name](), 3))


# -- noise-free HARPG through the loop; tracking ----------------------------------------------------------------------


@piece("collect", writes=("obs", "action", "mask", "reward", "logp_behavior", "source", "age", "point"),
       uses=lambda options: (options["policy"],))  # fmt: skip
def enumerated(kit: Kit, *, policy: str = "policy", count: int = 1) -> Batch:
    """All trajectories of a policy; rewards times `N p(tau)`, so that a mean over rows is an expectation."""
    model: Any = kit.models[policy]
    obs, action, chance = every_trajectory(kit.environment, model.probs)
    paid = kit.environment.reward[obs, action] * (count * len(obs) * chance)[:, None]
    return rows(obs, action, paid, CURRENT)


def test_noise_free_error_is_the_path_error_alone() -> None:
    """With exact expectations `d_t - grad` obeys `e_t = (1 - eta) (e_{t-1} + H(theta^) D - (g_t - g_{t-1}))`."""
    mdp, policy = tiny_mdp(), TableSoftmax(2, 2, scale=1.0, seed=4)
    method = find("harpg")(find("gpomdp")().swap("collect", enumerated()), lr=0.5, eta0=0.5, eta_decay=0.0)

    def exact(table: Tensor) -> Tensor:
        leaf = table.clone().requires_grad_()
        return -torch.autograd.grad(objective(mdp, leaf), leaf)[0]

    points = [policy.logits.detach().clone()]
    error = torch.zeros(2, 2, dtype=torch.float64)
    for step in run(method, mdp, {"policy": policy}, until=6):
        if len(points) > 1:
            at, moved = step.state.copies["midpoint"].module.logits.detach(), points[-1] - points[-2]
            change = torch.autograd.functional.hvp(lambda x: -objective(mdp, x), at, moved)[1]
            error = 0.5 * (error + change - (exact(points[-1]) - exact(points[-2])))
        d = step.state.pieces["policy/estimate"]["d"]["logits"]
        assert (d - exact(points[-1]) - error).abs().max() < 1e-12
        points.append(policy.logits.detach().clone())


def test_tracking_error_falls() -> None:
    """RMS |d - grad J| of N-HARPG, one trajectory per gradient: it falls, and ends below a single gradient's noise."""
    squares: dict[int, list[float]] = {1: [], 10: [], 80: []}
    for seed in range(3):
        mdp, policy = random_mdp(horizon=8), TableSoftmax(6, 3)
        before = policy.logits.detach().clone()
        for step in run(BUILT["n_harpg"](lr=1.0), mdp, {"policy": policy}, until=80, seed=seed):
            if step.turn in squares:
                leaf = before.clone().requires_grad_()
                (exact,) = torch.autograd.grad(objective(mdp, leaf), leaf)
                d = step.state.pieces["policy/estimate"]["d"]["logits"]
                squares[step.turn].append(float((d + exact).square().sum()))
            before = policy.logits.detach().clone()
    rms = {t: math.sqrt(sum(s) / len(s)) for t, s in squares.items()}
    assert rms[80] < 0.5 * rms[1]
    assert rms[80] < 0.5 * rms[10]


def test_the_methods_say_what_they_change() -> None:
    method = BUILT["n_harpg"](eta0=0.5)
    assert method.get("update.direction").name == "corrected"
    assert method.get("collect.also.policy") == "midpoint"
    igt = BUILT["n_pg_igt"]()
    ahead = igt.copies["lookahead"].options["q"]
    assert isinstance(ahead, inverse)
    assert igt.get("update.direction.eta") == ahead.other


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: momentum.averaging(0.0), "eta=0.0 must be in"),
        (lambda: momentum.corrected(1.5), "eta=1.5 must be in"),
        (lambda: follow(direction=momentum.gradient(), lr=-1.0), "lr=-1.0 must be at least 0"),
        (lambda: find("gpomdp")(discount=1.1), "discount=1.1 must be in"),
        (lambda: find("gpomdp")(baseline=1.0), "baseline=1.0 must be in"),
        (lambda: find("n_pg_igt")(find("n_sgdm")()), "both swap"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any, sentence: str) -> None:
    with pytest.raises(MethodError, match=sentence):
        make()


def test_a_direction_that_is_not_finite_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    environment, policy = fresh(2)
    monkeypatch.setattr(momentum, "score_along", lambda log_prob, *_: torch.full_like(log_prob, float("inf")))
    turns = run(BUILT["harpg"](), environment, {"policy": policy}, until=3)
    next(turns)
    before = policy.logits.detach().clone()
    with pytest.raises(NonFiniteError, match="direction of track 'policy' is not finite"):
        next(turns)
    assert torch.equal(policy.logits.detach(), before)


def test_steps_that_grew_too_long_are_refused_with_what_to_set() -> None:
    def ended(method: Method) -> str:
        environment, policy = fresh(2)
        turns = run(method, environment, {"policy": policy}, until=3)
        next(turns)
        with torch.no_grad():
            policy.logits.fill_(float("nan"))
        with pytest.raises(NonFiniteError) as error:
            next(turns)
        return str(error.value)

    assert "set update.unit=True" in ended(find("harpg")(find("gpomdp")()))
    assert "set update.unit=True" not in ended(find("harpg")(find("gpomdp")(), preset="normalised")), "it is set"


# -- the baseline ----------------------------------------------------------------------------------------------------


def test_rewards_to_go_by_hand() -> None:
    """Rewards 1, 2, 4 at discount 1/2: from the start 1 + 1 + 1; from each decision 3, 4, 4."""
    reward = torch.tensor([[1.0, 2.0, 4.0], [8.0, 0.0, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    batch = Batch({"reward": reward, "mask": mask})
    environment, policy = fresh(0)
    method = find("gpomdp")()
    state = begin(method, environment, {"policy": policy})
    kit = Kit(state, method, None, False)
    made = returns.reward_to_go(discount=0.5)(kit, batch).advantage
    assert made.tolist() == [[3.0, 2.0, 1.0], [8.0, 0.0, 0.0]]
    made = returns.reward_to_go(discount=0.5, from_start=False)(kit, batch).advantage
    assert made.tolist() == [[3.0, 4.0, 4.0], [8.0, 0.0, 0.0]]
    credit = returns.reward_to_go(discount=0.5, baseline=0.75)
    assert credit(kit, batch).advantage.tolist() == [[3.0, 2.0, 1.0], [8.0, 0.0, 0.0]], "nothing was seen before"
    assert state.pieces["/baseline"].tolist() == [5.5, 2.0, 1.0]
    assert credit(kit, batch).advantage.tolist() == [[-2.5, 0.0, 0.0], [2.5, 0.0, 0.0]]
    credit(kit, batch.put(reward=2 * reward))
    assert state.pieces["/baseline"].tolist() == [0.75 * 5.5 + 0.25 * 11, 2.5, 1.25]


def test_a_baseline_does_not_move_the_expected_gradient(tiny: Tiny) -> None:
    """By enumeration: `sum_tau p(tau) b_h grad log pi(a_h|s_h) = 0`."""
    mdp, policy, closure = tiny
    _, _, chance = every_trajectory(mdp, policy.probs.detach())
    held = torch.tensor([0.7, -0.3], dtype=torch.float64)
    batch = closure.batch.put(advantage=closure.batch.advantage - held * (len(chance) * chance)[:, None])
    shifted = Closure(closure.kit, closure.track, batch)
    assert (shifted().grads["logits"] - closure().grads["logits"]).abs().max() < 1e-13
    v = torch.tensor([[1.0, -0.5], [0.3, 0.2]], dtype=torch.float64)
    assert (along(shifted, v) - along(closure, v)).abs().max() < 1e-13, "nor the expected curvature"
