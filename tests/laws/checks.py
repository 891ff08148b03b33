"""The laws as functions that raise AssertionError: the conformance table and the mutants both call them."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.laws.table import Entry
from trimtab.core.batch import Batch
from trimtab.core.closure import Closure, Gradient
from trimtab.core.kit import Kit
from trimtab.core.loop import begin, run
from trimtab.core.method import Method
from trimtab.core.piece import Piece
from trimtab.core.state import State, _encode, load, save

STEPS = 2


def digest(state: State) -> dict[str, str]:
    """A digest of every leaf of the state tree, by path."""
    tensors: dict[str, Tensor] = {}
    plain = _encode(state.tree(), tensors, "")
    rows = {k: hashlib.sha256(v.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
            if v.numel() else "empty" for k, v in tensors.items()}  # fmt: skip
    return {**rows, "plain": hashlib.sha256(repr(plain).encode()).hexdigest()[:16]}


def advance(entry: Entry, steps: int, total: int, *, seed: int = 0, state: State | None = None, **more: Any) -> State:
    """Run `steps` turns of a run whose budget is `total` turns."""
    environment, models = entry.make(seed)
    method = entry.build()
    state = state or begin(method, environment, models, seed=seed)
    loop = run(method, state.environment, state.models, until=total, seed=seed, state=state, **more)
    for _, step in zip(range(steps), loop):
        state = step.state
    return state


# -- law 1: declared denominators --------------------------------------------------------------------------------


def observed(method: Method, look: Callable[[Closure], None]) -> Method:
    """The method with every update calling `look(closure)` first."""

    def wrap(p: Piece) -> Piece:
        def fn(kit: Kit, closure: Closure, **options: Any) -> Any:
            look(closure)
            return p.fn(kit, closure, **options)

        return replace(p, fn=fn)

    tracks = tuple(replace(t, update=wrap(t.update)) for t in method.tracks)
    phases = tuple(replace(p, method=observed(p.method, look)) for p in method.phases)
    return replace(method, tracks=tracks, phases=phases)


def padded(batch: Batch, more: int = 2) -> Batch:
    """The same rows with `more` decisions of padding, where decisions are a sequence."""
    if batch.columns["mask"].dim() < 2 or batch.columns["mask"].shape[1] < 2:  # type: ignore[union-attr]
        return batch
    length = batch.columns["mask"].shape[1]  # type: ignore[union-attr]

    def pad(name: str, c: Any) -> Any:
        along = isinstance(c, Tensor) and c.dim() > 1 and c.shape[1] == length and not name.startswith("prompt")
        return torch.cat([c, c.new_zeros(len(c), more, *c.shape[2:])], 1) if along else c

    return Batch({name: pad(name, c) for name, c in batch.columns.items()})


def variants(closure: Closure) -> Iterator[tuple[str, Gradient]]:
    """The same update cut, padded and ordered differently; update-scope pieces are solved anew each time."""
    kit, rows = closure.kit, closure.batch
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
    for name, memory, batch in (
        ("micro-batches of 1", 1, rows),
        ("micro-batches of 3", 3, rows),
        ("other row order", None, rows.take(order)),
        ("other row order, micro-batches of 5", 5, rows.take(order)),
        ("padding", None, padded(rows)),
    ):
        other = copy.copy(kit)
        other.memory, other._once, other._logs = memory, {}, []
        yield name, Closure(other, closure.track, batch)()


def check_invariance(entry: Entry, tolerance: float = 1e-10) -> None:
    seen = []

    def look(closure: Closure) -> None:
        if not closure.losses:
            return
        whole = copy.copy(closure.kit)
        whole.memory, whole._once, whole._logs = None, {}, []
        expected = Closure(whole, closure.track, closure.batch)()
        for name, made in variants(closure):
            seen.append(name)
            for key, grad in expected.grads.items():
                scale = 1 + float(grad.abs().max())
                error = float((grad - made.grads[key]).abs().max())
                assert error <= tolerance * scale, f"{entry.name}: {name} moves the gradient of {key} by {error:.2e}"

    environment, models = entry.make(0)
    method = observed(entry.build(), look)
    for _ in run(method, environment, models, until=STEPS):
        pass
    assert seen, f"{entry.name} made no update to look at"


# -- law 2: one state tree ---------------------------------------------------------------------------------------


def check_resume_here(entry: Entry, folder: Path) -> None:
    """run(2k) == run(k); save; load into fresh objects; run(k), bitwise, in this process."""
    k = STEPS
    straight = digest(advance(entry, 2 * k, 2 * k))
    save(advance(entry, k, 2 * k), folder)
    environment, models = entry.make(7)  # other weights, other cursor: everything must come from the file
    state = begin(entry.build(), environment, models, seed=7)
    load(state, folder)
    resumed = digest(advance(entry, k, 2 * k, state=state))
    differ = sorted(n for n in straight.keys() | resumed.keys() if straight.get(n) != resumed.get(n))
    assert not differ, f"{entry.name}: resumed run differs in {differ[:5]}"


def check_alignment(folder: Path) -> None:
    """Tensors come out of a checkpoint in allocations of their own, aligned as torch aligns."""
    from trimtab.core.state import _decode

    tensors: dict[str, Tensor] = {}
    tree = _encode({"a": torch.ones(3), "b": torch.arange(5.0), "c": torch.ones(7)}, tensors, "")
    from safetensors.torch import load_file, save_file

    save_file(tensors, folder / "t.safetensors")
    for name, value in _decode(tree, load_file(folder / "t.safetensors")).items():
        assert value.data_ptr() % 64 == 0, f"{name} was loaded into an unaligned view"


# -- law 3: neutral setting --------------------------------------------------------------------------------------


def parameters(models: Mapping[str, Any]) -> dict[str, Tensor]:
    return {f"{m}.{n}": p.detach().clone() for m, net in models.items() for n, p in net.named_parameters()}


def check_neutral(entry: Entry, updates: int = 20) -> None:
    assert entry.definition is not None
    neutral = entry.definition.neutral
    assert neutral is not None
    assert neutral.level in ("exact", "rounding") or neutral.why, f"{entry.name}: a neutral law must say why"
    results = []
    for method in entry.neutral():
        environment, models = entry.make(0)
        for _ in run(method, environment, models, until={"updates": updates}):
            pass
        results.append(parameters(models))
    ours, base = results
    tolerance = {"exact": 0.0, "rounding": 1e-9, "law": 1e-9}[neutral.level]
    trained = {t.trains for t in method.tracks}  # the base's: the method may train more models beside them
    for name, value in base.items():
        if name.partition(".")[0] in trained:
            error = float((value - ours[name]).abs().max())
            assert error <= tolerance, f"{entry.name} at {neutral.options} is off its base by {error:.2e} in {name}"


# -- law 5: surrogates -------------------------------------------------------------------------------------------


def check_surrogate(entry: Entry) -> None:
    """At the old parameters the gradient is that of -sum(weight A log pi); with A = 0 it is exactly zero."""
    looked = []

    def look(closure: Closure) -> None:
        surrogates = [p for p in closure.losses if p.core.slot == "surrogate"]
        if not surrogates or looked:
            return
        (p,) = surrogates
        alone = copy.copy(closure)
        alone.losses, alone._ready = (p,), None
        batch = closure.batch
        now = closure.model.evaluate(batch, {"logp"})  # type: ignore[operator]
        if "logp_old" in batch and not torch.allclose(batch["logp_old"], now["logp"].detach(), atol=1e-12):
            return  # not at the old parameters any more
        looked.append(p)
        weight = closure._weights(batch)[list(closure.losses).index(p)][0]
        ratio, bound, more = (p.core.options[name] for name in ("ratio", "bound", "weight"))
        if more:
            r = ratio(closure.kit, batch, now) if ratio else None
            b = bound(closure.kit, batch, now, r) if bound else None
            weight = weight * more(closure.kit, batch, now, r, b).detach()
        plain = -(weight * batch["advantage"] * now["logp"]).sum()
        expected = torch.autograd.grad(plain, list(closure.params.values()), allow_unused=True, materialize_grads=True)
        got = list(alone().grads.values())
        top = max(float(e.abs().max()) for e in expected)
        share = 1.0
        if p is not p.core:  # a wrap may weigh the whole term: then the direction must be right
            dots = [(float((g * e).sum()), float(e.square().sum())) for g, e in zip(got, expected)]
            share = sum(d for d, _ in dots) / (sum(q for _, q in dots) or 1.0)
        for g, e in zip(got, expected):
            assert float((g - share * e).abs().max()) <= 1e-10 * (1 + top), f"{entry.name}: wrong on-policy gradient"
        silent = copy.copy(alone)
        silent.batch = batch.put(advantage=torch.zeros_like(batch["advantage"]))
        assert all(float(g.abs().max()) == 0 for g in silent().grads.values()), f"{entry.name}: A = 0 has a gradient"

    environment, models = entry.make(0)
    method = observed(entry.build(), look)
    for _ in run(method, environment, models, until=STEPS):
        pass
    if any(p.core.slot == "surrogate" for t in method.tracks for p in t.of("loss")):
        assert looked, f"{entry.name}: its surrogate was never at the old parameters"
