"""HNPG: the card's exact checks, the order of its sweep, the trust region, resume, memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.spikes import hnpg as spike
from tests.spikes.hnpg import (
    CASES,
    backward_sweep,
    conjugate_gradient,
    fisher_product,
    gae_of,
    hnpg,
    returns_of,
    temporal_difference,
    trpo_q,
)
from trimtab.core.batch import Batch
from trimtab.core.closure import Closure
from trimtab.core.kit import Kit
from trimtab.core.loop import begin, rows_where, run
from trimtab.core.method import Method
from trimtab.core.piece import Piece, piece
from trimtab.core.state import load, save
from trimtab.core.terms import Term, rows_of

torch.set_num_threads(1)
SMALL = {"episodes": 10, "steps": 3, "critic_lr": 0.05, "samples": 3}


def small(**more: Any) -> Method:
    return trpo_q(**{**SMALL, **more})


def trained(method: Method, turns: int, **how: Any) -> dict[str, Tensor]:
    environment, models = spike.case(1)
    for _ in run(method, environment, models, until=turns, seed=5, **how):
        pass
    return {name: m.weight.detach() for name, m in models.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor], within: float = 0.0) -> bool:
    return all(bool((a[n] - b[n]).abs().max() <= within) for n in a)


def watched(method: Method, track: str, look: Callable[[Closure], None]) -> Method:
    """The method, with one track's update calling `look(closure)` before it moves anything."""

    def wrap(p: Piece) -> Piece:
        def fn(kit: Kit, closure: Closure, **options: Any) -> Any:
            look(closure)
            return p.fn(kit, closure, **options)

        return replace(p, fn=fn)

    return replace(
        method, tracks=tuple(replace(t, update=wrap(t.update)) if t.name == track else t for t in method.tracks)
    )


def seen(method: Method, track: str, turns: int = 1) -> tuple[Batch, dict[str, Any]]:
    """The rows that a track's update was given in the last of some turns, and the models after it."""
    environment, models = spike.case(1)
    batches: list[Batch] = []
    for _ in run(watched(method, track, lambda c: batches.append(c.batch)), environment, models, until=turns, seed=5):
        pass
    return batches[-1], models


# -- fixtures of the card --------------------------------------------------------------------------------------------


def test_gae_fixture() -> None:
    """Check 6."""
    make = torch.tensor
    value = make([0.2, 0.4, 0.6], dtype=torch.float64)
    made = gae_of(make([0.0, 0.0, 1.0], dtype=torch.float64), value, make([1, 1, 0]), 0.97)
    assert made.tolist() == pytest.approx([0.77036, 0.588, 0.4])


def test_returns_stop_at_the_mask() -> None:
    """Check 7."""
    made = returns_of(torch.tensor([0.0, 1.0, 0.0, 2.0]), torch.tensor([1, 0, 1, 0]))
    assert made.tolist() == [1, 1, 2, 2]


def test_recursions_follow_episodes_whatever_the_order_of_rows() -> None:
    batch, _ = seen(hnpg(small()), "critic")
    shuffled = batch.take(torch.randperm(len(batch), generator=torch.Generator().manual_seed(0)))
    again = spike.outcomes.__wrapped__(shuffled)
    order = torch.argsort(again.episode * 10 + again.turn, stable=True)
    back = torch.argsort(batch.episode * 10 + batch.turn, stable=True)
    assert torch.equal(again.outcome[order], batch.outcome[back])


def test_hybrid_off_is_trpo_bitwise() -> None:
    """Check 1, through HNPG's own pieces: 20 turns."""
    assert hnpg.neutral is not None
    base = small(episodes=4, steps=1, samples=1)
    assert same(trained(hnpg(base, **hnpg.neutral.options), 20), trained(base, 20))
    assert not same(trained(hnpg(base), 2), trained(base, 2))


# -- the critic ------------------------------------------------------------------------------------------------------


def test_loss_is_the_sum_of_two_means() -> None:
    """With half as many offline rows: each kind is averaged over its own rows."""
    checked = []

    def look(closure: Closure) -> None:
        batch, critic = closure.batch, closure.model
        now = critic.evaluate(batch, frozenset({"value", "value_next"}))
        mine = rows_of(batch, "policy")
        at = rows_where(batch, "turn", 1)
        online = (now["value"] - batch.outcome).square()[mine & at].mean()
        offline = (now["value"] - batch.reward - now["value_next"]).square()[~mine & at].mean()
        assert int((mine & at).sum()) == 2 * int((~mine & at).sum())
        assert torch.allclose(closure(where=at).loss, (online + offline).detach(), atol=1e-14)
        checked.append(True)

    trained(watched(hnpg(small(), offline=0.5), "critic", look), 1)
    assert checked


@piece("loss", slot="temporal_difference", reads=("reward", "next_action", "next_obs", "terminated", "mask"),
       wants=("value", "value_next"), rows="expert")  # fmt: skip
def leaking(batch: Batch, now: Any) -> Term:
    """A mutant: the target is differentiated."""
    return Term((now["value"] - batch.reward - now["value_next"]).square(), "temporal_difference")


@pytest.mark.parametrize(("loss", "leaks"), [(temporal_difference, False), (leaking, True)])
def test_td_target_is_not_differentiated(loss: Callable[[], Piece], leaks: bool) -> None:
    found = []

    def look(closure: Closure) -> None:
        grad = closure(where=rows_where(closure.batch, "turn", 1)).grads["weight"]
        assert bool((grad[1] != 0).any())
        assert bool((grad[0] == 0).all())
        found.append(bool((grad[2] != 0).any()))

    trained(watched(hnpg(small()).swap("critic:temporal_difference", loss()), "critic", look), 1)
    assert found == [leaks]


@piece("update", reads=("turn",))
def forward_sweep(kit: Kit, closure: Closure, *, steps: int = 30, lr: float = 3e-4) -> Any:
    """A mutant: h = 0 .. H-1, so that targets are those of the sweep before."""
    for h in range(kit.environment.horizon):
        optimizer = torch.optim.Adam(closure.params.values(), lr=lr)
        for _ in range(steps):
            made = closure(where=rows_where(closure.batch, "turn", h))
            closure.model.weight.grad = made.grads["weight"]
            optimizer.step()
    closure.model.weight.grad = None
    return {}, False


def dynamic_programming(batch: Batch, horizon: int, width: int, actions: int) -> tuple[Tensor, Tensor]:
    """The minimiser of each step's loss given the next step's: `f` and which cells have data, `[H, D, A]`."""
    f = torch.zeros(horizon + 1, width, actions, dtype=torch.float64)
    known = torch.zeros_like(f, dtype=torch.bool)
    mine = rows_of(batch, "policy")
    for h in reversed(range(horizon)):
        at = batch.turn == h
        up, down = torch.zeros(2, width, actions, dtype=torch.float64)
        for i in at.nonzero().squeeze(1).tolist():
            cell = int(batch.obs[i, 0].argmax()), int(batch.action[i, 0])
            after = 0.0
            if h < horizon - 1:
                after = float(f[h + 1, int(batch.next_obs[i, 0].argmax()), int(batch.next_action[i, 0])])
            target = float(batch.outcome[i, 0]) if mine[i] else float(batch.reward[i, 0]) + after
            share = 1 / int((at & (mine == mine[i])).sum())
            up[cell] += share * target
            down[cell] += share
        known[h] = down > 0
        f[h] = torch.where(known[h], up / down.clamp_min(1e-300), f[h])
    return f[:-1], known[:-1]


@pytest.mark.parametrize(("sweep", "exact"), [(backward_sweep, True), (forward_sweep, False)])
def test_one_backward_sweep_is_dynamic_programming(sweep: Callable[..., Piece], exact: bool) -> None:
    """Tabular, 120 steps per h, everything from 0: one sweep solves all steps; a forward one sees stale targets.

    Offline rows may bootstrap from cells without data, which keep their start (zero here, as in the exact solution).
    """
    lock = spike.Lock(seed=2)
    models = {"policy": spike.StackedPolicy(lock, 0.1, 1), "critic": spike.StackedCritic(lock)}
    method = hnpg(trpo_q(episodes=10), offline=4.0).swap("critic:update", sweep(steps=120, lr=0.03))
    batches: list[Batch] = []
    for _ in run(watched(method, "critic", lambda c: batches.append(c.batch)), lock, models, until=1):
        pass
    f, known = dynamic_programming(batches[0], lock.horizon, lock.width, lock.actions)
    error = (models["critic"].weight.detach() - f)[known].abs().max()
    assert bool(error < 1e-2) if exact else bool(error > 0.1)


# -- the policy --------------------------------------------------------------------------------------------------------


def test_advantages_come_from_the_new_critic_and_fresh_actions() -> None:
    collected: list[Batch] = []
    environment, models = spike.case(1)
    old = spike.case(1)[1]["critic"]
    method = watched(hnpg(small()), "policy", lambda c: collected.append(c.batch))
    for step in run(method, environment, models, until=1, seed=5):
        raw = step.batch
    batch = collected[0]
    theirs = rows_of(batch, "expert")
    rows = batch.take(theirs)
    total = rows.advantage + rows.value
    assert torch.allclose(total, models["critic"].score(rows.obs, rows.turn, rows.action), atol=1e-12)
    assert not torch.allclose(total, old.score(rows.obs, rows.turn, rows.action), atol=1e-3)
    assert torch.equal(rows.obs, raw.take(theirs).obs)
    assert not torch.equal(rows.action, raw.take(theirs).action)
    mine = ~theirs
    assert torch.equal(batch.take(mine).action, raw.take(mine).action)
    assert torch.equal(rows.logp_old, rows.logp_behavior)
    assert all(bool(torch.isfinite(c).all()) for c in batch.columns.values() if c.is_floating_point())


def test_offline_advantages_are_unbiased() -> None:
    """Check 10: V's samples do not depend on the action, so the mean advantage is zero within four standard errors."""
    batch, _ = seen(hnpg(small(), offline=100.0), "policy")
    advantage = batch.take(rows_of(batch, "expert")).advantage
    assert advantage.std() > 0.02
    assert advantage.mean().abs() < 4 * advantage.std() / len(advantage) ** 0.5


def test_surrogate_gradient_at_the_old_policy() -> None:
    """`-mean(A grad log pi)` over online and offline rows together."""

    def look(closure: Closure) -> None:
        rows = closure.batch
        logp = closure.model.evaluate(rows, frozenset({"logp"}))["logp"]
        (exact,) = torch.autograd.grad(-(rows.advantage * logp).mean(), closure.model.weight)
        assert torch.allclose(closure().grads["weight"], exact, atol=1e-14)

    trained(watched(hnpg(small()), "policy", look), 2)


@pytest.mark.parametrize(("max_kl", "checked"), [(0.01, True), (1.0, True), (1.0, False)])
def test_kl_stays_below_its_bound(max_kl: float, checked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check 8. Far from the quadratic model (max_kl = 1) the search without its KL check breaks the bound."""
    search, kls, moved = spike.line_search, [], []

    def spy(closure: Closure, rows: Tensor, *args: Any, **limits: Any) -> float:
        before = closure(where=rows).loss
        share = search(closure, rows, *args, **{**limits, **({} if checked else {"max_kl": float("inf")})})
        kls.append(float(closure.terms(where=rows)["kl"].sum().detach()))
        moved.append(share)
        assert share == 0 or closure(where=rows).loss < before
        return share

    monkeypatch.setattr(spike, "line_search", spy)
    trained(hnpg(small(max_kl=max_kl, damping=0.01)), 4)
    assert max(moved) > 0
    if checked:
        assert max(kls) <= max_kl
        assert max(kls) > 0.2 * max_kl
    else:
        assert max(kls) > max_kl


def test_zero_advantages_leave_the_policy_where_it_is() -> None:
    """Check 8: no reward and a critic of zeros give a zero gradient, not 0 / 0."""
    lock = spike.Lock()
    lock.offline["reward"].zero_()
    lock.play = _without_reward(lock.play)  # type: ignore[method-assign]
    models = {"policy": spike.StackedPolicy(lock, 0.1, 1), "critic": spike.StackedCritic(lock)}
    before = models["policy"].weight.detach().clone()
    for step in run(hnpg(small()), lock, models, until=2):
        assert step.logs["policy/step"] == 0
    assert torch.equal(models["policy"].weight.detach(), before)
    assert bool((models["critic"].weight == 0).all())


def _without_reward(play: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    def silent(*args: Any) -> dict[str, Tensor]:
        made = play(*args)
        return {**made, "reward": torch.zeros_like(made["reward"])}

    return silent


def test_conjugate_gradient_solves_in_n_steps() -> None:
    """Check 9."""
    for n in (1, 4, 9):
        a = torch.randn(n, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        a = a @ a.T + 0.1 * torch.eye(n, dtype=torch.float64)
        b = torch.arange(1.0, n + 1, dtype=torch.float64)
        x = conjugate_gradient(lambda v, a=a: {"x": a @ v["x"]}, {"x": b}, n, tolerance=0.0)["x"]
        assert torch.allclose(a @ x, b, atol=1e-8)
        if n > 1:
            early = conjugate_gradient(lambda v, a=a: {"x": a @ v["x"]}, {"x": b}, n - 1, tolerance=0.0)["x"]
            assert not torch.allclose(a @ early, b, atol=1e-6)


def test_fisher_product_is_the_fisher_matrix() -> None:
    """Check 9: symmetric, positive definite, and `mean_s E_a[score score^T]` plus damping."""
    made = []

    def look(closure: Closure) -> None:
        rows = rows_where(closure.batch, "turn", 2)
        product = fisher_product(closure, rows, 0.1)
        size = closure.model.weight.numel()
        basis = torch.eye(size, dtype=torch.float64).reshape(size, *closure.model.weight.shape)
        matrix = torch.stack([product({"weight": v})["weight"].flatten() for v in basis])
        exact = 0.1 * torch.eye(size, dtype=torch.float64)
        batch = closure.batch.take(rows)
        for a in range(closure.model.weight.shape[-1]):
            logp = closure.model.evaluate(batch.put(action=torch.full_like(batch.action, a)), frozenset({"logp"}))[
                "logp"
            ]
            for i in range(len(batch)):
                (g,) = torch.autograd.grad(logp[i, 0], closure.model.weight, retain_graph=True)
                exact += float(logp[i, 0].detach().exp()) / len(batch) * torch.outer(g.flatten(), g.flatten())
        made.append((matrix, exact))

    trained(watched(hnpg(small(episodes=4)), "policy", look), 1)
    matrix, exact = made[0]
    assert torch.allclose(matrix, exact, atol=1e-12)
    assert torch.allclose(matrix, matrix.T, atol=1e-14)
    assert torch.linalg.eigvalsh(matrix).min() > 0.1 - 1e-12


# -- resume, memory, debug, learning -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_resume_is_bitwise(name: str, tmp_path: Path) -> None:
    method = small() if name == "trpo_q" else hnpg(small())
    whole = trained(method, 4)
    environment, models = spike.case(1)
    *_, last = run(method, environment, models, until=2, seed=5)
    save(last.state, tmp_path)
    environment, models = spike.case(9)
    state = begin(method, environment, models, seed=77)
    load(state, tmp_path)
    for _ in run(method, environment, models, until=4, state=state):
        pass
    assert same({n: m.weight.detach() for n, m in models.items()}, whole)
    assert environment.started == 40


@pytest.mark.parametrize("memory", [1, 7])
def test_memory_changes_nothing(memory: int) -> None:
    method = hnpg(small(episodes=4, steps=2))
    assert same(trained(method, 2, memory=memory), trained(method, 2), within=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_declarations_are_complete(name: str) -> None:
    method = small() if name == "trpo_q" else hnpg(small())
    assert same(trained(method, 2, debug=True), trained(method, 2))


def test_it_opens_the_lock() -> None:
    environment, models = spike.case(0)
    method = hnpg(trpo_q(episodes=20, samples=3, steps=8, critic_lr=0.06, max_kl=0.1))
    solved = [step.logs["solved"] for step in run(method, environment, models, until=9)]
    assert solved[0] <= 0.2
    assert solved[-1] >= 0.6
