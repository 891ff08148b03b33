"""FamO2O: the card's exact checks, and the order of updates against a literal transcription."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.spikes import famo2o as spike
from tests.spikes.famo2o import awr, case, chosen, constant, famo2o, hold_entropy, iql
from tests.spikes.famo2o_toy import F64, Universal, affine, encode
from trimtab.core.batch import Batch
from trimtab.core.closure import Closure
from trimtab.core.kit import Kit
from trimtab.core.loop import begin, collected, run, scoped
from trimtab.core.method import Method, Track
from trimtab.core.piece import piece
from trimtab.core.state import State, load, save

torch.set_num_threads(1)
SHORT = {"offline_turns": 4, "online_turns": 4}


def short() -> Method:
    return famo2o(iql(**SHORT))


def parameters(state: State) -> dict[str, Tensor]:
    return {f"{m}.{k}": v.clone() for m, module in state.lookup().items() for k, v in module.state_dict().items()}


def final(method: Method, turns: int, seed: int = 0, **options: Any) -> State:
    environment, models = case(seed)
    *_, step = run(method, environment, models, until=turns, **options)
    return step.state


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


# -- the card's exact checks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        (0.0, [0, 1, 0, 1, 0, 1]),
        (1.0, [0.841471, 0.540302, 0.046399, 0.998923, 0.002154, 0.999998]),
        (8.0, [0.989358, -0.1455, 0.362852, 0.931847, 0.017235, 0.999851]),
        (14.0, [0.990607, 0.136737, 0.605045, 0.796191, 0.030158, 0.999545]),
    ],
)
def test_encoding(beta: float, expected: list[float]) -> None:
    torch.testing.assert_close(
        encode(torch.tensor(beta, dtype=F64)), torch.tensor(expected, dtype=F64), atol=1e-6, rtol=0
    )


def test_range() -> None:
    assert affine(torch.tensor([-1.0, 0.0, 1.0]), 8.0, 14.0).tolist() == [8.0, 11.0, 14.0]


@pytest.mark.parametrize("options", [{}, {"debug": True, "memory": 5}])
def test_a_degenerate_range_is_iql_bitwise_through_both_phases(options: dict[str, Any]) -> None:
    turns = 20 if not options else 6
    legs = {"offline_turns": turns // 2, "online_turns": turns // 2}
    a = final(iql(**legs), turns, **options)
    b = final(famo2o(iql(**legs), **famo2o.neutral.options), turns, **options)
    left, right = parameters(a), parameters(b)
    for name in (n for n in left if not n.startswith(("balance.", "temperature."))):
        assert torch.equal(left[name], right[name]), name
    assert same(a.pieces["/replay"], b.pieces["/replay"])
    assert not torch.equal(left["balance.net.0.weight"], right["balance.net.0.weight"])  # its own pieces did run


def regression(advantage: float, strength: Any, **columns: Tensor) -> float:
    """The weight that `awr` gives one decision of log-probability -1."""
    columns = {"advantage": torch.tensor([[advantage]], dtype=F64), **columns}
    state = begin(short(), *case())
    kit = Kit(state, short(), None, False)
    return float(awr(strength=strength)(kit, Batch(columns), {"logp": torch.full((1, 1), -1.0, dtype=F64)}).value)


@pytest.mark.parametrize(("beta", "saturates"), [(14.0, 0.329), (10.0, 0.461), (3.0, 1.535)])
def test_weight_cap(beta: float, saturates: float) -> None:
    assert math.isclose(math.log(100) / beta, saturates, abs_tol=5e-4)
    assert regression(math.log(100) / beta + 1e-6, constant(beta)) == 100
    assert regression(5.0, constant(beta)) == 100
    below = math.log(100) / beta - 0.01
    assert math.isclose(regression(below, constant(beta)), math.exp(beta * below), rel_tol=1e-12)


def test_no_strength_or_no_advantage_is_behaviour_cloning() -> None:
    assert regression(3.0, constant(0.0)) == 1
    for beta in (0.0, 1.0, 8.0, 14.0):
        assert regression(0.0, chosen(), balance=torch.tensor([[beta]], dtype=F64)) == 1


def prepared(method: Method, track: str) -> tuple[Kit, Closure]:
    """The closure of one track on the first batch of a run, everything before it skipped."""
    state = begin(method, *case())
    kit = Kit(state, method, None, False)
    rows = scoped(kit, collected(kit), method.pieces, "policy")
    one = method.track(track)
    kit.scope, kit.model = one.name, one.trains
    return kit, Closure(kit, one, scoped(kit, rows, one.pieces, one.trains))


@pytest.mark.parametrize("phase", [0, 1])
def test_gradient_plumbing(phase: int) -> None:
    method = short().phases[phase].method
    for track in method.tracks:
        kit, closure = prepared(method, track.name)
        made = closure()
        assert made.grads.keys() == dict(kit.models[track.trains].named_parameters()).keys()
        assert all(p.grad is None for m in kit.models.values() for p in m.parameters())
        assert any(float(g.abs().max()) > 0 for g in made.grads.values())
    kit, closure = prepared(method, "policy")
    graph = torch.stack([t.sum() for t in closure.terms().values()]).sum()
    for other in ("balance", "temperature", "value", "critic"):
        got = torch.autograd.grad(graph, list(kit.models[other].parameters()), allow_unused=True, retain_graph=True)
        assert all(g is None for g in got)
    kit, closure = prepared(method, "balance")
    graph = torch.stack([t.sum() for t in closure.terms().values()]).sum()
    assert torch.autograd.grad(graph, kit.models["temperature"].log, allow_unused=True) == (None,)


def test_entropy_above_its_target_lowers_the_temperature() -> None:
    kit, _ = prepared(short().phases[0].method, "temperature")
    for logp, sign in ((-1.0, 1), (2.0, -1)):
        now = {"temperature": kit.models["temperature"].log.exp().expand(1, 1)}
        term = hold_entropy()(kit, Batch({"balance_logp": torch.tensor([[logp]], dtype=F64)}), now)
        (g,) = torch.autograd.grad(term.value.sum(), kit.models["temperature"].log)
        assert torch.sign(g) == sign  # descent lowers T when H = -logp is above -0.5


def test_the_phase_switch_changes_nothing_when_the_balance_is_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    def forced(mean: Tensor, std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        return torch.erf(noise / math.sqrt(2)), torch.zeros_like(noise)  # exactly U(-1, 1)

    monkeypatch.setattr(spike, "squashed", forced)
    n, samples = 4000, []
    for phase in (0, 1):
        method = short().phases[phase].method.set("collect.rows", n)
        _, closure = prepared(method, "policy")
        samples.append(closure.batch.balance.flatten().sort().values)
    both = torch.cat(samples).sort().values
    gap = max(abs(torch.searchsorted(s, both, right=True) / n - (both - 8) / 6).max() for s in samples)
    assert gap < 1.63 / math.sqrt(n)  # Kolmogorov-Smirnov against U[8, 14], 1 %


# -- the order of updates ----------------------------------------------------------------------------------------


@piece("update")
def watched(kit: Kit, closure: Closure, *, inner: Any, book: list[Any]) -> Any:
    """A wrap: notes every model's parameters as they were when this track's turn came."""
    book.append((kit.scope, {n: nn.utils.parameters_to_vector(m.parameters()).tolist() for n, m in kit.models.items()}))
    return inner(closure)


def test_each_track_sees_the_parameters_that_the_card_says() -> None:
    method, book = short().phases[0].method, []
    for track in method.tracks:
        method = method.on(track.name).wrap("update", watched(book=book))
    final(method, 3)
    names = [scope for scope, _ in book]
    assert names == ["value", "balance", "temperature", "policy", "critic"] * 3
    for turn in range(1, 3):
        before = dict(book[5 * turn][1])
        for track, seen in book[5 * turn : 5 * turn + 5]:
            moved = {n for n, v in seen.items() if v != before[n]}
            assert moved == set(names[: names.index(track)]), track  # the target critic never within an update
    assert book[5][1]["critic_target"] != book[0][1]["critic_target"]


class Literal:
    """Steps 1-6 of the card, row by row, with its own Adam; noise is drawn from streams of the same names."""

    def __init__(self, models: dict[str, nn.Module], environment: Any, seed: int, lo: float, hi: float) -> None:
        self.w = {m: {k: p.detach().clone().requires_grad_() for k, p in module.named_parameters()}
                  for m, module in models.items()}  # fmt: skip
        self.w["target"] = {k: p.detach().clone() for k, p in self.w["critic"].items()}
        self.moments = {
            m: {k: [torch.zeros_like(p), torch.zeros_like(p)] for k, p in w.items()} for m, w in self.w.items()
        }
        self.data, self.environment, self.lo, self.hi = dict(environment.data), environment, lo, hi
        self.rng, self.t = State(seed, "", "", {}, {}, None).stream, 0

    def net(self, model: str, x: Tensor, prefix: str = "net") -> Tensor:
        w = self.w[model]
        hidden = (w[f"{prefix}.0.weight"] @ x + w[f"{prefix}.0.bias"]).clamp_min(0)
        return w[f"{prefix}.2.weight"] @ hidden + w[f"{prefix}.2.bias"]

    def q(self, model: str, s: Tensor, a: Tensor) -> list[Tensor]:
        return [self.net(model, torch.cat([s, a]), f"nets.{i}")[0] for i in (0, 1)]

    def pi(self, s: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        e = []
        for i in range(3):
            e += [torch.sin(beta / 10000 ** (2 * i / 6)), torch.cos(beta / 10000 ** (2 * i / 6))]
        mean = torch.tanh(self.net("policy", torch.cat([s, torch.stack(e)])))
        return mean, torch.exp(torch.clamp(self.w["policy"]["log_std"], -5, 2))

    def u(self, s: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = self.net("balance", s)[0], torch.exp(self.w["balance"]["log_std"][0])
        x = mean + std * noise
        normal = -0.5 * ((x - mean) / std) ** 2 - torch.log(std) - 0.5 * math.log(2 * math.pi)
        return torch.tanh(x), normal - torch.log(1 - torch.tanh(x) ** 2)

    def beta(self, u: Tensor) -> Tensor:
        return (u + 1) / 2 * (self.hi - self.lo) + self.lo

    def adam(self, model: str, losses: list[Tensor], lr: float = 3e-3) -> None:
        w = self.w[model]
        loss = sum(losses) / len(losses)
        for (k, p), g in zip(w.items(), torch.autograd.grad(loss, list(w.values()))):
            m, v = self.moments[model][k]
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            self.moments[model][k] = [m, v]
            m_hat, v_hat = m / (1 - 0.9**self.t), v / (1 - 0.999**self.t)
            w[k] = (p - lr * m_hat / (torch.sqrt(v_hat) + 1e-8)).detach().requires_grad_()

    def interact(self) -> None:
        s = self.environment.obs[0]
        mean, std = self.pi(s, self.beta(torch.tanh(self.net("balance", s)[0])))
        a = (mean + std * torch.randn(1, 1, generator=self.rng("act"), dtype=F64)[0]).clamp(-1, 1).detach()
        new = self.environment.step(a[None], self.rng("environment"))
        self.data = {k: torch.cat([v, new[k]]) for k, v in self.data.items()}

    def update(self, online: bool, rows: int = 16) -> None:
        if online:
            self.interact()
        self.t += 1
        index = torch.randint(len(self.data["obs"]), (rows,), generator=self.rng("replay"))
        s, a, s2, r, end = (
            [self.data[k][i, 0] for i in index] for k in ("obs", "action", "next_obs", "reward", "terminated")
        )
        draw = torch.randn if online else torch.rand
        z = draw(rows, 1, generator=self.rng("balance"), dtype=F64)
        noise = torch.randn(rows, 1, generator=self.rng("balance_noise"), dtype=F64)
        action_noise = torch.randn(rows, 1, 1, generator=self.rng("action_noise"), dtype=F64)
        each = range(rows)
        beta = [self.beta(self.u(s[i], z[i, 0])[0] if online else 2 * z[i, 0] - 1).detach() for i in each]
        qt = [min(self.q("target", s[i], a[i])).detach() for i in each]
        losses = []
        for i in each:  # 1. V
            d = qt[i] - self.net("value", s[i])[0]
            losses.append((0.7 if d > 0 else 0.3) * d**2)
        self.adam("value", losses)
        losses, entropies = [], []
        for i in each:  # 2. pi_b
            u, logp = self.u(s[i], noise[i, 0])
            mean, std = self.pi(s[i], self.beta(u))
            action = mean + std * action_noise[i, 0]
            losses.append(torch.exp(self.w["temperature"]["log"]).detach() * logp - min(self.q("target", s[i], action)))
            entropies.append(-logp.detach())
        self.adam("balance", losses)
        h = sum(entropies) / rows
        self.adam("temperature", [torch.exp(self.w["temperature"]["log"]) * (h + 0.5)])  # 3. T
        losses = []
        for i in each:  # 4. pi_u, with the new V and the old target
            weight = min(
                torch.exp(beta[i] * (qt[i] - self.net("value", s[i])[0].detach())), torch.tensor(100.0, dtype=F64)
            )
            mean, std = self.pi(s[i], beta[i])
            logp = -0.5 * ((a[i] - mean) / std) ** 2 - torch.log(std) - 0.5 * math.log(2 * math.pi)
            losses.append(-weight * logp.sum())
        self.adam("policy", losses)
        losses = []
        for i in each:  # 5. Q
            y = r[i] + 0.99 * (0.0 if end[i] else 1.0) * self.net("value", s2[i])[0].detach()
            losses.append(sum((q - y) ** 2 for q in self.q("critic", s[i], a[i])))
        self.adam("critic", losses)
        for k, p in self.w["critic"].items():  # 6. the target
            self.w["target"][k] = (1 - 0.005) * self.w["target"][k] + 0.005 * p.detach()


def distance(method: Method, turns: int, seed: int = 3) -> float:
    """Largest difference to the transcription over all parameters, after any turn."""
    environment, models = case(1)
    literal = Literal(models, case(1)[0], seed, 8.0, 14.0)
    worst = 0.0
    for step in run(method, environment, models, until=turns, seed=seed):
        literal.update(online=step.turn > 4)
        for name, module in step.state.lookup().items():
            theirs = literal.w["target" if name == "critic_target" else name]
            worst = max(worst, *(float((p - theirs[k]).detach().abs().max()) for k, p in module.named_parameters()))
    return worst


def test_both_phases_agree_with_the_literal_transcription() -> None:
    assert distance(short(), 8) < 1e-10


def reordered(method: Method, *names: str) -> Method:
    tracks: tuple[Track, ...] = tuple(method.track(n) for n in names)
    return replace(method, tracks=tracks)


@pytest.mark.parametrize(
    "order",
    [
        ("policy", "value", "balance", "temperature", "critic"),  # advantage from the old V
        ("value", "policy", "balance", "temperature", "critic"),  # balance step through the new policy
        ("value", "temperature", "balance", "policy", "critic"),  # balance step with the new temperature
        ("critic", "value", "balance", "temperature", "policy"),  # the critic's target from the old V
    ],
)
def test_another_order_is_another_method(order: tuple[str, ...]) -> None:
    assert distance(reordered(short().phases[0].method, *order), 3) > 1e-7


# -- laws --------------------------------------------------------------------------------------------------------


def test_resumes_bitwise_in_each_phase_and_at_the_switch(tmp_path: Any) -> None:
    environment, models = case()
    saved = {}
    for step in run(short(), environment, models, until=8):
        if step.turn in (2, 4, 6):
            saved[step.turn] = save(step.state, tmp_path / str(step.turn))
    whole = step.state.tree()
    for path in saved.values():
        environment, models = case(7)
        state = begin(short(), environment, models, seed=9)
        load(state, path)
        *_, step = run(short(), environment, models, until=8, state=state)
        assert same(step.state.tree(), whole)


@pytest.mark.parametrize("memory", [3, 5])
def test_memory_changes_nothing(memory: int) -> None:
    left, right = parameters(final(short(), 8)), parameters(final(short(), 8, memory=memory, debug=memory == 5))
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], atol=1e-10, rtol=0)


def test_the_difference_from_iql_is_readable() -> None:
    plain, family = iql().phases[1].method, famo2o().phases[1].method
    assert [t.name for t in plain.tracks] == ["value", "policy", "critic"]
    assert {e.path for e in family.edits if e.by == "famo2o"} == {
        "policy:awr.strength", "balance", "balance_sample", "act_by_balance", "track balance", "track temperature"
    }  # fmt: skip
    assert isinstance(case()[1]["policy"], Universal)
