"""Law 7 is not optional: whatever is registered has a literal twin, and agrees with it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import pytest
import torch

from tests.golden import control_runs, twins
from tests.golden.compared import Compared, agreed
from trimtab.core.registry import Definition, find, methods

torch.set_num_threads(1)

WORLDS: dict[str, tuple[Collection[str], str]] = {
    "language": (twins.TWINS, "tests/golden/twins.py"),
    "control": (control_runs.TWINS, "tests/golden/control_runs.py"),
}
CONTROL = sorted(name for name, d in methods().items() if d.world == "control")


def without_a_twin(registered: Mapping[str, Definition]) -> list[str]:
    """A sentence for each method that has none."""
    made = []
    for name, definition in registered.items():
        known, where = WORLDS.get(definition.world, ((), "a table of its own beside tests/golden/control_runs.py"))
        if name not in known:
            made.append(f"{name} ({definition.world}) has no literal twin; write one and add it to TWINS in {where}")
    return made


@pytest.mark.parametrize("name", sorted(methods()))
def test_every_registered_method_has_a_twin(name: str) -> None:
    assert not without_a_twin({name: methods()[name]})


@pytest.mark.parametrize("world", ["language", "control", "planning"])
def test_a_method_registered_without_a_twin_is_named(world: str) -> None:
    new = replace(find("ppo"), name="brand_new", world=world)
    (said,) = without_a_twin({**methods(), "brand_new": new})
    assert said.startswith(f"brand_new ({world}) has no literal twin")


def test_twins_are_of_registered_methods() -> None:
    for world, (known, where) in WORLDS.items():
        left = set(known) - {n for n, d in methods().items() if d.world == world}
        assert not left, f"{where} has twins of {sorted(left)}, which nobody registers"


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", CONTROL)
def test_control_method_agrees_with_its_twin(name: str, seed: int) -> None:
    assert agreed(control_runs.TWINS[name](seed), name) >= 1


def test_a_twin_that_compares_nothing_does_not_count() -> None:
    still = {"w": torch.zeros(2)}
    for turns in ([], [Compared(still, still, still, moves=0.0)]):
        with pytest.raises(AssertionError, match="in no turn in which it moves"):
            agreed(iter(turns), "x")
    with pytest.raises(AssertionError, match="did not move"):
        agreed(iter([Compared(still, still, still)]), "x")
    with pytest.raises(AssertionError, match="off its twin by 1"):
        agreed(iter([Compared(still, {"w": torch.ones(2)}, still)]), "x")
