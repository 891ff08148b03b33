"""BAPO: the numbers of its card, and its two published versions against the literal twin."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch

from tests.golden import test_golden, twins
from tests.spikes.bapo import toy_grpo
from tests.spikes.tokens import case
from trimtab.core.errors import MethodError
from trimtab.core.loop import run
from trimtab.core.registry import find, parse
from trimtab.methods.language.bapo import search, share

R = torch.tensor([1.5, 0.5, 1.0, 0.5]).double()
A = torch.tensor([1.0, 1.0, -1.2, -1.2]).double()
ONES = torch.ones(4).double()


def ratio_of(a: torch.Tensor, r: torch.Tensor = R) -> Any:
    return lambda low, high: share(r, a, ONES, low, high, "ratio")


def test_the_share_and_the_search_follow_the_card() -> None:
    at = ratio_of(A)
    assert at(0.6, 1.2) == pytest.approx(1.7 / 1.92)
    for low, q in ((0.65, 0.8586), (0.7, 0.8333), (0.75, 0.8095), (0.8, 0.7870)):
        assert at(low, 1.2) == pytest.approx(q, abs=1e-4)
    for high, q in ((1.3, 0.9375), (1.4, 0.9896), (1.5, 1.0417)):
        assert at(0.6, high) == pytest.approx(q, abs=1e-4)
    found = partial(search, target=1.0, low=(0.6, 0.8, 0.05), high=(1.2, 2.0, 0.1))
    assert found(at, order="low_first") == pytest.approx((0.8, 2.0))
    assert at(0.8, 2.0) == pytest.approx(0.9259, abs=1e-4)
    assert found(at, order="high_first") == pytest.approx((0.6, 1.5))
    assert found(ratio_of(torch.tensor([1.0, 1.0, -1.0, -1.0]).double()), order="low_first") == (0.6, 1.2)


@pytest.mark.parametrize("metric", ["ratio", "fraction"])
def test_the_share_rises_with_the_upper_bound_and_falls_with_the_lower_one(metric: str) -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        r, a = torch.rand(30, generator=g).double() * 3, torch.randn(30, generator=g).double()
        m = (torch.rand(30, generator=g) > 0.2).double()
        highs = [share(r, a, m, 0.6, h, metric) for h in torch.arange(1.0, 3.0, 0.1).tolist()]
        lows = [share(r, a, m, low, 1.2, metric) for low in torch.arange(0.1, 1.0, 0.1).tolist()]
        assert highs == sorted(highs)
        assert lows == sorted(lows, reverse=True), "so raising c_low can never reach the target"


def test_counting_active_decisions_alone_lets_the_lower_bound_help() -> None:
    assert share(R, A, ONES, 0.6, 1.2, "active") == pytest.approx(0.5 / (0.5 + 1.2))
    assert share(R, A, ONES, 0.4, 1.2, "active") == pytest.approx(0.5 / (0.5 + 1.2 + 0.6))
    assert share(R, A, ONES, 0.4, 1.6, "active") == pytest.approx(2.0 / 3.8)


def test_on_policy_data_start_no_search_and_degenerate_ones_end_it() -> None:
    steps: dict[str, Any] = {"low": (0.6, 0.8, 0.05), "high": (1.2, 2.0, 0.1), "order": "high_first"}
    balanced = torch.tensor([1.0, -1.0, 0.5, -0.5]).double()
    for a in (balanced, balanced.abs()):  # balanced; no negative at all
        assert search(ratio_of(a, ONES), 1.0, **steps) == (0.6, 1.2)
    assert search(ratio_of(-balanced.abs(), ONES), 1.0, **steps) == pytest.approx((0.8, 2.0)), "no positive at all"
    assert share(R, A, 0 * ONES, 0.6, 1.2, "ratio") == math.inf, "an empty mask"
    assert search(ratio_of(A), 0.0, **steps) == (0.6, 1.2), "a target of 0"
    asked = []

    def never(low: float, high: float) -> float:
        asked.append((low, high))
        return 0.0

    assert search(never, 1.0, (0.6, 0.8, 0.05), (1.2, 2.0, 0.1), "high_first") == (0.8, 2.0), "exactly the maxima"
    assert len(asked) <= math.ceil(0.2 / 0.05) + math.ceil(0.8 / 0.1) + 2


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("preset", "options"),
    [
        ("official_code", {"target": 1.0, "low": (0.6, 0.8, 0.05), "high": (1.2, 2.0, 0.05)}),
        ("official_script", {"target": 0.5, "low": (0.8, 0.95, 0.05), "high": (1.2, 2.0, 0.1)}),
    ],
)
def test_the_released_versions_agree_with_the_twin(preset: str, options: dict[str, Any], seed: int) -> None:
    method = find("bapo")(test_golden.toy(test_golden.stale()), preset=preset)
    literal = {"ratio": True, "low_first": True, "weighted": False, "dual": 3.0, **options}
    test_golden.agree("bapo", method, twins.bapo, seed, **literal)


def test_fixed_bounds_are_the_clip_of_grpo_and_of_dapo() -> None:
    for low, high in ((0.2, 0.2), (0.2, 0.28)):
        ends = []
        for m in (
            find("bapo")(toy_grpo(), low=(1 - low, 1 - low, 0.02), high=(1 + high, 1 + high, 0.05)),
            toy_grpo().set("surrogate.bound.low", low).set("surrogate.bound.high", high),
        ):
            environment, models = case(0)
            steps = list(run(m.set("update.lr", 0.3), environment, models, until=4))
            assert max(s.logs["clip_high"] for s in steps) > 0
            ends.append(models["policy"].state_dict()["logits"])
        assert torch.equal(*ends)


def test_the_bounds_and_shares_are_logged_and_the_search_moves_them() -> None:
    environment, models = case(0)
    method = find("bapo")(toy_grpo(), target=0.6).set("update.lr", 0.3)
    logs = [s.logs for s in run(method, environment, models, until=3)]
    assert max(log["bound_high"] for log in logs) > 1.2
    assert all(log["positive_share"] >= log["positive_share_start"] - 1e-12 or log["bound_low"] > 0.6 for log in logs)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"metric": "sum"}, "Known: active, fraction, ratio"),
        ({"order": "both"}, "Known: high_first, low_first"),
        ({"weighting": "rollout"}, "Known: behavior, none"),
        ({"low": (0.9, 0.6, 0.02)}, "start <= most"),
        ({"high": (0.8, 1.2, 0.1)}, "start <= most"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(MethodError, match=match):
        find("bapo")(**options)


def test_bnpo_and_bapo_train_together() -> None:
    method = parse("bnpo+bapo")
    assert method.name == "bnpo+bapo"
    environment, models = case(0)
    toy = find("bnpo")(find("bapo")(toy_grpo())).set("update.lr", 0.1)
    start = models["policy"].state_dict()["logits"].clone()
    steps = list(run(toy, environment, models, until=5, debug=True))
    assert all(math.isfinite(v) for s in steps for v in s.logs.values())
    assert {"beta_alpha", "bound_high"} <= steps[0].logs.keys()
    assert float((models["policy"].state_dict()["logits"] - start).abs().max()) > 0.01
