"""The claim of sub-networks at a minuscule size: arms are pairs, metrics are there, masks are what they say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from trimtab.claims import find_claim
from trimtab.claims import subnetwork as module
from trimtab.stages.subnetwork import read_mask

CACHES = (module.full_run, module._folder)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two turns of few rows; what was trained so little is forgotten afterwards. The start is the real one."""
    for cache in CACHES:
        cache.cache_clear()
    for name, value in (("TURNS", 2), ("PROMPTS", 4), ("GROUP", 2), ("LR", 1e-3)):
        monkeypatch.setattr(module, name, value)
    yield
    for cache in CACHES:
        cache.cache_clear()


@pytest.mark.parametrize("name", module.ARMS)
def test_every_arm_is_a_function_of_its_seed_and_gives_every_metric(name: str) -> None:
    study = find_claim("subnetwork").mechanism
    once, again = (study.measure(study.arms[name].make(1), 1) for _ in range(2))
    assert once == again
    assert {p.metric for p in study.parts} <= set(once)
    assert 0 <= once["unchanged_float32"] <= once["sparsity"] <= 1
    if name != "masked":
        assert (once["agreement"] == 1.0) == (name == "grpo")


def test_the_start_is_held_by_bfloat16_and_the_masks_are_as_large_as_they_should_be(tmp_path: Path) -> None:
    _, policy = module.started(0)
    for p in policy.parameters():
        assert torch.equal(p, p.bfloat16().float())
    changed, lot = (read_mask(module.mask_for(0, by_lot), "policy") for by_lot in (False, True))
    assert all(int(changed[name].sum()) == int(lot[name].sum()) for name in changed)
    assert any(not torch.equal(changed[name], lot[name]) for name in changed)


def test_what_is_imitated_is_in_the_form_it_is_said_to_be() -> None:
    from trimtab.core.loop import run

    for name, words in (("taught form", ""), ("foreign form", "the sum is ")):
        environment, policy = module.started(0)
        batch = next(run(module.ARMS[name].make(0), environment, policy, until=1)).batch
        assert len(batch) == 8
        for text, question, row, mask in zip(batch.response, batch.question, batch.action, batch.mask):
            a, b = question.rstrip("=").split("+")
            assert text == (f"{words}{int(a) + int(b)}." if words else str(int(a) + int(b)))
            assert policy.decode(row[mask].tolist()).strip() == text
