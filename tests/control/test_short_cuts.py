"""What is quicker than the plain way gives the same: a policy's own gradient, the optimiser's kernel, lazy rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trimtab.core.batch import Batch
from trimtab.core.closure import Closure, Gradient
from trimtab.core.loop import run
from trimtab.core.registry import find
from trimtab.environments.toy import PointEnvironment
from trimtab.methods.cases import case
from trimtab.policies import dense
from trimtab.policies.networks import build_networks
from trimtab.stages.update import _fused, descend


@pytest.mark.parametrize("world", ["steps", "choices"])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_the_pullback_is_the_gradient(world: str, activation: str) -> None:
    """Against autograd through `evaluate`, with the losses of PPO and an entropy bonus."""
    from tests.laws.checks import observed

    method = find("ppo")(entropy_coef=0.03, activation=activation)
    k = case(world, 2)
    models = k.models_of(method)
    seen = []

    def look(closure: Closure) -> None:
        model: Any = closure.model
        made = model.pullback(closure.batch, closure.wants)
        assert made is not None
        plain = model.evaluate(closure.batch, closure.wants)
        for name, value in plain.items():
            assert float((made[0][name] - value).abs().max()) < 1e-14
        ours = closure()
        at = {n: p.detach().clone().requires_grad_() for n, p in closure.params.items()}  # no short cut elsewhere
        theirs = closure(params=at)
        assert float((ours.loss - theirs.loss).abs()) < 1e-12
        for name, grad in theirs.grads.items():
            assert float((ours.grads[name] - grad).abs().max()) < 1e-12, name
        seen.append(max(float(g.abs().max()) for g in theirs.grads.values()))

    for _ in run(observed(k.shrink(method), look), k.environment, models, until=2):
        pass
    assert len(seen) > 4
    assert min(seen) > 1e-6


def test_no_short_cut_where_it_would_be_wrong() -> None:
    method = find("ppo")()
    k = case("steps", 0)
    policy: Any = k.models_of(method)["policy"]
    batch = next(run(k.shrink(method), k.environment, {"policy": policy}, until=1)).batch
    want = frozenset({"logp", "value"})
    assert policy.pullback(batch, want) is not None
    assert policy.pullback(batch, want | {"mean"}) is None
    assert policy.pullback(batch, frozenset({"logp"})) is None
    padded = batch["mask"].clone()
    padded[0] = False
    assert policy.pullback(batch.put(mask=padded), want) is None
    next(policy.critic.parameters()).requires_grad_(False)
    assert policy.pullback(batch, want) is None
    wide = k.models_of(find("ppo")(action_map="tanh"))["policy"]
    assert wide.pullback(batch, want) is None  # type: ignore[operator]


def gradient_by_both(model: Any, batch: Batch, want: frozenset[str]) -> tuple[list[Any], list[Any]]:
    """Of the same random weighing of every result: by the model's own chain rule, and by autograd."""
    made, back = model.pullback(batch, want)
    plain = model.evaluate(batch, want)
    assert made.keys() == plain.keys() == want
    weigh = {n: torch.randn(v.shape, generator=torch.Generator().manual_seed(1)).to(v.dtype) for n, v in plain.items()}
    total = torch.stack([(value * weigh[name]).sum() for name, value in plain.items()]).sum()
    for name, value in plain.items():
        torch.testing.assert_close(made[name], value.detach(), rtol=0, atol=0)
    with torch.no_grad():
        ours = back(weigh)
    return ours, list(torch.autograd.grad(total, list(model.parameters())))


@pytest.mark.parametrize("matmul", ["float32", "bfloat16"])
def test_critics_and_temperatures_have_a_gradient_of_their_own(matmul: str) -> None:
    if not dense._ONEDNN:
        pytest.skip("this torch has no oneDNN")
    method = find("sac")(hidden=(96, 96), matmul=matmul, warmup=10, batch=128)
    environment = PointEnvironment()
    models = build_networks(method, environment, 0)
    batch = next(run(method, environment, models, until=1)).batch
    batch = batch.put(obs=batch["obs"].float(), action=batch["action"].float())
    critic: Any = models["critic"]
    temperature: Any = models["temperature"]
    for ours, theirs in zip(*gradient_by_both(critic, batch, frozenset({"value"})), strict=True):
        assert torch.equal(ours, theirs)
    for want in ({"temperature"}, {"log_temperature"}, {"temperature", "log_temperature"}):
        (ours,), (theirs,) = gradient_by_both(temperature, batch, frozenset(want))
        torch.testing.assert_close(ours, theirs)
    assert critic.pullback(batch, frozenset({"first"})) is None
    padded = batch["mask"].clone()
    padded[0] = False
    assert critic.pullback(batch.put(mask=padded), frozenset({"value"})) is None
    next(critic.parameters()).requires_grad_(False)
    temperature.requires_grad_(False)
    assert critic.pullback(batch, frozenset({"value"})) is None
    assert temperature.pullback(batch, frozenset({"temperature"})) is None


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_the_kernel_alone_is_the_optimisers_step(dtype: torch.dtype, tolerance: float) -> None:
    g = torch.Generator().manual_seed(0)
    start = [torch.randn(5, 3, generator=g, dtype=dtype), torch.randn(4, generator=g, dtype=dtype)]
    settings = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    a, b = (torch.optim.AdamW(p, fused=True, **settings) for p in (ours, theirs))  # type: ignore[arg-type]
    for k, scale in enumerate((1.0, 0.5, 1.0, 0.3, 0.7)):
        grads = [torch.randn(p.shape, generator=g, dtype=dtype) for p in start]
        for p, grad in zip(theirs, grads):
            p.grad = grad * scale
        b.step()
        if k:
            assert _fused(a, ours, [x.clone() for x in grads], scale, settings)
        else:  # its state does not exist yet
            assert not _fused(a, ours, grads, scale, settings)
            for p, grad in zip(ours, grads):
                p.grad = grad * scale
            a.step()
    for p, q in zip(ours, theirs):
        assert float((p - q).abs().max()) < tolerance
        for name in ("step", "exp_avg", "exp_avg_sq"):
            assert float((a.state[p][name] - b.state[q][name]).abs().max()) < tolerance


def test_the_kernel_is_not_used_where_parameters_differ() -> None:
    settings = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    parameters = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not _fused(optimizer, parameters, [p.grad for p in parameters], 1.0, settings)  # type: ignore[misc]
    same = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    other = torch.optim.AdamW(same, fused=True)
    for p in same:
        p.grad = torch.ones_like(p)
    other.step()
    other.state[same[0]]["step"] = torch.tensor(7.0)
    assert not _fused(other, same, [torch.ones(2)] * 2, 1.0, settings), "parameters of different ages"


def test_picked_rows_are_taken_rows() -> None:
    batch = Batch({"x": torch.arange(6.0), "y": torch.arange(12).reshape(6, 2), "z": list("abcdef"),
                   "one": torch.ones(6, 2, dtype=torch.bool)})  # fmt: skip
    rows = torch.tensor([4, 1, 1])
    assert batch.same("one") == 1
    assert batch.same("x") is None
    picked, taken = batch.pick(rows), batch.take(rows)
    assert len(picked) == len(taken) == 3
    assert set(picked) == set(taken)
    assert list(picked.columns) == list(taken.columns)
    for name in batch:
        a, b = picked[name], taken[name]
        assert a == b if isinstance(a, list) else torch.equal(a, b)
    more = picked.put(x=torch.zeros(3), w=torch.ones(3))
    assert more["x"].tolist() == [0, 0, 0]
    assert picked["x"].tolist() == [4, 1, 1], "the batch it was put into stays as it was"
    assert more.pick(torch.tensor([2]))["y"].tolist() == [[2, 3]]
    assert picked.same("one") == 1
    assert more.put(one=torch.zeros(3, 2)).same("one") == 0
    short, cut = batch.pick(torch.tensor([5, 3, 4, 1, 1])).cuts([2, 3])
    assert short["x"].tolist() == [5, 3]
    assert len(cut) == 3
    assert cut.same("one") == 1
    for name in batch:
        a, b = cut[name], taken[name]
        assert a == b if isinstance(a, list) else torch.equal(a, b)
    assert cut.put(x=torch.zeros(3))["x"].tolist() == [0, 0, 0]
    assert cut.pick(torch.tensor([1]))["y"].tolist() == cut.take(torch.tensor([1]))["y"].tolist() == [[2, 3]]
    assert len(batch.pick(torch.tensor([True, False, True, False, False, False]))) == 2


def test_a_gradient_that_lies_otherwise_in_memory_is_the_same_gradient() -> None:
    settings = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    g = torch.Generator().manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.zeros(3, 2))] for _ in range(2))
    a, b = (torch.optim.AdamW(p, fused=True, **settings) for p in (ours, theirs))  # type: ignore[arg-type]
    for _ in range(3):
        grad = torch.randn(2, 3, generator=g).t()
        for parameters, optimizer, one in ((ours, a, grad), (theirs, b, grad.contiguous())):
            descend(optimizer, list(parameters), Gradient(torch.zeros(()), {"w": one}, {}), None, settings)
    assert torch.equal(ours[0], theirs[0])
