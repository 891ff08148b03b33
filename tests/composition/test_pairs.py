"""Every ordered pair of methods: it trains and obeys the laws, or is refused when it is built, by a sentence with both.

For each pair that can be built: two steps of the smallest case with every number finite and parameters that move; law 1
in each of their updates (micro-batches of 3); law 2 from a checkpoint after the first step (into a run that began
otherwise); and both differences in force, neither undone by the other. Registering a method puts it here.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch

from tests.laws.checks import digest, observed, parameters
from trimtab.core.closure import Closure
from trimtab.core.errors import MethodError
from trimtab.core.loop import begin, run
from trimtab.core.method import Method
from trimtab.core.registry import find, methods, parse
from trimtab.core.state import load, save
from trimtab.methods.cases import Case, case

torch.set_num_threads(1)

LANGUAGE = [name for name, d in methods().items() if d.world == "language"]
CONTROL = [name for name, d in methods().items() if d.world == "control"]
TOLERANCE = 1e-10


def built(left: str, right: str) -> Method | None:
    """The pair, or None where it is refused; a refusal names both and says what is wrong."""
    try:
        return parse(f"{left}+{right}")
    except MethodError as refusal:
        said = f"{refusal}"
        assert said.startswith(f"{left}+{right} cannot be built: "), said
        assert said.endswith("."), said
        return None


def small(name: str, seed: int) -> Case:
    return case(find(name).case, seed)


def cut(closure: Closure) -> None:
    """Law 1: the gradient of this update, whole and in micro-batches of 3."""
    if not closure.losses:
        return
    grads = []
    for memory in (None, 3):
        kit = copy.copy(closure.kit)
        kit.memory, kit._once, kit._logs = memory, {}, []
        grads.append(Closure(kit, closure.track, closure.batch)().grads)
    for name, whole in grads[0].items():
        error = float((whole - grads[1][name]).abs().max())
        assert error <= TOLERANCE * (1 + float(whole.abs().max())), f"micro-batches move {name} by {error:.1e}"


def obeys(method: Method, right: str, folder: Path) -> None:
    made = small(right, 0)
    method = made.shrink(method)
    models = made.models_of(method)
    before = parameters(models)
    steps = run(observed(method, cut), made.environment, models, until=2)
    save(next(steps).state, folder)
    last = next(steps)
    assert all(math.isfinite(v) for v in last.logs.values()), last.logs
    assert any(not torch.equal(v, before[name]) for name, v in parameters(models).items()), "no parameter moved"

    other = small(right, 7)
    state = begin(method, other.environment, other.models_of(method), seed=7)
    load(state, folder)
    (resumed,) = run(method, state.environment, state.models, until=2, state=state)
    straight, again = digest(last.state), digest(resumed.state)
    assert straight == again, [k for k in straight if straight[k] != again.get(k)][:3]


def in_force(method: Method, left: str, right: str) -> None:
    """What `right` changed is still there, and so is what `left` did to it."""
    assert method.fingerprint() != find(right)().fingerprint(), f"{left} changes nothing"
    base = find(right).base
    without = built(left, base.name) if base and base.name != left else None
    assert without is None or without.fingerprint() != method.fingerprint(), f"{right} is undone"


@pytest.mark.parametrize("left", LANGUAGE)
def test_a_language_method_over_every_other(left: str, tmp_path: Path) -> None:
    _over(left, [*LANGUAGE, *CONTROL], tmp_path)


@pytest.mark.parametrize("left", CONTROL)
def test_a_control_method_over_every_other(left: str, tmp_path: Path) -> None:
    _over(left, [*CONTROL, *LANGUAGE], tmp_path)


def _over(left: str, rights: list[str], folder: Path) -> None:
    faults = []
    for right in rights:
        method = built(left, right)
        if method is None:
            continue
        try:
            in_force(method, left, right)
            obeys(method, right, folder / right)
        except AssertionError as fault:
            faults.append(f"{left}+{right}: {fault}")
    assert not faults, "\n".join(faults)
