"""Reductions against literal loops, and the cutting of an update into micro-batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab.core.batch import Batch
from trimtab.core.errors import MethodError
from trimtab.core.terms import SOURCES, Term, fixed, mask_of, reduce, rows_of, split, units, weights

torch.set_num_threads(1)

PERS: list[Any] = ["token", "row", "row_sum", "group", "episode", "pair", fixed(7.0)]


def ragged(seed: int) -> Batch:
    """Rows of several sources and groups; some have an empty mask; padding is dirty; `keep` is less than `mask`."""
    g = torch.Generator().manual_seed(seed)
    n, t = 11, 5
    mask = torch.arange(t) < torch.randint(0, t + 1, (n, 1), generator=g)
    keep = mask & (torch.rand(n, t, generator=g) < 0.7)
    keep[3] = False
    return Batch(
        {
            "mask": mask,
            "keep": keep,
            "source": torch.randint(0, 3, (n,), generator=g),
            "group": torch.randint(0, 4, (n,), generator=g),
            "episode": torch.randint(0, 5, (n,), generator=g),
            "pair": torch.randint(0, 5, (n,), generator=g),
        }
    )


def literal(batch: Batch, value: Tensor, per: Any, rows: Any) -> float:
    """DESIGN section 4 by loops over rows and decisions."""
    names = SOURCES if rows is None else (rows,) if isinstance(rows, str) else rows
    chosen = [i for i in range(len(batch)) if SOURCES[int(batch.source[i])] in names]
    steps = {i: [t for t in range(batch.keep.shape[1]) if bool(batch.keep[i, t])] for i in chosen}

    def at(i: int, t: int) -> float:
        return float(value[i] if value.dim() == 1 else value[i, t])

    sums = {i: sum(at(i, t) for t in steps[i]) for i in chosen}
    if per == "token":
        return sum(sums.values()) / max(1, sum(len(s) for s in steps.values()))
    if per == "row":
        return sum(sums[i] / max(1, len(steps[i])) for i in chosen) / max(1, len(chosen))
    if per == "row_sum":
        return sum(sums.values()) / max(1, len(chosen))
    if isinstance(per, fixed):
        return sum(sums.values()) / (max(1, len(chosen)) * per.length)
    level = {int(batch[per][i]) for i in chosen}
    total = 0.0
    for u in level:
        members = [i for i in chosen if int(batch[per][i]) == u]
        total += sum(sums[i] for i in members) / max(1, sum(len(steps[i]) for i in members))
    return total / max(1, len(level))


@pytest.mark.parametrize("per", PERS, ids=str)
@pytest.mark.parametrize("rows", [None, "policy", "replay", ("policy", "expert"), "teacher"], ids=str)
def test_every_reduction_is_its_loop(per: Any, rows: Any) -> None:
    for seed in range(6):
        batch = ragged(seed)
        value = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        dirty = torch.where(batch.keep, value, torch.full_like(value, float("nan")))
        weight = weights(batch, {"per": per, "rows": rows}, torch.float64)[0]
        assert float(reduce(dirty, weight, per)) == pytest.approx(literal(batch, value, per, rows), abs=1e-12)


@pytest.mark.parametrize("per", ["token", "row", "group", "episode", "pair"])
def test_a_value_of_the_whole_row_counts_as_each_of_its_decisions(per: str) -> None:
    batch = ragged(1)
    value = torch.randn(len(batch), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weight = weights(batch, {"per": per, "rows": None}, torch.float64)[0]
    spread = value[:, None].expand(batch.mask.shape)
    assert float(reduce(value, weight, per)) == pytest.approx(literal(batch, value, per, None), abs=1e-12)
    assert float(reduce(value, weight, per)) == pytest.approx(float(reduce(spread, weight, per)), abs=1e-12)


@pytest.mark.parametrize("per", ["row_sum", fixed(4)], ids=str)
def test_a_value_of_the_whole_row_is_refused_where_it_would_be_multiplied_by_the_length(per: Any) -> None:
    batch = ragged(1)
    weight = weights(batch, {"per": per, "rows": None}, torch.float64)[0]
    with pytest.raises(MethodError, match="one value per row cannot be reduced"):
        reduce(torch.ones(len(batch)), weight, per)


def test_totals_by_hand() -> None:
    batch = Batch({"mask": torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)})
    value = torch.tensor([[1.0, 3.0, 9.0], [5.0, 9.0, 9.0], [9.0, 9.0, 9.0]], dtype=torch.float64)
    expected = {"token": 9 / 3, "row": (2 + 5 + 0) / 3, "row_sum": 9 / 3, fixed(2): 9 / 6}
    for per, number in expected.items():
        weight = weights(batch, {"per": per, "rows": None}, torch.float64)[0]
        assert float(reduce(value, weight, per)) == pytest.approx(number, abs=1e-15), per


def test_metrics_are_means_over_decisions_whatever_the_reduction() -> None:
    batch = ragged(0)
    token = weights(batch, {"per": "token", "rows": "policy"}, torch.float64)
    other = weights(batch, {"per": fixed(3), "rows": "policy"}, torch.float64)
    assert torch.equal(token[1], other[1])
    assert torch.equal(token[0], token[1])


@pytest.mark.parametrize("per", PERS, ids=str)
def test_nothing_to_learn_from_is_zero_not_nan(per: Any) -> None:
    batch = ragged(0)
    empty = batch.put(keep=torch.zeros_like(batch.keep))
    for rows in (None, "teacher"):
        weight = weights(empty, {"per": per, "rows": rows}, torch.float64)[0]
        assert float(reduce(torch.full(weight.shape, float("inf"), dtype=torch.float64), weight, per)) == 0.0


@pytest.mark.parametrize("per", PERS, ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 11, 50, None])
def test_weights_of_micro_batches_add_up(per: Any, size: int | None) -> None:
    batch = ragged(3)
    value = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weight = weights(batch, {"per": per, "rows": None}, torch.float64)
    unit = per if per in ("group", "pair") else "row"
    parts = split(units(batch, unit), size)
    total = sum(float(reduce(value[p], weight[0].index_select(0, p), per)) for p in parts)
    assert total == pytest.approx(literal(batch, value, per, None), abs=1e-12)


def test_unknown_reductions_sources_and_lengths_are_refused() -> None:
    batch = ragged(0)
    with pytest.raises(MethodError, match=r"per='tokn'.*Did you mean 'token'"):
        weights(batch, {"per": "tokn", "rows": None}, torch.float64)
    with pytest.raises(MethodError, match=r"rows='polcy'.*Did you mean 'policy'"):
        weights(batch, {"per": "token", "rows": "polcy"}, torch.float64)
    for length in (0, -1, float("nan")):
        with pytest.raises(MethodError, match="positive"):
            fixed(length)


def test_without_columns_of_its_own_a_batch_is_all_policy_and_one_decision_a_row() -> None:
    batch = Batch({"obs": torch.zeros(3, 2)})
    assert rows_of(batch, "policy").tolist() == [True] * 3
    assert rows_of(batch, "expert").tolist() == [False] * 3
    assert mask_of(batch).shape == (3, 1)
    assert mask_of(Batch({"mask": torch.tensor([True, False])})).tolist() == [[True], [False]]


def test_keep_goes_before_mask() -> None:
    batch = ragged(0)
    assert mask_of(batch) is batch.keep


def test_a_term_times_a_factor_leaves_metrics_alone() -> None:
    value = torch.ones(2, 3)
    assert (Term(value, "loss") * 3.0).value.sum() == 18
    assert (Term(value, "seen", metric=True) * 3.0).value.sum() == 6


# -- cutting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, 1, 2, 3, 5, 8, 40])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shuffled", [False, True])
def test_split_covers_every_row_once_and_never_cuts_a_unit(size: int | None, seed: int, shuffled: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    n = int(torch.randint(1, 30, (), generator=g))
    ids = units(Batch({"pair": torch.randint(-1, 6, (n,), generator=g)}), "pair")
    parts = split(ids, size, torch.Generator().manual_seed(seed) if shuffled else None)
    assert sorted(torch.cat(parts).tolist()) == list(range(n))
    home = {}
    for k, part in enumerate(parts):
        assert len(part)
        for i in part.tolist():
            assert home.setdefault(int(ids[i]), k) == k, "a micro-batch cut through a unit"
        largest = max(int((ids == ids[i]).sum()) for i in part.tolist())
        assert size is None or len(part) <= max(size, largest)


def test_rows_of_no_unit_stand_alone() -> None:
    ids = units(Batch({"pair": torch.tensor([-1, 4, -1, 4, -1])}), "pair")
    assert len(set(ids.tolist())) == 4
    assert ids[1] == ids[3]
    assert sorted(len(p) for p in split(ids, 1)) == [1, 1, 1, 2]


def test_split_keeps_order_without_a_generator_and_shuffles_by_seed_with_one() -> None:
    rows = torch.arange(10)
    assert torch.cat(split(rows, 3)).tolist() == list(range(10))
    cut = [torch.cat(split(rows, 3, torch.Generator().manual_seed(s))).tolist() for s in (0, 0, 1)]
    assert cut[0] == cut[1] != cut[2]
    assert [len(p) for p in split(rows, 3, torch.Generator().manual_seed(0))] == [3, 3, 3, 1]
    seen = {tuple(split(rows, 5, torch.Generator().manual_seed(s))[0].tolist()) for s in range(50)}
    assert len(seen) > 40, "every seed should give another half"
