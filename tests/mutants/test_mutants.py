"""Seeded mutants: each plants one of the field's common bugs, and the law that must catch it is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden import test_golden, twins
from tests.laws import checks
from tests.laws.table import table
from trimtab.core import closure as closure_module
from trimtab.core import state as state_module
from trimtab.core import terms
from trimtab.core.closure import Closure
from trimtab.stages import surrogate as surrogate_module

ENTRY = table()["spike:chord+d3s+bapo"]


def test_per_micro_batch_means_are_caught_by_law_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commonest silent bug of the field: each micro-batch divides by its own count."""
    checks.check_invariance(ENTRY)
    micro = Closure._micro

    def mutant(self: Closure, where: Tensor | None) -> Any:
        parts = list(micro(self, where))
        for made in parts:  # what "mean of means" amounts to
            yield {name: replace(t, weight=t.weight / len(parts)) for name, t in made.items()}

    monkeypatch.setattr(Closure, "_micro", mutant)
    with pytest.raises(AssertionError, match="moves the gradient"):
        checks.check_invariance(ENTRY)


def test_weights_made_in_the_micro_batch_are_caught_by_law_1(monkeypatch: pytest.MonkeyPatch) -> None:
    terms_of = Closure._terms

    def mutant(self: Closure, rows: Any, scale: Any) -> Any:
        return terms_of(self, rows, [terms.weights(rows, p.core.options, torch.float64) for p in self.losses])

    monkeypatch.setattr(Closure, "_terms", mutant)
    with pytest.raises(AssertionError, match="moves the gradient"):
        checks.check_invariance(ENTRY)


def test_a_bound_solved_per_micro_batch_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """BAPO's released code searches its bounds once per micro-batch, so they depend on the accumulation size."""
    from tests.spikes.bapo import bapo
    from tests.spikes.test_tokens import drifted

    expected = drifted(bapo, memory=None)
    assert drifted(bapo, memory=3) == pytest.approx(expected, abs=1e-12)
    monkeypatch.setattr(closure_module.Kit, "once", lambda self, piece, compute: compute())
    assert drifted(bapo, memory=3) != pytest.approx(expected, abs=1e-6)


def test_merged_log_prob_columns_are_caught_by_the_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampler's log-probability used as the trainer's."""
    from tests.spikes import tokens

    def mutant(batch: Any, now: Any) -> Tensor:
        merged: Tensor = batch["logp_behavior"]
        return merged

    collect = tokens.token_rollouts
    method = test_golden.toy(test_golden.stale()).wrap("collect", tokens.mismatched())
    test_golden.agree("grpo", method, twins.grpo, 0)
    assert collect is tokens.token_rollouts
    monkeypatch.setattr(surrogate_module, "old_logp", mutant)
    with pytest.raises(AssertionError, match="off its twin"):
        test_golden.agree("grpo", method, twins.grpo, 0)


def test_a_lost_optimiser_moment_is_caught_by_law_2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checks.check_resume_here(ENTRY, tmp_path / "sound")
    restore = state_module._restore

    def mutant(target: Any, saved: Any, path: str) -> Any:
        if isinstance(target, torch.optim.Optimizer):
            for kept in saved["state"].values():
                kept["exp_avg_sq"].zero_()
        return restore(target, saved, path)

    monkeypatch.setattr(state_module, "_restore", mutant)
    with pytest.raises(AssertionError, match="resumed run differs"):
        checks.check_resume_here(ENTRY, tmp_path / "mutant")


def test_a_lost_random_stream_is_caught_by_law_2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tree = state_module.State.tree

    def mutant(self: state_module.State) -> dict[str, Any]:
        return {**tree(self), "streams": {}}

    monkeypatch.setattr(state_module.State, "tree", mutant)
    with pytest.raises(AssertionError, match="resumed run differs"):
        checks.check_resume_here(ENTRY, tmp_path)


def test_an_unaligned_load_is_caught_by_law_2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sound").mkdir()
    checks.check_alignment(tmp_path / "sound")
    monkeypatch.setattr(state_module.torch, "empty_like", lambda t: _Same(t))
    with pytest.raises(AssertionError, match="unaligned view"):
        checks.check_alignment(tmp_path)


class _Same:
    """Stands in for a fresh allocation and hands back the file's own view."""

    def __init__(self, view: Tensor) -> None:
        self.view = view

    def copy_(self, other: Tensor) -> Tensor:
        return other


def test_mask_used_for_keep_is_caught_by_the_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.spikes.test_tokens import check_keep

    check_keep()
    mutant = terms.mask_of

    def merged(batch: Any) -> Tensor:
        return mutant(type(batch)({k: v for k, v in batch.columns.items() if k != "keep"}))

    monkeypatch.setattr(terms, "mask_of", merged)
    with pytest.raises(AssertionError, match="kept"):
        check_keep()


def test_a_swapped_sign_is_caught_by_law_5_and_the_twin() -> None:
    entry = table()["spike:bapo"]
    checks.check_surrogate(entry)
    method = entry.build()
    shape = method.get("surrogate.shape")
    turned = method.swap("surrogate.shape", replace(shape, fn=lambda *a, **options: -shape.fn(*a, **options)))
    with pytest.raises(AssertionError, match="on-policy gradient"):
        checks.check_surrogate(replace(entry, build=lambda: turned))
