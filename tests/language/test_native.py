"""The compiled kernels against torch's operations, and what happens where they cannot be compiled."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab import native
from trimtab.core.errors import TrimtabWarning
from trimtab.native.language import Kernels
from trimtab.policies import packing
from trimtab.policies.builtin import load_policy
from trimtab.policies.draws import Sampling, draw
from trimtab.policies.lean import Norm, Turned, _gate_up, _ungated
from trimtab.policies.readout import Readout
from trimtab.policies.sampler import pad_left
from trimtab.policies.view import View

CPU = torch.device("cpu")
NARROW = [torch.float32, torch.bfloat16]
compiled = pytest.mark.skipif(native.library("language") is None, reason="no C++ compiler here")


def kernels(dtype: torch.dtype) -> Kernels:
    found = Kernels.suited(torch.float32, dtype, CPU)
    assert found is not None
    return found


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls a function as where nothing is compiled."""

    def call(work: Any, *given: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(Kernels, "suited", staticmethod(lambda *_: None))
            return work(*given)

    return call


def close(ours: Tensor | None, theirs: Tensor | None) -> None:
    """Equal up to the rounding of what is stored: torch rounds some steps in between to bfloat16 as well."""
    assert ours is not None
    assert theirs is not None
    wide = ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=2e-5 if wide else 2e-2, atol=2e-6 if wide else 2e-2)


# -- one by one -----------------------------------------------------------------------------------------------------
@compiled
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("size", [5, 48, 577])
def test_norm(dtype: torch.dtype, size: int, without: Any) -> None:
    x, weight, grad = torch.randn(7, size), torch.rand(size), torch.randn(7, size).to(dtype)
    delta = torch.randn(7, size).to(dtype)
    moved = x.clone()
    out = kernels(dtype).add_norm(moved, delta, weight, 1e-5)
    assert torch.equal(moved, x + delta)
    close(out, F.rms_norm(moved, (size,), weight, 1e-5).to(dtype))

    def both() -> tuple[Tensor, ...]:
        of = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        made = Norm.apply(*of, 1e-5, dtype)
        return (made, *torch.autograd.grad(made, of, grad))

    for ours, theirs in zip(both(), without(both), strict=True):
        close(ours, theirs)


@compiled
@pytest.mark.parametrize("dtype", NARROW)
def test_gate(dtype: torch.dtype, without: Any) -> None:
    gate, up, grad = (6 * torch.randn(3, 5, 37).to(dtype) for _ in range(3))
    close(kernels(dtype).gated(torch.cat([gate, up], -1)), F.silu(gate) * up)
    close(_gate_up(gate, up), without(_gate_up, gate, up))
    with torch.no_grad():
        for ours, theirs in zip(_ungated(grad, gate, up), without(_ungated, grad, gate, up), strict=True):
            close(ours / 10, theirs / 10)


@compiled
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("width", [6, 64])
def test_turn_and_back(dtype: torch.dtype, width: int, without: Any) -> None:
    x, angle = torch.randn(1, 5, 3, width).to(dtype), torch.rand(1, 5, width // 2).repeat(1, 1, 2)

    def both() -> tuple[Tensor, Tensor]:
        of = x.clone().requires_grad_()
        made = Turned.apply(of, angle.cos(), angle.sin(), 0.5)
        return made, torch.autograd.grad(made, of, x.flip(1))[0]

    for ours, theirs in zip(both(), without(both), strict=True):
        close(ours, theirs)
    there = kernels(dtype).turn(x, angle.cos(), angle.sin(), 1.0)
    close(kernels(dtype).turn(there, angle.cos(), angle.sin(), 1.0, back=True), x)


def packed_rows(ragged: list[tuple[int, list[int]]]) -> packing.Packed:
    """Rows packed into one: of each prompt its length, and how many tokens are read of each of its responses."""
    rows = [(torch.arange(p) + 100 * i, said) for i, (p, every) in enumerate(ragged) for said in every]
    prompt, attend = pad_left([ids.tolist() for ids, _ in rows], 0)
    most = max(said for _, said in rows) + 1
    said = torch.arange(len(rows) * most).view(len(rows), most)
    picked = torch.arange(most) == torch.tensor([[s] for _, s in rows])
    line = torch.arange(len(rows))
    return packing.pack(View(prompt, attend, said, picked, None, line, line, (len(rows), most)), 1)


@compiled
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(
    "ragged",
    [[(1, [0])], [(5, [15, 0, 16, 17]), (40, [3])], [(300, [33, 1]), (2, [290])]],
    ids=["one token", "ragged", "tiles"],
)
def test_attention_of_a_packed_row(dtype: torch.dtype, ragged: list[tuple[int, list[int]]], without: Any) -> None:
    """Values and gradients, those of later tokens exactly zero, and gradients of gradients."""
    packed = packed_rows(ragged)
    torch.manual_seed(0)
    q, k, v, upstream = (torch.randn(len(packed.ids), h, 64).to(dtype) for h in (6, 2, 2, 6))
    q = q / 8

    def read(*of: Tensor) -> list[Tensor]:
        of = tuple(x.clone().requires_grad_() for x in of)
        out = packing.attend(*of, packed)
        return [out, *torch.autograd.grad(out, of, upstream.to(of[0].dtype))]

    exact = without(read, q.double(), k.double(), v.double())
    for ours, theirs, want in zip(read(q, k, v), without(read, q, k, v), exact, strict=True):
        assert (ours - want).norm() <= 1.1 * (theirs - want).norm() + 1e-6 * want.norm()


@compiled
@pytest.mark.parametrize("dtype", NARROW)
def test_few_rows_share_the_threads_and_a_nan_stays_where_it_is(dtype: torch.dtype, monkeypatch: Any) -> None:
    """One prompt has fewer key heads than there are threads; a query that is nan makes nan of what it reads alone."""
    packed = packed_rows([(5, [20, 3])])
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(len(packed.ids), h, 32).to(dtype) for h in (6, 2, 2, 6))
    made = []
    for threads in (1, 16):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        made.append(kernels(dtype).packed(q, k, v, packed.rows, packed.first, grad))
    for shared, alone in zip(*made, strict=True):
        close(shared, alone)
    q[7, 4] = torch.nan
    (out,) = kernels(dtype).packed(q, k, v, packed.rows, packed.first)
    assert out.isnan().any(2).nonzero().tolist() == [[7, 4]]


@compiled
def test_a_gradient_of_attention_is_differentiated_again(without: Any) -> None:
    packed = packed_rows([(5, [4, 2]), (3, [7])])
    torch.manual_seed(0)
    of = [torch.randn(len(packed.ids), h, 32).requires_grad_() for h in (4, 2, 2)]

    def second() -> list[Tensor]:
        first = torch.autograd.grad(packing.attend(*of, packed).square().sum(), of, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), of))

    for ours, theirs in zip(second(), without(second), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


@compiled
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("learns", [False, True])
def test_readout(entropy: bool, scaled: bool, learns: bool, without: Any) -> None:
    x, weight, token = torch.randn(9, 16), torch.randn(701, 16), torch.randint(0, 701, (9,))
    scale = torch.rand(9) + 0.5 if scaled else None

    def both() -> list[Tensor]:
        of = x.clone().requires_grad_()
        logp, h = Readout.apply(of, weight.requires_grad_(learns), None, token, scale, torch.float32, entropy)
        total = (logp * torch.arange(9)).sum() + (h.square().sum() if entropy else 0)
        return [logp, *([h] if entropy else []), torch.autograd.grad(total, of)[0]]

    for ours, theirs in zip(both(), without(both), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@compiled
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_draws_are_the_same_tokens(dtype: torch.dtype, temperature: float, without: Any) -> None:
    logits = (3 * torch.randn(6, 1003)).to(dtype)
    logits[0, 5:] = -torch.inf
    slot, noise = torch.arange(6).repeat_interleave(50), torch.rand(300, dtype=torch.float64)
    noise[:2] = torch.tensor([0.0, 1 - 2**-53])
    how = Sampling(temperature=temperature)
    (token, logp), (others, theirs) = draw(logits, slot, noise, how), without(draw, logits, slot, noise, how)
    assert (token == others).float().mean() >= 0.99, "a uniform may fall on a border between two tokens"
    assert int(token[:50].max()) < 5, "probability 0 is never drawn"
    same = token == others
    torch.testing.assert_close(logp[same], theirs[same], rtol=1e-5, atol=1e-5)


@compiled
@pytest.mark.parametrize("dtype", NARROW)
def test_nan_goes_in_and_comes_out(dtype: torch.dtype) -> None:
    """A failure must not become a number on the way."""
    k, nan = kernels(dtype), torch.full((2, 40), torch.nan)
    assert k.add_norm(nan.clone(), None, torch.ones(40), 1e-5).isnan().all()
    assert k.norm_back(nan.to(dtype), torch.ones(2, 40), torch.ones(40), 1e-5).isnan().all()
    assert k.gated(nan.to(dtype)).isnan().all()
    assert k.gate_up(nan.to(dtype), nan.to(dtype)).isnan().all()
    one = torch.ones(2, 40)
    one[0, 3] = torch.nan
    token, logp = k.draw(one.to(dtype), torch.tensor([0, 1]), torch.rand(2).double(), 1.0)
    assert logp.isnan().tolist() == [True, False]
    assert ((token >= 0) & (token < 40)).all()
    logp = torch.zeros(2)
    k.read_out(one.to(dtype), torch.tensor([1, 1]), None, logp, None, None, slopes=False)
    assert logp.isnan().tolist() == [True, False]
    # Every bit pattern of a nan is one after rounding to bfloat16.
    odd = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)[:, None]
    assert k.add_norm(odd.clone(), None, torch.ones(1), 1e-5).isnan().all()


@compiled
def test_a_token_beyond_the_vocabulary_is_refused() -> None:
    logits, logp = torch.zeros(2, 5), torch.zeros(2)
    for token in (-1, 5):
        with pytest.raises(IndexError, match="the logits are of 5"):
            kernels(torch.float32).read_out(logits, torch.tensor([0, token]), None, logp, None, None, slopes=False)


# -- together -------------------------------------------------------------------------------------------------------
@compiled
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_sampled_is_the_same(dtype: str, without: Any) -> None:
    """Prompts of several lengths, rows that end and make room, a window that goes round."""

    def sampled() -> Any:
        policy = load_policy("nano", dtype=dtype)
        policy.sampler.ends = torch.arange(0, policy.causal.config.vocab_size, 7)
        prompts = [policy.encode(text) for text in ("1 + 1 =", "12 + 34 =", "5 * 5 * 5 =", "7 =")]
        return policy.sampler.sample(prompts, 3, torch.arange(12), Sampling(new_tokens=9))

    ours, theirs = sampled(), without(sampled)
    if dtype == "float32":
        assert torch.equal(ours.tokens, theirs.tokens)
        torch.testing.assert_close(ours.logp, theirs.logp, rtol=0, atol=1e-5)
        return
    # Rounding makes a row go its own way now and then; up to there it must agree.
    width = min(ours.tokens.shape[1], theirs.tokens.shape[1])
    same = (ours.tokens[:, :width] == theirs.tokens[:, :width]).long().cumprod(1).bool()
    assert same[:, 0].float().mean() > 0.8
    torch.testing.assert_close(ours.logp[:, :width][same], theirs.logp[:, :width][same], rtol=0, atol=5e-2)


# -- where there is no compiler, or one that fails -------------------------------------------------------------------
@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nothing compiled yet, and an empty cache."""
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path))
    monkeypatch.delenv("TRIMTAB_NATIVE", raising=False)
    native.library.cache_clear()
    yield tmp_path
    native.library.cache_clear()


def test_none_wanted(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_NATIVE", "0")
    assert native.library("language") is None
    assert "TRIMTAB_NATIVE=0" in native.words()
    assert not list(fresh.iterdir())


def test_no_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.delenv("CXX", raising=False)
    assert native.library("language") is None
    assert "no C++ compiler" in native.words()


def test_a_compiler_that_fails_is_named_and_torch_does_the_work(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = fresh / "broken"
    broken.write_text('#!/bin/sh\ntest "$1" = --version || { echo out of order >&2; exit 3; }\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.warns(TrimtabWarning, match=r"did not compile with .*broken \(out of order\).*TRIMTAB_NATIVE=0"):
        assert native.library("language") is None
    assert not list(native.cache().glob("*.so")), "nothing half made is left"
    assert "did not compile" in native.words()


@compiled
def test_it_is_compiled_once_and_never_taken_from_where_others_may_write(fresh: Path) -> None:
    assert native.library("language") is not None
    (made,) = native.cache().glob("*.so")
    first = made.stat().st_ino
    native.library.cache_clear()
    assert native.library("language") is not None
    assert made.stat().st_ino == first
    made.chmod(made.stat().st_mode | stat.S_IWOTH)
    native.library.cache_clear()
    assert native.library("language") is not None
    assert made.stat().st_ino != first
    assert not made.stat().st_mode & stat.S_IWOTH
