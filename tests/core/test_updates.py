"""Update wraps: clipping and scaling the step of any update."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.spikes.bapo import toy_grpo
from tests.spikes.tokens import case as toy
from trimtab.core.closure import Closure
from trimtab.core.errors import MethodError
from trimtab.core.kit import Kit
from trimtab.core.loop import run
from trimtab.core.method import Method
from trimtab.core.piece import Piece, piece
from trimtab.core.registry import parse
from trimtab.core.schedules import linear, warmup
from trimtab.methods.cases import case
from trimtab.stages.update import adamw, clipped, scheduled, sgd

torch.set_num_threads(1)
LR = 0.05


def trained(update: Piece, *wraps: Piece, turns: int = 3) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Parameters and logs after some turns of toy GRPO (six updates each) with this update."""
    method = replace(toy_grpo(), explicit=()).swap("update", update)
    for wrap in wraps:
        method = method.wrap("update", wrap)
    environment, models = toy(0)
    logs = [step.logs for step in run(method, environment, models, until=turns)]
    return {k: v.detach().clone() for k, v in models["policy"].named_parameters()}, logs


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def test_clipping_outside_is_clipping_inside() -> None:
    inside, ours = trained(adamw(lr=LR, clip=0.02)), trained(adamw(lr=LR), clipped(0.02))
    loose = trained(adamw(lr=LR))
    assert apart(inside[0], ours[0]) <= 1e-12
    assert apart(loose[0], ours[0]) > 1e-3, "nothing was clipped, so nothing was compared"
    for a, b in zip(inside[1], ours[1]):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-9), "the norm logged is the one before clipping"
        assert 0 < b["grad_clipped"] <= 1


def test_a_bound_that_nothing_reaches_changes_no_bit() -> None:
    for update in (sgd(lr=LR), adamw(lr=LR)):
        plain, ours = trained(update), trained(update, clipped(1e6), scheduled(1.0))
        assert apart(plain[0], ours[0]) == 0
        assert ours[1][0]["grad_clipped"] == 0


def test_a_clipped_sgd_step_has_the_length_of_the_bound() -> None:
    start, _ = trained(sgd(lr=0.0), turns=1)
    method = replace(toy_grpo(), explicit=()).swap("update", sgd(lr=1.0)).wrap("update", clipped(0.01))
    environment, models = toy(0)
    next(run(method.but(rows=None, passes=1), environment, models, until=1))
    steps = [p.detach() - start[k] for k, p in models["policy"].named_parameters()]
    moved = math.sqrt(sum(float(s.square().sum()) for s in steps))
    assert moved == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("by", [0.0, 0.25, 0.5, 2.0])
@pytest.mark.parametrize("update", [sgd, adamw])
def test_scaling_the_step_is_scaling_the_learning_rate(update: Any, by: float) -> None:
    options = {"weight_decay": 0.1} if update is adamw else {}
    lower, ours = trained(update(lr=by * LR, **options)), trained(update(lr=LR, **options), scheduled(by))
    assert apart(lower[0], ours[0]) <= 1e-12
    assert ours[1][0]["step_scale"] == by


def test_a_schedule_of_the_step_is_a_schedule_of_the_learning_rate() -> None:
    for update in (sgd, adamw):
        schedule = warmup(4, linear(1.0, 0.0))
        lr = warmup(4, linear(LR, 0.0))
        assert apart(trained(update(lr=lr))[0], trained(update(lr=LR), scheduled(schedule))[0]) <= 1e-12


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: clipped(0), "positive number"), (lambda: clipped(-1.0), "positive number"),
        (lambda: clipped(math.inf), "positive"), (lambda: clipped(math.nan), "positive"),
        (lambda: scheduled(-0.5), "at least 0"), (lambda: scheduled(math.nan), "at least 0"),
        (lambda: toy_grpo().wrap("surrogate", clipped()), "wraps a update piece"),
    ],
)  # fmt: skip
def test_bad_options_are_refused_with_a_sentence(make: Any, sentence: str) -> None:
    with pytest.raises(MethodError, match=sentence):
        make()


def test_a_schedule_that_turns_bad_is_refused_when_it_does() -> None:
    with pytest.raises(MethodError, match=r"by=-0\.\d+ at update \d+"):
        trained(sgd(lr=LR), scheduled(linear(0.5, -1.0)))
    with pytest.raises(MethodError, match=r"norm=0\.0 at update 0"):
        trained(sgd(lr=LR), clipped(linear(0.0, 1.0)))


@piece("update")
def two_gradients(kit: Kit, closure: Closure) -> tuple[dict[str, Any], bool]:
    """An update that looks at the gradient of half of its rows, at its un-reduced terms, and stops."""
    half = closure(where=torch.arange(len(closure.batch) // 2))
    shifted = closure({k: v + 0.1 for k, v in closure.params.items()}, create_graph=True)
    assert float(half.norm) <= 1e-3 + 1e-12
    assert float(shifted.norm) <= 1e-3 + 1e-12
    assert closure.terms()
    assert list(closure.micro())
    return {"half": half.norm}, True


def test_every_gradient_is_clipped_and_the_rest_passes_through() -> None:
    _, logs = trained(two_gradients(), clipped(1e-3), turns=1)
    assert logs[0]["grad_clipped"] == 1
    assert logs[0]["grad_norm"] > 1e-3


def wrapped() -> Method:
    return parse("grpo").wrap("update", clipped(0.5)).wrap("update", scheduled(0.5))


def test_wraps_keep_one_gradient_one() -> None:
    """The forward pass for `logp_old` is saved only while every layer of the update asks for one gradient."""
    made = case("text")
    step = next(run(made.shrink(wrapped()), made.environment, made.models, until=1))
    assert "logp_old" not in step.batch
    other = parse("grpo").swap("update", replace(adamw(), one_gradient=False)).wrap("update", clipped())
    assert "logp_old" in next(run(made.shrink(other), made.environment, made.models, until=1)).batch


def test_addresses_pass_through_the_wraps() -> None:
    made = wrapped().set("update.lr", 1e-4).set("update.norm", 0.7).set("update.by", 0.1)
    assert [made.get(f"update.{o}") for o in ("lr", "norm", "by", "clip")] == [1e-4, 0.7, 0.1, 1.0]
    rows = made.flatten()
    assert rows["clipped(update).norm"] == 0.7
    assert rows["scheduled(update).by"] == 0.1
