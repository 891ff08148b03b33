"""Batches: joining, taking, statistics over rows that share an id, and refusals that are sentences."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trimtab.core.batch import Batch, Guard, Segments
from trimtab.core.errors import ColumnError

torch.set_num_threads(1)


def ragged() -> tuple[Batch, Batch]:
    a = Batch(
        {
            "prompt": torch.tensor([[1, 2], [3, 4]]),
            "mask": torch.tensor([[True, True, True], [True, False, False]]),
            "reward": torch.tensor([[0.0, 0.0, 1.0], [2.0, 0.0, 0.0]]),
            "group": torch.tensor([7, 7]),
            "name": ["a", "b"],
        }
    )
    b = Batch(
        {
            "prompt": torch.tensor([[5, 6, 7]]),
            "mask": torch.tensor([[True]]),
            "logp": torch.tensor([[-0.5]]),
            "obs": torch.ones(1, 1, 2),
            "terminated": torch.tensor([True]),
        }
    )
    return a, b


def test_rows_that_lack_a_column_may_be_the_longest() -> None:
    short = Batch({"mask": torch.ones(2, 2, dtype=torch.bool), "logp": torch.zeros(2, 2), "obs": torch.zeros(2, 3)})
    long = Batch({"mask": torch.ones(1, 5, dtype=torch.bool)})
    for pair in ([short, long], [long, short]):
        joined = Batch.cat(pair)
        assert joined.mask.shape == joined.logp.shape == (3, 5)
        assert joined.obs.shape == (3, 3), "what is no sequence of decisions keeps its width"
        assert int(joined.logp.isnan().sum()) == 5


def test_cat_pads_decisions_right_prompts_left_and_fills_what_is_missing() -> None:
    both = Batch.cat(list(ragged()))
    assert both.prompt.tolist() == [[0, 1, 2], [0, 3, 4], [5, 6, 7]]
    assert both.mask.tolist() == [[True, True, True], [True, False, False], [True, False, False]]
    assert both.group.tolist() == [7, 7, -1], "a row of no group must not join a group"
    assert both.name == ["a", "b", None]
    assert both.terminated.tolist() == [False, False, True]
    assert both.reward[2].isnan().all(), "a reward that was never given must not look like a number"
    assert both.logp[:2].isnan().all()
    assert both.logp[2].tolist() == [-0.5, 0, 0], "padded like every other decision"
    assert both.obs.shape == (3, 3, 2)
    assert both.obs[:2].isnan().all()
    assert {n: both[n].dtype for n in ("prompt", "mask", "group", "terminated")} == {
        "prompt": torch.int64, "mask": torch.bool, "group": torch.int64, "terminated": torch.bool,
    }  # fmt: skip


def test_cat_is_associative_and_ignores_empty_batches() -> None:
    a, b = ragged()
    empty = a.take(torch.tensor([], dtype=torch.long))
    assert len(empty) == 0
    one, other = Batch.cat([Batch.cat([a, empty, b]), a]), Batch.cat([a, Batch.cat([b, a])])
    assert list(one) == list(other)
    for name in one:
        if isinstance(one[name], Tensor):
            torch.testing.assert_close(one[name], other[name], equal_nan=True, rtol=0, atol=0)
        else:
            assert one[name] == other[name]
    assert len(Batch.cat([])) == 0


def test_rows_that_nothing_was_selected_from_keep_all_their_decisions() -> None:
    """Fresh rows have no `keep` yet; beside replayed ones that have it they must not silently stop learning."""
    a, b = ragged()
    both = Batch.cat([a.put(keep=a.mask & False), b])
    assert both.keep.tolist() == [[False] * 3, [False] * 3, [True, False, False]]


def test_take_by_index_and_by_mask_keeps_order_and_lists() -> None:
    both = Batch.cat(list(ragged()))
    picked = both.take(torch.tensor([2, 0, 0]))
    assert picked.name == [None, "a", "a"]
    assert picked.prompt[:, -1].tolist() == [7, 2, 2]
    masked = both.take(torch.tensor([False, True, True]))
    assert masked.name == ["b", None]
    assert masked.group.tolist() == [7, -1]


def test_take_refuses_a_mask_of_another_number_of_rows() -> None:
    with pytest.raises(ColumnError, match="mask of 2 rows cannot choose from a batch of 3"):
        Batch.cat(list(ragged())).take(torch.tensor([True, True]))


def test_put_makes_another_batch_and_leaves_this_one() -> None:
    a, _ = ragged()
    more = a.put(advantage=torch.zeros(2, 3))
    assert "advantage" in more
    assert "advantage" not in a
    assert more.mask is a.mask, "columns are shared, not copied"


@pytest.mark.parametrize("wrong", [torch.zeros(3), ["one"], torch.zeros(()), 1.0])
def test_a_column_needs_one_entry_per_row(wrong: object) -> None:
    with pytest.raises(ColumnError, match="rows"):
        ragged()[0].put(wrong=wrong)  # type: ignore[arg-type]


def test_missing_columns_say_what_there_is() -> None:
    a, _ = ragged()
    for read in (lambda: a["advantage"], lambda: a.advantage, lambda: a.by("episode")):
        with pytest.raises(
            ColumnError, match=r"no column '(advantage|episode)' in this batch; it has \['group', 'mask'"
        ):
            read()
    assert a.get("advantage") is None, "a mapping's get() asks, it does not demand"
    assert a.get("group") is a.group


def test_guard_says_who_touched_what_and_what_to_do() -> None:
    a = ragged()[0].guarded(Guard("clever", frozenset({"mask"}), frozenset({"advantage"})))
    assert a.mask.any()
    assert a.put(advantage=torch.ones(2)).advantage.sum() == 2, "what a piece writes it may read"
    for read in (lambda: a.reward, lambda: a.get("reward"), lambda: a.by("group"), lambda: a.score()):
        with pytest.raises(
            ColumnError, match=r"clever reads column '(reward|group)' without declaring it; it declared"
        ):
            read()
    with pytest.raises(ColumnError, match=r"clever writes column 'keep'.*Add 'keep' to its declaration\."):
        a.put(keep=torch.ones(2))
    with pytest.raises(ColumnError, match="reads column 'reward'"):
        _ = a.take(torch.tensor([0])).reward  # the guard survives taking


def test_decisions_are_those_of_our_policy_only() -> None:
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    assert Batch({"mask": mask}).decisions == 5
    assert Batch({"mask": mask, "source": torch.tensor([0, 1, 0])}).decisions == 4
    assert Batch({"reward": torch.zeros(4)}).decisions == 4


# -- by(level) ---------------------------------------------------------------------------------------------------

IDS = [torch.randint(-1, 4, (17,), generator=torch.Generator().manual_seed(s)) for s in range(4)]
IDS += [torch.tensor([5]), torch.tensor([9, -1, 3]), torch.zeros(6, dtype=torch.long)]


def naive(ids: Tensor, x: Tensor, what: Callable[[list[float], int], float]) -> list[float]:
    """`what(values of the row's segment, place of the row among them)` for every row, by loops."""
    made = []
    for i in range(len(ids)):
        members = [j for j in range(len(ids)) if int(ids[j]) == int(ids[i])]
        made.append(what([float(x[j]) for j in members], members.index(i)))
    return made


def spread(v: list[float], ddof: int) -> float:
    mean = sum(v) / len(v)
    return math.sqrt(sum((y - mean) ** 2 for y in v) / (len(v) - ddof)) if len(v) > ddof else 0.0


@pytest.mark.parametrize("ids", IDS, ids=range(len(IDS)))
def test_segments_agree_with_loops(ids: Tensor) -> None:
    x = torch.randint(-3, 4, (len(ids),), generator=torch.Generator().manual_seed(5)).double()  # with many ties
    by = Batch({"group": ids}).by("group")
    expected: dict[str, tuple[Tensor, Callable[[list[float], int], float]]] = {
        "mean": (by.mean(x), lambda v, i: sum(v) / len(v)),
        "sum": (by.sum(x), lambda v, i: sum(v)),
        "std1": (by.std(x), lambda v, i: spread(v, 1)),
        "std0": (by.std(x, ddof=0), lambda v, i: spread(v, 0)),
        "std2": (by.std(x, ddof=2), lambda v, i: spread(v, 2)),
        "max": (by.max(x), lambda v, i: max(v)),
        "min": (by.min(x), lambda v, i: min(v)),
        "count": (by.count(), lambda v, i: len(v)),
        "same": (by.same(x), lambda v, i: len(set(v)) == 1),
        "rank": (by.rank(x), lambda v, i: sorted(range(len(v)), key=lambda k: (v[k], k)).index(i)),
        "first": (by.gather(by.distinct(x)), lambda v, i: v[0]),
    }
    for name, (got, what) in expected.items():
        assert got.tolist() == pytest.approx(naive(ids, x, what), abs=1e-12), name
    assert by.size == len(set(ids.tolist()))
    assert by.distinct(ids).tolist() == sorted(set(ids.tolist()))
    assert by.total(x).tolist() == pytest.approx([float(x[ids == u].sum()) for u in ids.unique()], abs=1e-12)


def test_std_of_equal_values_is_exactly_zero_whatever_their_size() -> None:
    ids = torch.tensor([0, 0, 0, 1, 1, 2])
    for dtype in (torch.float32, torch.float64):
        for value in (1e30, 0.1, 1 / 3, 12345678.9, -1e-30):
            assert Segments.of(ids).std(torch.full((6,), value, dtype=dtype)).tolist() == [0.0] * 6
    near = torch.tensor([1e8, 1e8 + 1, 1e8 + 2, 0, 0, 0], dtype=torch.float64)
    assert Segments.of(ids).std(near)[:3].tolist() == pytest.approx([1.0] * 3, abs=1e-9)


def test_statistics_of_wide_columns_go_column_by_column() -> None:
    ids = torch.tensor([0, 0, 0, 1, 1, -1])
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    by = Segments.of(ids)
    for made in (by.mean, by.sum, by.std):
        assert torch.equal(made(x), torch.stack([made(x[:, k]) for k in range(3)], 1))


def test_bool_columns_are_counted_not_ored() -> None:
    by = Segments.of(torch.tensor([0, 0, 0, 1]))
    success = torch.tensor([True, False, True, False])
    assert by.sum(success).tolist() == [2, 2, 2, 0]
    assert by.mean(success).tolist() == pytest.approx([2 / 3] * 3 + [0.0])
    assert by.same(success).tolist() == [False, False, False, True]


def test_nan_does_not_hide_in_a_segment() -> None:
    by = Segments.of(torch.tensor([0, 0, 1, 1]))
    x = torch.tensor([1.0, float("nan"), 2.0, 2.0])
    assert by.mean(x).isnan().tolist() == [True, True, False, False]
    assert by.std(x).isnan().tolist() == [True, True, False, False]
    assert by.same(x).tolist() == [False, False, True, True]
    assert by.max(x).isnan().tolist() == [True, True, False, False]


def test_score_is_the_sum_over_decisions() -> None:
    assert Batch({"reward": torch.tensor([[1.0, 2.0], [0.0, 5.0]])}).score().tolist() == [3.0, 5.0]
    assert Batch({"reward": torch.tensor([1.0, 5.0])}).score().tolist() == [1.0, 5.0]
