"""The measure: the card's exact checks, and what cannot be compared."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from trimtab.core.loop import run
from trimtab.core.registry import parse
from trimtab.methods.cases import case
from trimtab.stages.sparsity import (
    Count,
    SparsityError,
    changes,
    layer_of,
    overlap,
    parameters,
    scattered,
    sparsity,
)

torch.set_num_threads(1)


def one(reference: Tensor, new: Tensor, dtype: str = "float32", tol: float = 1e-5) -> float:
    return sparsity({"w": reference}, {"w": new}, dtype, tol).total.sparsity


def test_card_check_1_the_same_weights_are_unchanged_and_an_empty_overlap_is_nan() -> None:
    w = {"w": torch.randn(5, 4)}
    found = sparsity(w, {"w": w["w"].clone()}, rank=True)
    assert (found.total.sparsity, found.rank) == (1.0, 0.0)
    nothing = changes(w, w)
    assert not nothing["w"].any()
    shared = overlap(nothing, {"w": torch.ones(5, 4, dtype=torch.bool)})
    assert math.isnan(shared.o1)
    assert shared.o2 == 0.0
    assert math.isnan(overlap(nothing, nothing).o2)
    assert math.isnan(Count().sparsity)


def test_card_check_2_a_difference_of_exactly_tol_is_equal() -> None:
    zero, delta = torch.zeros(4), torch.tensor([0, 1e-5, 2e-5, -1e-6])
    assert one(zero, delta) == 0.75
    assert one(zero, delta, tol=0.0) == 0.25


@pytest.mark.parametrize(("change", "visible"), [(5e-5, False), (7e-5, True)])
def test_card_check_3_bfloat16_hides_half_a_step(change: float, visible: bool) -> None:
    w = torch.tensor([0.02]).bfloat16().float()
    assert float(torch.nextafter(w.bfloat16(), torch.ones(1).bfloat16()).float() - w) == 2**-13
    assert one(w, w + change, "bfloat16", 0.0) == 1 - visible
    assert one(w, w + change, "float32", 0.0) == 0.0


def test_card_check_3_the_tolerance_acts_on_small_weights_alone() -> None:
    small = torch.tensor([1e-4]).bfloat16()
    after = torch.nextafter(small, torch.ones(1).bfloat16())
    assert float(after.float() - small.float()) == 2**-21
    assert (one(small, after, "bfloat16", 0.0), one(small, after, "bfloat16", 1e-5)) == (0.0, 1.0)
    for w, equal in ((2.0**-9, 0.0), (2.0**-9 * 0.99, 1.0)):  # one step is 2^-16 = 1.5e-5 from there on
        before = torch.tensor([w]).bfloat16()
        assert one(before, torch.nextafter(before, torch.ones(1).bfloat16()), "bfloat16") == equal


def test_card_check_4_independent_masks_overlap_as_chance_says() -> None:
    g = torch.Generator().manual_seed(0)
    first, second = ({"w": torch.rand(1_000_000, generator=g) < d} for d in (0.3, 0.15))
    shared = overlap(first, second)
    assert shared.o1 == pytest.approx(0.15, abs=0.002)
    assert shared.o2 == pytest.approx(0.3, abs=0.002)
    assert shared.numbers()["chance_o1"] == pytest.approx(0.15, abs=0.001)
    assert shared.numbers()["chance_o2"] == pytest.approx(0.3, abs=0.001)


def test_card_check_7_sparse_is_not_low_rank() -> None:
    ranks = []
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        delta = torch.randn(64, 64, generator=g) * (torch.rand(64, 64, generator=g) < 0.05)
        ranks.append(sparsity({"w": torch.zeros(64, 64)}, {"w": delta}, "float32", rank=True).rank)
    assert sum(ranks) / 20 == pytest.approx(0.93, abs=0.01)
    assert min(ranks) >= 0.8
    outer = torch.outer(torch.randn(64, generator=g), torch.randn(64, generator=g))
    assert sparsity({"w": torch.zeros(64, 64)}, {"w": outer}, "float32", rank=True).rank == 1 / 64


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.zeros(3))


def test_card_check_8_tied_weights_count_once_and_buffers_do_not() -> None:
    model = Tied()
    assert list(parameters({"policy": model})) == ["policy/embed.weight"]
    held = {name: t for name, t in model.state_dict().items() if name != "steps"}  # both names, one storage
    assert sparsity(held, held).total.size == 24
    apart = {name: t.clone() for name, t in held.items()}
    assert sparsity(held, apart).total.size == 48  # tied no more: two parameters


@pytest.mark.parametrize(
    ("reference", "new", "said"),
    [
        ({"a.w": torch.zeros(2)}, {"b.w": torch.zeros(2)}, r"'a.w' is not among the new parameters \(1 of 1"),
        ({}, {"b.w": torch.zeros(2)}, "'b.w' is not among the reference"),
        ({"w": torch.zeros(2, 3)}, {"w": torch.zeros(3, 2)}, r"'w' has shape \[2, 3\] in the reference and \[3, 2\]"),
        ({"w": torch.zeros(2)}, {"w": torch.zeros(2).int()}, "not floating-point numbers"),
        ({"w": torch.zeros(2)}, {"w": torch.tensor([0, math.nan])}, "'w' holds numbers that are not finite"),
    ],
)
def test_what_cannot_be_compared_is_refused_naming_the_matrix(
    reference: dict[str, Tensor], new: dict[str, Tensor], said: str
) -> None:
    with pytest.raises(SparsityError, match=said):
        sparsity(reference, new)
    with pytest.raises(SparsityError, match=said):
        changes(reference, new)


def test_impossible_options_are_refused() -> None:
    w = {"w": torch.zeros(2)}
    with pytest.raises(SparsityError, match="Did you mean 'bfloat16'"):
        sparsity(w, w, "bfloat1")
    for tol in (-1.0, math.nan, math.inf):
        with pytest.raises(SparsityError, match="at least 0"):
            sparsity(w, w, tol=tol)
    with pytest.raises(SparsityError, match="'w' has shape"):
        overlap({"w": torch.ones(2).bool()}, {"w": torch.ones(3).bool()})
    with pytest.raises(SparsityError, match="'v' is in one of the two masks alone"):
        overlap({"w": torch.ones(2).bool()}, {"w": torch.ones(2).bool(), "v": torch.ones(1).bool()})


def test_totals_weigh_by_size_and_embeddings_are_told_apart() -> None:
    before = {"m.embed_tokens.weight": torch.zeros(90), "m.layers.0.q.weight": torch.zeros(6), "m.layers.0.k.weight":
              torch.zeros(4)}  # fmt: skip
    after = {name: t.clone() for name, t in before.items()}
    after["m.layers.0.q.weight"][:3] = 1.0
    found = sparsity(before, after, "float32")
    assert found.total.sparsity == 0.97
    assert found.without_embeddings.sparsity == 0.7
    assert {name: c.sparsity for name, c in found.layers.items()} == {"m.embed_tokens": 1.0, "m.layers.0": 0.7}
    assert layer_of("policy/actor.0.weight") == "policy/actor.0"
    assert layer_of("logits") == "logits"


def test_tolerances_in_units_of_the_matrix() -> None:
    w = torch.full((4,), 2.0)
    found = sparsity({"w": w}, {"w": w + torch.tensor([0.0, 1e-4, 1e-3, 1.0])}).total.numbers()
    assert [found[f"within_{r}_rms"] for r in ("0.0001", "0.001", "0.01")] == [0.5, 0.75, 0.75]


def test_large_tensors_are_compared_piece_by_piece_to_the_same_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(50, 7), torch.randn(50, 7)
    whole = sparsity({"w": a}, {"w": b}).total, changes({"w": a}, {"w": b})["w"]
    monkeypatch.setattr("trimtab.stages.sparsity.CHUNK", 16)
    pieces = sparsity({"w": a}, {"w": b}).total, changes({"w": a}, {"w": b})["w"]
    assert whole[0] == pieces[0]
    assert torch.equal(whole[1], pieces[1])


def test_random_masks_have_as_many_weights_in_every_matrix() -> None:
    masks = {"a": torch.rand(30, 4) < 0.2, "b": torch.rand(50) < 0.7}
    drawn, again, other = (scattered(masks, seed) for seed in (1, 1, 2))
    for name, mask in masks.items():
        assert drawn[name].shape == mask.shape
        assert int(drawn[name].sum()) == int(mask.sum())
        assert torch.equal(drawn[name], again[name])
    assert not torch.equal(drawn["a"], other["a"])


def test_the_probe_measures_every_network_against_the_start_and_changes_nothing() -> None:
    method = case("steps").shrink(parse("subnetwork(every=2)+sac"))
    plain = case("steps").shrink(parse("subnetwork+sac"))
    ends = []
    for m in (method, plain):
        k = case("steps", 1)
        models = k.models_of(m)
        start = {name: p.clone() for name, p in parameters(models).items()}
        steps = list(run(m, k.environment, models, until=12, seed=3))
        ends.append(parameters(models))
        if m is method:
            logged = [s for s in steps if "policy/sparsity" in s.logs]
            assert [s.turn for s in logged] == [2, 4, 6, 8, 10, 12]
            found = sparsity(start, parameters(models)).networks
            assert sorted(found) == ["critic", "policy", "temperature"]
            for name, c in found.items():
                assert logged[-1].logs[f"{name}/sparsity"] == pytest.approx(c.sparsity)
                assert logged[-1].logs[f"{name}/unchanged_float32"] == pytest.approx(c.share("moved_float32"))
            assert found["critic"].sparsity < 1
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
