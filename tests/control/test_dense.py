"""Layers by the faster library: the same numbers as torch's own products, to the rounding that is promised."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trimtab.core.errors import MethodError
from trimtab.core.network import Network
from trimtab.policies import dense
from trimtab.policies.critic_kinds import _matmul
from trimtab.policies.dense import StackedLayer, held_by, layers, pullback

torch.set_num_threads(1)


def stacked(count: int, *widths: int) -> list[Any]:
    torch.manual_seed(0)
    return [StackedLayer(count, a, b, torch.float32) for a, b in pairwise(widths)]


def single(*widths: int) -> list[Any]:
    torch.manual_seed(0)
    return [nn.Linear(a, b) for a, b in pairwise(widths)]


def exact(x: Tensor, stack: list[Any], activation: Any = torch.relu) -> Tensor:
    return dense._plain(x.double(), False, [p.double() for p in held_by(stack)], activation)


STACKS = {"single": lambda: single(20, 96, 96, 6), "one": lambda: stacked(1, 20, 96, 96, 1),
          "three": lambda: stacked(3, 20, 96, 96, 1), "no hidden": lambda: stacked(2, 20, 1)}  # fmt: skip


@pytest.mark.parametrize("name", STACKS)
def test_values_and_gradients_are_those_of_double_precision(name: str) -> None:
    stack = STACKS[name]()
    wide = torch.randn(128, 50)
    x = wide[:, :20].requires_grad_()  # rows with gaps between them, as those of a packed ring
    y, z = layers(x, held_by(stack), torch.relu, "float32"), exact(x, stack)
    assert y.shape == z.shape
    torch.testing.assert_close(y.double(), z, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(y)
    got = torch.autograd.grad((y * weight).sum(), [x, *held_by(stack)])
    wanted = torch.autograd.grad((z * weight).sum(), [x, *held_by(stack)])
    for g, w in zip(got, wanted):
        assert float((g - w).abs().max() / w.abs().max()) < 3e-6


def test_the_faster_library_is_used_where_it_is_there() -> None:
    if not dense._ONEDNN:
        pytest.skip("this torch has no oneDNN")
    made = layers(torch.randn(128, 20), held_by(single(20, 96, 96, 6)), torch.relu, "float32")
    assert type(made.grad_fn).__name__ == "_ReluBackward"
    few = layers(torch.randn(1, 20), held_by(single(20, 96, 96, 6)), torch.relu, "float32")
    assert type(few.grad_fn).__name__ == "AddmmBackward0"


def test_shapes_of_one_decision_a_row_and_without_a_gradient() -> None:
    stack, x = single(20, 96, 96, 6), torch.randn(128, 1, 20)
    with torch.no_grad():
        made = layers(x, held_by(stack), torch.relu, "float32")[:, 0]
    torch.testing.assert_close(made.double(), exact(x[:, 0], stack).detach(), rtol=1e-5, atol=1e-5)
    assert layers(x, held_by(stack), torch.relu, "float32").shape == (128, 1, 6)


@pytest.mark.parametrize("activation", [torch.relu, torch.tanh])
@pytest.mark.parametrize("name", ["single", "three"])
def test_bfloat16_rounds_the_factors_between_hidden_layers_alone(name: str, activation: Any) -> None:
    stack, x = STACKS[name](), torch.randn(128, 20)
    y, z = layers(x, held_by(stack), activation, "bfloat16"), exact(x, stack, activation)
    error = float((y - z).abs().max() / z.abs().max())
    assert y.dtype == torch.float32
    assert 1e-5 < error < 0.02
    grads = torch.autograd.grad(y.square().sum(), held_by(stack))
    wanted = torch.autograd.grad(z.square().sum(), held_by(stack))
    for g, w in zip(grads, wanted):
        assert g.dtype == torch.float32
        assert float(torch.cosine_similarity(g.double().flatten(), w.flatten(), 0)) > 0.999
    few = layers(x[:2], held_by(stack), activation, "bfloat16")  # an actor's decisions are not rounded
    torch.testing.assert_close(few.double(), exact(x[:2], stack, activation), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("matmul", dense.MATMULS)
def test_it_can_be_differentiated_twice(matmul: str) -> None:
    stack = stacked(2, 20, 96, 96, 1)
    x = torch.randn(128, 20, requires_grad=True)

    def penalty(y: Tensor) -> list[Tensor]:
        (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return list(
            torch.autograd.grad(slope.square().sum(), held_by(stack), allow_unused=True, materialize_grads=True)
        )

    close = 3e-5 if matmul == "float32" else 0.2
    for g, w in zip(penalty(layers(x, held_by(stack), torch.relu, matmul)), penalty(exact(x, stack))):
        assert float((g - w).abs().max()) <= close * max(1e-6, float(w.abs().max()))


@pytest.mark.parametrize("matmul", dense.MATMULS)
@pytest.mark.parametrize("name", STACKS)
def test_the_pullback_is_autograd_s_gradient(name: str, matmul: str) -> None:
    if not dense._ONEDNN:
        pytest.skip("this torch has no oneDNN")
    held, x = held_by(STACKS[name]() if name != "no hidden" else stacked(2, 96, 96)), torch.randn(128, 96)
    x = x[:, : held[0].shape[-1]]
    passed = pullback(x, held, torch.relu, matmul)
    assert passed is not None
    made, into = passed
    plain = layers(x, held, torch.relu, matmul)
    weight = torch.randn_like(plain)
    assert torch.equal(made, plain)
    with torch.no_grad():
        ours = into(weight)
    for got, wanted, p in zip(ours, torch.autograd.grad((plain * weight).sum(), held), held, strict=True):
        assert got.shape == p.shape
        assert torch.equal(got, wanted)


def test_no_pullback_where_there_is_none() -> None:
    held, x = held_by(single(20, 96, 96, 6)), torch.randn(128, 20)
    assert pullback(x, held, torch.tanh, "float32") is None
    assert pullback(x[:1], held, torch.relu, "float32") is None
    assert pullback(x.double(), [p.double() for p in held], torch.relu, "float32") is None
    held[1].requires_grad_(False)
    assert pullback(x, held, torch.relu, "float32") is None


def test_matmul_is_refused_where_it_would_be_ignored_or_is_unknown() -> None:
    with pytest.raises(MethodError, match="has none, so it would be ignored"):
        _matmul(Network("ensemble", (64,), "relu"), "bfloat16")
    with pytest.raises(MethodError, match="Did you mean 'bfloat16'"):
        _matmul(Network("ensemble", (64, 64), "relu"), "bfloat")
