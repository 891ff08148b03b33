"""The layers of the training pass against autograd's own: values, gradients, and gradients of gradients."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.language.test_training_pass import ragged
from trimtab.policies.builtin import load_policy
from trimtab.policies.lean import Adapted, Base, Gated, GatedAdapted, Norm, lean

F64 = torch.float64


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def adapter(bias: bool) -> tuple[Any, tuple[Tensor, ...]]:
    weight, shift = some(5, 4).detach(), some(5, seed=1).detach() if bias else None
    made = lambda x, a, b: Adapted.apply(x, [Base(weight, shift, 0.7)], F64, a, b)[0]  # noqa: E731
    return made, (some(2, 3, 4, seed=2), some(2, 4, seed=3), some(5, 2, seed=4))


@pytest.mark.parametrize("bias", [True, False])
def test_an_adapter_is_the_sum_it_stands_for(bias: bool) -> None:
    made, (x, a, b) = adapter(bias)
    weight, shift = some(5, 4).detach(), some(5, seed=1).detach() if bias else None
    torch.testing.assert_close(made(x, a, b), F.linear(x, weight, shift) + 0.7 * (x @ a.T) @ b.T)
    assert torch.autograd.gradcheck(made, (x, a, b))
    assert torch.autograd.gradgradcheck(made, (x, a, b))


def test_adapters_of_one_input_together_are_each_alone() -> None:
    """Layers of different widths, ranks and scalings."""
    bases = [Base(some(n, 4, seed=n).detach(), None if n == 3 else some(n, seed=9).detach(), n / 5) for n in (5, 3, 2)]
    x, *adapters = (some(2, 3, 4, seed=2), some(2, 4, seed=3), some(5, 2, seed=4), some(1, 4, seed=5),
                    some(3, 1, seed=6), some(3, 4, seed=7), some(2, 3, seed=8))  # fmt: skip
    made = lambda x, *adapters: Adapted.apply(x, bases, F64, *adapters)  # noqa: E731
    for i, (base, y) in enumerate(zip(bases, made(x, *adapters), strict=True)):
        torch.testing.assert_close(y, Adapted.apply(x, [base], F64, *adapters[2 * i : 2 * i + 2])[0])
    assert torch.autograd.gradcheck(made, (x, *adapters))
    assert torch.autograd.gradgradcheck(made, (x, *adapters))


def test_a_norm_is_that_of_torch() -> None:
    made = lambda x, w: Norm.apply(x, w, 1e-3, F64)  # noqa: E731
    x, w = some(2, 3, 4), some(4, seed=1)
    torch.testing.assert_close(made(x, w), F.rms_norm(x, (4,), w, 1e-3))
    assert torch.autograd.gradcheck(made, (x, w))
    assert torch.autograd.gradgradcheck(made, (x, w))


def test_a_gate_is_silu_times_up() -> None:
    gate, up = some(2, 3), some(2, 3, seed=1)
    torch.testing.assert_close(Gated.apply(gate, up), F.silu(gate) * up)
    assert torch.autograd.gradcheck(Gated.apply, (gate, up))
    assert torch.autograd.gradgradcheck(Gated.apply, (gate, up))


def test_an_adapter_behind_a_gate_is_both() -> None:
    base = Base(some(5, 4).detach(), some(5, seed=1).detach(), 0.7)
    made = lambda gate, up, a, b: GatedAdapted.apply(gate, up, base, F64, a, b)  # noqa: E731
    gate, up, a, b = some(3, 4, seed=2), some(3, 4, seed=3), some(2, 4, seed=4), some(5, 2, seed=5)
    (want,) = Adapted.apply(F.silu(gate) * up, [base], F64, a, b)
    torch.testing.assert_close(made(gate, up, a, b), want)
    assert torch.autograd.gradcheck(made, (gate, up, a, b))
    assert torch.autograd.gradgradcheck(made, (gate, up, a, b))


@pytest.mark.parametrize("lora", [0, 2])
def test_under_autocast_only_rounding_changes(lora: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole policy in bfloat16, with and without: as near to float64 as without, and every module as before."""
    policy = load_policy("nano", dtype="bfloat16", lora=lora, seed=3)
    batch = ragged(policy)
    trained = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for n, p in trained.items():
            if "lora_B" in n:
                p.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    exact = load_policy("nano", dtype="float64", lora=lora, seed=3)
    exact.load_state_dict({n: v.double() for n, v in policy.state_dict().items()})

    def reading(model: Any) -> tuple[Tensor, Tensor]:
        logp = model.evaluate(batch, {"logp"})["logp"]
        grads = torch.autograd.grad(logp.sum(), [p for p in model.parameters() if p.requires_grad])
        return logp.detach().double(), torch.cat([g.flatten().double() for g in grads])

    want, ours = reading(exact), reading(policy)
    assert not any("forward" in vars(m) for m in policy.modules())
    monkeypatch.setattr("trimtab.policies.language.lean", lambda model: contextlib.nullcontext())
    plain = reading(policy)
    for w, mine, theirs in zip(want, ours, plain):
        assert (mine - w).norm() <= 2 * (theirs - w).norm() + 1e-6
        assert (mine - w).norm() < 0.05 * w.norm()


def test_what_it_does_not_know_is_left_alone() -> None:
    policy = load_policy("nano", dtype="float64", lora=2)
    layer = next(m for m in policy.modules() if hasattr(m, "base_layer"))
    layer.merge()
    with lean(policy.causal):
        assert "forward" not in vars(layer)
    layer.unmerge()
    with lean(policy.causal):
        assert "forward" in vars(layer)
