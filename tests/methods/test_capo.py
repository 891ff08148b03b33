"""CAPO: its twin, and the exact checks of the card."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden import capo_twin, twins
from tests.golden.test_golden import agree, stale, toy
from tests.laws import checks
from tests.laws.table import Entry
from tests.spikes import tokens
from trimtab.core.errors import MethodError
from trimtab.core.loop import run
from trimtab.core.method import Method
from trimtab.core.registry import find, parse
from trimtab.core.schedules import linear
from trimtab.methods.cases import case
from trimtab.methods.language.capo import thresholds
from trimtab.stages.curvature import Adam, Decisions, Moments, decisions, effect, learned, predicted
from trimtab.stages.update import adamw, scheduled

torch.set_num_threads(1)
CAPO, GRPO, DR_GRPO, REINFORCE = find("capo"), find("grpo"), find("dr_grpo"), find("reinforce")
INF = math.inf


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def small(**options: Any) -> Method:
    return toy(CAPO(stale(), **options))


# -- twins -------------------------------------------------------------------------------------------------------

# name -> options of both; thresholds at which the toy leaves some decisions out, of either sign
TWO = {
    "sgd, policy": ({"fisher": 0.1, "hessian": INF}, {}),
    "sgd, objective": ({"fisher": INF, "hessian": 0.3}, {}),
    "sgd, one-sided": ({"fisher": INF, "hessian": 0.3, "symmetric": False}, {}),
    "sgd, three tokens": ({"fisher": 0.1, "hessian": 0.5, "k": 3}, {}),
    "sgd, normalised": ({"fisher": 4e-5, "hessian": INF, "normalise": True}, {}),
    "adam": ({"fisher": 0.2, "hessian": INF, "optimizer": "adam"}, {"adam": True}),
    "adam, three tokens": ({"fisher": 0.2, "hessian": 0.6, "optimizer": "adam", "k": 3}, {"adam": True}),
    "rows": ({"fisher": 0.1, "hessian": INF, "per": "row"}, {}),
    "rows, normalised": ({"fisher": 1e-5, "hessian": INF, "normalise": True, "per": "row"}, {}),
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", sorted(TWO))
def test_what_is_kept_agrees_with_the_twin(name: str, seed: int) -> None:
    options, more = TWO[name]
    literal = {n: v for n, v in {**options, **more}.items() if n != "optimizer"}
    agree(name, small(**options), capo_twin.capo, seed, **literal)


@pytest.mark.parametrize("name", sorted(TWO))
def test_the_twin_left_out_some_and_kept_some(name: str) -> None:
    options, more = TWO[name]
    literal = {n: v for n, v in {**options, **more}.items() if n != "optimizer"}
    told: Counter[bool] = Counter()
    for seed in range(3):
        agree(name, small(**options), capo_twin.capo, seed, **literal, seen=lambda a, kept: told.update([kept]))
    assert min(told[True], told[False]) >= 5, told


def test_the_moments_live_on_across_batches() -> None:
    environment, models = tokens.case(0)
    policy: Any = models["policy"]
    shadow = capo_twin.Shadow()
    method = small(fisher=0.3, hessian=INF, optimizer="adam")
    start = policy.logits.detach().clone()
    for step in run(method, environment, models, until=3):
        expected = capo_twin.capo(step.batch, start, fisher=0.3, adam=True, shadow=shadow)
        assert float((policy.logits.detach() - expected).abs().max()) < 1e-12
        start = policy.logits.detach().clone()
        saved = step.state.pieces["policy/moments"]
        assert saved["step"] == shadow.step == twins.PASSES * step.turn
        assert saved["ids"].tolist() == sorted(shadow.m)


@pytest.mark.parametrize("options", [{"percentile": 70.0, "warmup": 1}, {"fisher": 0.2, "hessian": INF, "k": 3}])
def test_laws_hold_on_stale_data(options: dict[str, Any], tmp_path: Path) -> None:
    entry = Entry("capo", lambda: small(optimizer="adam", **options).but(rows=5, passes=2), tokens.case)
    checks.check_invariance(entry)
    checks.check_resume_here(entry, tmp_path)
    environment, models = entry.make(0)
    assert len(list(run(entry.build(), environment, models, until=2, debug=True))) == 2


# -- the model ---------------------------------------------------------------------------------------------------


def some(m: int = 7, k: int = 4, h: int = 5, vocabulary: int = 9, seed: int = 0) -> tuple[Decisions, Tensor]:
    """Random decisions of a linear layer, and its logits `[m, V]`; actions are often outside the K most probable."""
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(m, h, generator=g).double(), torch.randn(vocabulary, h, generator=g).double()
    logits = x @ w.T
    action = torch.randint(vocabulary, (m,), generator=g)
    top = logits.log_softmax(-1).topk(k, -1)
    logp = logits.log_softmax(-1).gather(1, action[:, None])[:, 0]
    c = torch.randn(m, generator=g).double()
    return decisions(c, top.values, top.indices, action, logp, x), logits


def literal(d: Decisions, i: int, lr: float, shadow: capo_twin.Shadow | None) -> tuple[float, float]:
    lists = (column[i].tolist() for column in (d.ids, d.pi, d.v, d.x))
    m_f, m_h, _ = capo_twin.predict(float(d.c[i]), *lists, lr, shadow)  # type: ignore[arg-type]
    return m_f, m_h


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_predictions_and_moments_are_those_of_the_loops(seed: int) -> None:
    adam, shadow, moments, lr = Adam((0.8, 0.95), 1e-3), capo_twin.Shadow((0.8, 0.95), 1e-3), None, 0.3
    for turn in range(3):
        d, _ = some(seed=10 * seed + turn)
        for mine, theirs in ((None, None), (moments, shadow)):
            m_f, m_h = predicted(d, effect(d, mine, adam), lr)
            for i in range(len(d.c)):
                assert (float(m_f[i]), float(m_h[i])) == pytest.approx(literal(d, i, lr, theirs), abs=1e-12)
        kept = torch.arange(len(d.c)) % 3 != turn
        moments = learned(moments, d.at(kept), adam)
        g = [(d.ids[i].tolist(), (d.c[i] * d.v[i, :, None] * d.x[i]).tolist()) for i in kept.nonzero()[:, 0].tolist()]
        shadow.learn(g)
        assert moments.ids.tolist() == sorted(shadow.m)
        for row, m, s in zip(moments.ids.tolist(), moments.m, moments.s):
            assert m.tolist() == pytest.approx(shadow.m[row], abs=1e-13)
            assert s.tolist() == pytest.approx(shadow.s[row], abs=1e-13)


def test_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    d, _ = some(30)
    moments = learned(None, d, Adam())
    whole = effect(d, moments, Adam()), *learned(moments, d, Adam())
    monkeypatch.setattr("trimtab.stages.curvature.AT_ONCE", 4 * 5 * 7)
    parts = effect(d, moments, Adam()), *learned(moments, d, Adam())
    for a, b in zip(whole, parts):
        torch.testing.assert_close(a, b, atol=1e-14, rtol=0)


@pytest.mark.parametrize(("a", "m_h"), [(1.0, 0.2844444), (-1.0, 0.2488889)])
def test_the_example_of_the_card(a: float, m_h: float) -> None:
    even = numbers(1 / 3, 1 / 3, 1 / 3).log()[None]
    d = decisions(numbers(a), even, torch.arange(3)[None], torch.tensor([0]), even[:, 0], numbers(2.0)[None])
    assert d.v[0].tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3])
    u = effect(d, None, Adam())
    assert (a * u[0]).tolist() == pytest.approx([8 / 3, -4 / 3, -4 / 3])
    m_f, got = predicted(d, u, 0.1)
    assert (float(m_f), float(got)) == pytest.approx((0.0355556, m_h), abs=1e-7)
    after = (0.1 * 2.0 * a * d.v[0] * 2.0).softmax(0)[0] * 3 - 1
    if a > 0:
        assert float(after) == pytest.approx(0.2817, abs=1e-4)


def test_plain_steps_have_a_closed_form_and_no_advantage_predicts_nothing() -> None:
    d, _ = some(9)
    x2, v2 = d.x.square().sum(1), d.v.square().sum(1)
    m_f, _ = predicted(d, effect(d, None, Adam()), 0.2)
    assert torch.allclose(m_f, 0.5 * 0.04 * d.c**2 * x2**2 * v2**2)
    still = d._replace(c=torch.zeros_like(d.c))
    assert all(float(x.abs().max()) == 0 for x in predicted(still, effect(still, None, Adam()), 0.2))
    moments = learned(None, d, Adam())
    m_f, m_h = predicted(still, effect(still, moments, Adam()), 0.2)
    assert float(m_f.max()) > 0, "Adam's momentum moves the policy without an advantage"
    assert float(m_h.abs().max()) == 0


@pytest.mark.parametrize("adam", [False, True])
def test_the_prediction_is_the_second_order_change_of_the_objective(adam: bool) -> None:
    d, logits = some(6, k=9)  # all tokens: then the model of the layer is exact
    moments = learned(None, some(6, k=9, seed=1)[0], Adam()) if adam else None
    u = effect(d, moments, Adam())
    logp = torch.zeros_like(logits).scatter(1, d.ids, d.pi.log())
    a = (d.v + d.pi).argmax(1, keepdim=True)
    errors = []
    for lr in (1e-2, 5e-3):
        moved = torch.zeros_like(logits).scatter(1, d.ids, lr * u)
        after = (logp + moved).log_softmax(-1)
        ratio = (after - logp).gather(1, d.ids.gather(1, a))[:, 0].exp()
        _, m_h = predicted(d, u, lr)
        errors.append((d.c * (ratio - 1) - m_h).abs())
    assert bool((errors[0] < 1e-2 * 6**3).all())
    rates = errors[0] / errors[1].clamp_min(1e-16)
    assert float(rates.median()) == pytest.approx(8.0, rel=0.25), "an error of third order"


def test_the_curvature_is_the_fisher_matrix_and_ignores_a_constant() -> None:
    d, _ = some(5)
    u = effect(d, None, Adam())
    for i in range(5):
        f = torch.diag(d.pi[i]) - torch.outer(d.pi[i], d.pi[i])
        variance = (d.pi[i] * u[i] ** 2).sum() - (d.pi[i] * u[i]).sum() ** 2
        assert float(u[i] @ f @ u[i]) == pytest.approx(float(variance))
    for one, other in zip(predicted(d, u, 0.1), predicted(d, u + 3.0, 0.1)):
        assert torch.allclose(one, other)


def test_rare_actions_are_left_out_first() -> None:
    p = torch.tensor([0.5, 0.2, 0.05, 0.01], dtype=torch.float64)
    logp = torch.stack([torch.tensor([x, 1 - x], dtype=torch.float64).log() for x in p.tolist()])
    d = decisions(torch.ones(4).double(), logp, torch.arange(2).expand(4, 2), torch.zeros(4).long(), logp[:, 0],
                  torch.ones(4, 1).double())  # fmt: skip
    m_f, _ = predicted(d, effect(d, None, Adam()), 0.1)
    assert m_f.tolist() == sorted(m_f.tolist())
    assert float(m_f[0]) < float(m_f[-1])


# -- the filter --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [GRPO, DR_GRPO, REINFORCE])
def test_infinite_thresholds_are_the_base_and_zero_ones_leave_nothing(base: Any) -> None:
    ends = []
    for method in (toy(CAPO(base(), fisher=INF, hessian=INF)), toy(base()), toy(CAPO(base(), fisher=0.0, hessian=0.0))):
        environment, models = tokens.case(0)
        before = models["policy"].state_dict()["logits"].clone()
        steps = list(run(method, environment, models, until=3))
        ends.append(models["policy"].state_dict()["logits"])
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[1], before)
    assert torch.equal(ends[2], before)
    assert all(s.logs["loss"] == 0 and s.logs["grad_norm"] == 0 and s.logs["rejected"] == 1 for s in steps)


def test_thresholds_are_calibrated_in_the_warm_up() -> None:
    known = {"updates": 0, "fisher": 0.0, "hessian": 0.0}
    m = torch.arange(1.0, 101.0)
    known, f, h = thresholds(known, None, None, 95.0, 2, m, -2 * m)
    assert (f, h) == (INF, INF)
    known, f, h = thresholds(known, None, 0.5, 95.0, 2, 3 * m, m)
    assert (f, h) == (INF, 0.5)
    known, f, h = thresholds(known, None, None, 95.0, 2, 100 * m, m)
    assert (f, h) == (3 * 95.0, 2 * 95.0), "the largest percentile of the warm-up"
    known, f, h = thresholds(known, 1.0, None, 95.0, 2, m, m)
    assert (f, h) == (1.0, 190.0)
    silent = {"updates": 0, "fisher": 0.0, "hessian": 0.0}
    assert thresholds(silent, None, None, 95.0, 2, m[:0], m[:0])[0] == silent, "a batch without credit teaches nothing"


def test_after_the_warm_up_some_decisions_are_left_out_and_counted_by_sign() -> None:
    environment, models = tokens.case(0)
    method = small(percentile=70.0, warmup=4)
    logs = [s.logs for s in run(method, environment, models, until=8)]
    assert all(log["rejected"] == 0 and "fisher" not in log for log in logs[:2]), "two updates a turn"
    assert 0 < sum(log["rejected"] for log in logs[2:]) / 6 < 0.5
    assert all({"fisher", "hessian", "rejected_positive", "rejected_negative"} <= log.keys() for log in logs[2:])


def test_the_step_size_is_that_of_the_moment_with_every_factor() -> None:
    seen = []
    for by, lr in ((1.0, linear(0.5, 0.0)), (0.25, linear(2.0, 0.0))):
        method = toy(CAPO(stale(), fisher=0.05, hessian=INF)).set("update.lr", lr).wrap("update", scheduled(by))
        environment, models = tokens.case(0)
        seen.append([s.logs["rejected"] for s in run(method, environment, models, until=4)])
    assert seen[0] == seen[1]
    assert max(seen[0]) > 0
    environment, models = tokens.case(0)
    frozen = toy(CAPO(stale(), fisher=0.05, hessian=INF)).set("update.lr", 0.0)
    assert all(s.logs["rejected"] == 0 for s in run(frozen, environment, models, until=2))


def test_the_model_is_of_the_methods_own_optimiser() -> None:
    for update, kept in ((adamw(lr=0.1, betas=(0.5, 0.6)), True), (None, False)):
        environment, models = tokens.case(0)
        method = small() if update is None else small().swap("update", update)
        *_, last = run(method, environment, models, until=2)
        assert bool(last.state.pieces["policy/moments"]) == kept


def test_an_optimiser_that_has_no_model_is_refused() -> None:
    from trimtab.claims.toys import equal_step

    environment, models = tokens.case(0)
    with pytest.raises(MethodError, match="this method's update is equal_step"):
        next(run(small().swap("update", equal_step(length=0.1)), environment, models, until=1))


def test_presets_stand_on_the_bases_they_were_tuned_on() -> None:
    for preset, base in (("official_code", ""), ("dr_capo", "+dr_grpo"), ("rein_capo", "+reinforce")):
        made = parse(f'capo(preset="{preset}"){base}')
        for option, value in CAPO.presets[preset].items():
            assert made.get("surrogate.per" if option == "per" else f"trust_region.{option}") == value


@pytest.mark.parametrize("expression", ["capo+grpo", "capo+dapo", "capo+bapo", "capo+bnpo", "capo+hapo", "aepo+capo"])
def test_it_stands_with_other_methods(expression: str) -> None:
    world = case("text", 0)
    method = world.shrink(parse(expression)).set("trust_region.warmup", 1)
    steps = list(run(method, world.environment, world.models, until=3, debug=True))
    assert all(math.isfinite(v) for s in steps for v in s.logs.values())
    assert sum(s.logs["rejected"] for s in steps) > 0


def test_moments_of_a_language_model_are_of_the_tokens_seen() -> None:
    world = case("text", 0)
    *_, last = run(world.shrink(CAPO()), world.environment, world.models, until=2)
    saved = Moments(**last.state.pieces["policy/moments"])
    assert saved.step == 2
    assert torch.equal(saved.ids, saved.ids.unique())
    assert saved.m.shape == saved.s.shape == (len(saved.ids), 24)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"fisher": -1e-4}, "fisher=-0.0001 must be a threshold of at least 0"),
        ({"hessian": math.nan}, "hessian=nan must be a threshold"),
        ({"percentile": 0.0}, r"percentile=0.0 must be in \(0, 100\]"),
        ({"percentile": 101.0}, "percentile=101.0 must be in"),
        ({"warmup": 0}, "warmup=0 must be at least 1 update"),
        ({"k": 1}, "k=1 must be from 2 to 50"),
        ({"k": 51}, "k=51 must be from 2 to 50"),
        ({"optimizer": "lion"}, "Known: adam, auto, sgd"),
        ({"fisher": 1e-4, "hessian": 0.1, "warmup": 5}, "capo has warmup=5, and both thresholds are given"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(MethodError, match=match):
        CAPO(**options)
