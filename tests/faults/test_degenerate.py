"""Law 6 for every registered language method: groups without a signal, groups of one, empty masks, nothing at all."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.laws.table import Entry, table
from trimtab.core.batch import Batch
from trimtab.core.kit import Kit
from trimtab.core.loop import run
from trimtab.core.piece import piece
from trimtab.core.registry import methods
from trimtab.core.terms import rows_of

torch.set_num_threads(1)

TABLE = table()
NAMES = [name for name, definition in methods().items() if definition.world == "language"]
EACH = pytest.mark.parametrize("name", NAMES)
STEPS = 3


@piece("collect", writes=("reward", "mask", "keep", "group"))
def spoiled(kit: Kit, *, inner: Any, how: str) -> Batch:
    """A wrap: the same rows with one thing gone wrong."""
    rows: Batch = inner()
    n = torch.arange(len(rows), device=rows.mask.device)
    if how == "equal" and "reward" in rows:
        last = rows.mask & (rows.mask.cumsum(1) == rows.mask.sum(1, keepdim=True))
        return rows.put(reward=torch.where(last, 0.1, 0.0).to(rows.reward.dtype))
    if how == "alone" and "group" in rows:
        return rows.put(group=rows.group.max() + 1 + n)
    if how == "one empty row":
        mask = rows.mask & (n > 0)[:, None]
        return rows.put(mask=mask, keep=mask)
    if how == "nothing":
        empty = torch.zeros_like(rows.mask)
        return rows.put(mask=empty, keep=empty)
    return rows


def go(name: str, how: str, memory: int | None = None) -> tuple[list[Any], list[torch.Tensor], list[torch.Tensor]]:
    """Steps of a spoiled run, and the policy's parameters before and after."""
    entry: Entry = TABLE[name]
    environment, models = entry.make(0)
    before = [p.detach().clone() for p in models["policy"].parameters()]
    method = entry.build()
    if method.phases:
        method = method.each(lambda _, inside: inside.wrap("collect", spoiled(how=how)))
    else:
        method = method.wrap("collect", spoiled(how=how))
    steps = list(run(method, environment, models, until=STEPS, memory=memory))
    return steps, before, list(models["policy"].parameters())


@EACH
@pytest.mark.parametrize("memory", [None, 5])
@pytest.mark.parametrize("how", ["equal", "alone", "one empty row", "nothing"])
def test_degenerate_rows_leave_every_number_finite(name: str, how: str, memory: int | None) -> None:
    steps, _, after = go(name, how, memory)
    assert len(steps) == STEPS
    assert all(math.isfinite(v) for step in steps for v in step.logs.values())
    assert all(bool(torch.isfinite(p).all()) for p in after)
    assert all(bool(torch.isfinite(step.batch.advantage).all()) for step in steps if "advantage" in step.batch)


@EACH
@pytest.mark.parametrize("memory", [None, 5])
def test_without_a_decision_the_gradient_is_exactly_zero_and_nothing_moves(name: str, memory: int | None) -> None:
    steps, before, after = go(name, "nothing", memory)
    assert all(v == 0 for step in steps for k, v in step.logs.items() if k.endswith("grad_norm"))
    assert all(torch.equal(a, b) for a, b in zip(before, after))


@EACH
def test_a_row_without_a_decision_gets_no_credit(name: str) -> None:
    steps, before, after = go(name, "one empty row")
    for step in steps:
        if "advantage" in step.batch:
            assert step.batch.advantage[~step.batch.mask.any(1)].abs().sum() == 0
    assert any(not torch.equal(a, b) for a, b in zip(before, after)), "the other rows still learn"


@EACH
def test_where_no_group_holds_a_signal_and_none_is_made_up_nothing_moves(name: str) -> None:
    """A method may teach from equal rewards only where its credit says so, in the column that a reader can look at."""
    for how in ("equal", "alone"):
        steps, before, after = go(name, how)
        silent = [s for s in steps if "advantage" in s.batch and float(s.batch.advantage.abs().max()) == 0]
        shown = any(bool(rows_of(s.batch, "expert").any()) for s in steps)  # demonstrations are a signal of their own
        if len(silent) == len(steps) and not shown:
            assert all(v == 0 for s in steps for k, v in s.logs.items() if k.endswith("grad_norm"))
            assert all(torch.equal(a, b) for a, b in zip(before, after))


def test_the_bases_make_up_no_signal() -> None:
    for name in ("reinforce", "rloo", "grpo"):
        for how in ("equal", "alone"):
            steps, _, _ = go(name, how)
            assert all(float(s.batch.advantage.abs().max()) == 0 for s in steps)
