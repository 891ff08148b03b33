"""Layers by the faster library: the same numbers as torch's own products, to the rounding that is promised."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from trimtab import native
from trimtab.core.errors import MethodError
from trimtab.core.network import Network
from trimtab.native.dense import DenseKernels
from trimtab.policies import dense
from trimtab.policies.critic_kinds import _matmul
from trimtab.policies.dense import StackedLayer, held_by, layers, pullback
from trimtab.policies.layers import MLP, Inputs
from trimtab.policies.squashed import Bounds, SquashedGaussian

torch.set_num_threads(1)
compiled = pytest.mark.skipif(native.library("dense") is None, reason="no C++ compiler here")


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where nothing is compiled."""
    monkeypatch.setattr(DenseKernels, "suited", staticmethod(lambda *_: None))


@pytest.fixture(params=["kernels", "torch"])
def each_way(request: pytest.FixtureRequest) -> None:
    if request.param == "torch":
        request.getfixturevalue("without")


def stacked(count: int, *widths: int) -> list[Any]:
    torch.manual_seed(0)
    return [StackedLayer(count, a, b, torch.float32) for a, b in pairwise(widths)]


def single(*widths: int) -> list[Any]:
    torch.manual_seed(0)
    return [nn.Linear(a, b) for a, b in pairwise(widths)]


def exact(x: Tensor, stack: list[Any], activation: Any = torch.relu) -> Tensor:
    return dense._plain(x.double(), False, [p.double() for p in held_by(stack)], activation)


STACKS = {"single": lambda: single(20, 96, 96, 6), "one": lambda: stacked(1, 20, 96, 96, 1),
          "three": lambda: stacked(3, 20, 96, 96, 1), "no hidden": lambda: stacked(2, 20, 1),
          "odd": lambda: single(20, 150, 110, 70, 6)}  # fmt: skip


@pytest.mark.parametrize("name", STACKS)
def test_values_and_gradients_are_those_of_double_precision(name: str, each_way: None) -> None:
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


def test_the_faster_way_is_used_where_it_is_there(without: None) -> None:
    if not dense._ONEDNN:
        pytest.skip("this torch has no oneDNN")
    wide, few = torch.randn(128, 20), torch.randn(1, 20)
    assert ways(wide, single(20, 96, 96, 6)) == "_LayersBackward"
    assert ways(few, single(20, 96, 96, 6)) == "AddmmBackward0"


@compiled
def test_kernels_serve_what_they_are_for(monkeypatch: pytest.MonkeyPatch) -> None:
    held, x = held_by(single(20, 96, 95, 6)), torch.randn(128, 20)

    def served(x: Tensor, held: list[Tensor], activation: Any = torch.relu, half: bool = False) -> bool:
        return DenseKernels.suited(x, held, activation, half) is not None

    assert served(x, held)
    assert served(x[:1], held, torch.tanh)
    assert not served(x[:0], held)
    assert not served(x.double(), [p.double() for p in held])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):  # and nothing is read beyond its end
        layers(x[:, :19], held, torch.relu, "float32")
    assert not served(x, held, F.silu)
    assert not served(x, held, half=True)  # factors of two come in pairs
    assert ways(x[:1], single(20, 96, 96, 6)) == "_LayersBackward"
    with TorchDispatchMode():  # somebody wants to see the products
        assert not served(x, held)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert served(x, held)
    assert not served(x.repeat(10, 1), held)  # torch has two threads for these


def ways(x: Tensor, stack: list[Any]) -> str:
    return type(layers(x, held_by(stack), torch.relu, "float32").grad_fn).__name__


def test_shapes_of_one_decision_a_row_and_without_a_gradient() -> None:
    stack, x = single(20, 96, 96, 6), torch.randn(128, 1, 20)
    with torch.no_grad():
        made = layers(x, held_by(stack), torch.relu, "float32")[:, 0]
    torch.testing.assert_close(made.double(), exact(x[:, 0], stack).detach(), rtol=1e-5, atol=1e-5)
    assert layers(x, held_by(stack), torch.relu, "float32").shape == (128, 1, 6)


@pytest.mark.parametrize("activation", [torch.relu, torch.tanh])
@pytest.mark.parametrize("name", ["single", "three"])
def test_bfloat16_rounds_the_factors_between_hidden_layers_alone(name: str, activation: Any, each_way: None) -> None:
    stack, x = STACKS[name](), torch.randn(128, 20)
    y, z = layers(x, held_by(stack), activation, "bfloat16"), exact(x, stack, activation)
    error = float((y - z).detach().abs().max() / z.detach().abs().max())
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
def test_it_can_be_differentiated_twice(matmul: str, each_way: None) -> None:
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
def test_the_pullback_is_autograd_s_gradient(name: str, matmul: str, each_way: None) -> None:
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
    assert pullback(x, held, F.silu, "float32") is None
    held[1].requires_grad_(False)
    assert pullback(x, held, torch.relu, "float32") is None


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("activation", [torch.relu, torch.tanh])
@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("rows", [1, 2, 7, 130, 1250])
@compiled
def test_kernels_are_as_exact_as_torch(name: str, activation: Any, half: bool, rows: int) -> None:
    held, x = held_by(STACKS[name]()), torch.randn(rows, 20)
    found = DenseKernels.suited(x, held, activation, half)
    if half and rows % 2:
        assert found is None
        return
    if found is None:
        pytest.skip("this processor does not multiply pairs")
    y = dense._plain(x.requires_grad_().double(), False, [p.double() for p in held], activation)
    weight = torch.randn(y.shape)
    wanted = torch.autograd.grad(y, [x, *held], weight.double())

    def error(way: Any) -> list[float]:
        with torch.no_grad():
            made, kept = way.forward(x, held, activation, half)
            dx, grads = way.backward(weight, x, held, kept, activation, half, True, True)
        assert made.shape == y.shape
        assert [g.shape for g in grads] == [p.shape for p in held]
        exactly = (y.detach(), *wanted)
        return [float((a - b).norm() / b.norm().clamp_min(1e-9)) for a, b in zip((made, dx, *grads), exactly)]

    for ours, theirs in zip(error(found), error(dense._Torch)):
        assert ours < (1.5 * theirs + 1e-3 if half else 1e-6 if rows < 500 else 2e-5)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 0.6, 0.8, 1.0])
@pytest.mark.parametrize("name", ["odd", "three"])
@compiled
def test_zeros_of_relu_are_skipped_and_nothing_else(name: str, share: float, half: bool) -> None:
    """Whatever the share of units that are on; `odd` has layers that are no multiple of what is taken at a time."""
    stack, x = STACKS[name](), torch.randn(130, 20)
    held = held_by(stack)
    with torch.no_grad():
        y = x
        for weight, bias in zip(held[:-2:2], held[1:-2:2]):  # of every layer that share of the numbers is above zero
            before = y @ weight.mT
            bias.copy_(-before.quantile(1 - share, -2) + (1e-3 if share else -1e-3))
            y = F.relu(before + (bias if bias.dim() == 1 else bias[:, None]))
    found = DenseKernels.suited(x, held, torch.relu, half)
    if found is None:
        pytest.skip("this processor does not multiply pairs")
    y = dense._plain(x.requires_grad_().double(), False, [p.double() for p in held], torch.relu)
    weight = torch.randn(y.shape)
    wanted = torch.autograd.grad(y, [x, *held], weight.double())
    with torch.no_grad():
        made, kept = found.forward(x, held, torch.relu, half)
        dx, into = found.backward(weight, x, held, kept, torch.relu, half, True, True)
    assert dx is not None
    assert into is not None
    assert float((kept[0] > 0).float().mean()) == pytest.approx(share, abs=0.15)
    for ours, exactly in zip((made, dx, *into), (y, *wanted), strict=True):
        exactly = exactly.detach()
        scale = float(exactly.norm()) or 1.0
        assert float((ours - exactly).norm()) / scale < (0.1 if half else 2e-6)


@compiled
def test_skipped_zeros_hide_no_nan() -> None:
    """Zero times nan is nan, though zero times any finite number need not be counted."""
    for half in (False, True):
        held, x = held_by(single(20, 96, 96, 6)), torch.randn(16, 20)
        if DenseKernels.suited(x, held, torch.relu, half) is None:
            continue
        with torch.no_grad():
            held[1][5] = -100.0  # this unit is off, and what its weight is, does not matter
            plain = layers(x, held, torch.relu, "bfloat16" if half else "float32")
            for worst in (float("nan"), float("inf")):
                held[2][7, 5] = worst
                assert bool(layers(x, held, torch.relu, "bfloat16" if half else "float32").isnan().all())
            held[2][7, 5] = 1e30
            torch.testing.assert_close(layers(x, held, torch.relu, "bfloat16" if half else "float32"), plain)


@compiled
def test_kernels_hide_no_nan() -> None:
    held, x = held_by(single(20, 96, 96, 6)), torch.randn(16, 20)
    x[3, 4] = float("nan")
    for activation in (torch.relu, torch.tanh):
        for half in (False, True):
            found = DenseKernels.suited(x, held, activation, half)
            if found is None:
                continue
            with torch.no_grad():
                made, kept = found.forward(x, held, activation, half)
                grads = found.backward(torch.ones_like(made), x, held, kept, activation, half, True, True)[1]
            assert grads is not None
            assert bool(made[3].isnan().all())
            assert not bool(made[[0, 1, 2, *range(4, 16)]].isnan().any())
            assert bool(grads[0][:, 4].isnan().all() if activation is torch.tanh else grads[0][:, 4].isnan().any())


@compiled
def test_a_gaussian_and_its_gradients_are_those_of_double_precision() -> None:
    found, log_std = DenseKernels.at(torch.zeros(1)), torch.randn(5, requires_grad=True)
    assert found is not None
    mean, action, grad = torch.randn(33, 5, requires_grad=True), torch.randn(33, 5), torch.randn(33)
    normal = torch.distributions.Normal(mean.double(), log_std.double().exp())
    wanted = normal.log_prob(action.double()).sum(-1)
    slopes = torch.autograd.grad(wanted, [mean, log_std], grad.double())
    with torch.no_grad():
        z, logp = found.gaussian(mean, action, log_std)
        ours = found.gaussian_back(grad, z, log_std)
    level = 5 * math.log(2 * math.pi) / 2
    torch.testing.assert_close(logp.double() - level, wanted.detach(), rtol=1e-5, atol=1e-5)
    for got, slope in zip(ours, slopes, strict=True):
        assert float((got - slope).norm() / slope.norm()) < 1e-6
    action[3, 2] = float("nan")
    assert found.gaussian(mean.detach(), action, log_std.detach())[1].isnan().nonzero().tolist() == [[3]]


@compiled
@pytest.mark.parametrize("spread", ["tanh", "clamp"])
@pytest.mark.parametrize("rows", [1, 37])
def test_a_squashed_gaussian_and_its_gradients_are_those_of_double_precision(spread: str, rows: int) -> None:
    torch.manual_seed(0)
    bounds = Bounds(torch.tensor([-1.0, -2.0, 0.0]), torch.tensor([1.0, 2.0, 5.0]))
    net = MLP(2, (4,), 6, activation="relu", init="torch", dtype=torch.float32)
    policy = SquashedGaussian(Inputs(spaces.Box(-1, 1, (2,)), torch.float32), net, bounds, (3,), spread)
    made = (3 * torch.randn(rows, 1, 6)).requires_grad_()
    with torch.no_grad():
        made[0, 0, 0], made[0, 0, 3], made[-1, 0, 1], made[-1, 0, 4] = 60.0, 40.0, -60.0, -40.0
    noise, into = torch.randn(rows, 1, 3), (torch.randn(rows, 1, 3), torch.randn(rows, 1))
    ours = policy.drawn(made, noise)
    theirs = policy._drawn(made.double(), noise.double())
    assert type(ours[0].grad_fn).__name__ == "ViewBackward0"
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=2e-6, atol=1e-5)
    for chosen in ([0], [1], [0, 1]):  # one of the two alone, or both
        slopes = [
            torch.autograd.grad([out[i] for i in chosen], made, [into[i].to(out[0].dtype) for i in chosen], True)[0]
            for out in (ours, theirs)
        ]
        assert float((slopes[0] - slopes[1]).norm() / slopes[1].norm()) < 1e-5
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(policy.drawn(made, noise), ours))
    twice = [
        torch.autograd.grad(torch.autograd.grad(out[1].sum(), made, create_graph=True)[0].square().sum(), made)[0]
        for out in (policy.drawn(made, noise), policy._drawn(made, noise))
    ]
    torch.testing.assert_close(*twice)
    one = noise[..., :1]  # of a shape that is not its own it is spread as torch spreads it
    assert all(torch.equal(a, b) for a, b in zip(policy.drawn(made, one), policy._drawn(made, one)))
    noise[0, 0, 1] = float("nan")
    y, logp = policy.drawn(made.detach(), noise)
    assert y.isnan().nonzero().tolist() == [[0, 0, 1]]
    assert logp.isnan().nonzero().tolist() == [[0, 0]]


@compiled
def test_the_norm_is_that_of_all_numbers() -> None:
    some = [torch.randn(7, 5), torch.randn(()), torch.randn(300), torch.zeros(0)]
    made = DenseKernels.norm(some)
    assert made is not None
    torch.testing.assert_close(made.double(), torch.cat([t.double().flatten() for t in some]).norm(), rtol=1e-6, atol=0)
    some[2][5] = float("inf")
    assert math.isinf(float(DenseKernels.norm(some)))  # type: ignore[arg-type]
    assert DenseKernels.norm([t.double() for t in some]) is None
    assert DenseKernels.norm([some[0].T]) is None


def test_matmul_is_refused_where_it_would_be_ignored_or_is_unknown() -> None:
    with pytest.raises(MethodError, match="has none, so it would be ignored"):
        _matmul(Network("ensemble", (64,), "relu"), "bfloat16")
    with pytest.raises(MethodError, match="Did you mean 'bfloat16'"):
        _matmul(Network("ensemble", (64, 64), "relu"), "bfloat")
