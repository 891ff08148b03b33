"""Phases: their order, what entering one does, and resuming at every turn, boundaries included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.laws.checks import digest
from trimtab.core.batch import Batch
from trimtab.core.copies import at_phase, polyak, pool
from trimtab.core.errors import MethodError
from trimtab.core.kit import Kit
from trimtab.core.loop import begin, run
from trimtab.core.method import Method, Phase, Track
from trimtab.core.phases import clear, copy, freeze, fresh, phased, thaw
from trimtab.core.piece import piece
from trimtab.core.state import State, load, save
from trimtab.core.terms import Term
from trimtab.stages.update import adamw

torch.set_num_threads(1)

LOG: list[tuple[str, str]] = []


class Net(nn.Module):
    provides = frozenset({"y"})

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Linear(2, 1).double()

    def evaluate(self, batch: Batch, want: frozenset[str]) -> dict[str, torch.Tensor]:
        return {"y": self.net(batch.obs)}


@piece("collect", writes=("obs", "mask", "source"), state={"count": lambda kit, options: 0})
def drawn(kit: Kit, *, name: str) -> Batch:
    LOG.append((name, "collect"))
    kit.state["count"] += 1
    x = torch.randn(4, 2, generator=kit.rng("obs"), dtype=torch.float64)
    return Batch({"obs": x, "mask": torch.ones(4, 1, dtype=torch.bool), "source": torch.zeros(4, dtype=torch.long)})


@piece("loss", wants=("y",), reads=("obs",))
def fit(batch: Batch, now: Any) -> Term:
    return Term((now["y"] - 1).square(), "fit")


@piece("loss", wants=("y",), slot="second", reads=("obs",))
def fit_again(batch: Batch, now: Any) -> Term:
    return Term((now["y"] + 1).square(), "second")


def leg(name: str, *trains: str, **copies: Any) -> Method:
    tracks = tuple(Track(t, trains=t, pieces=(fit(),), update=adamw(lr=0.1)) for t in trains or ("policy",))
    return Method(name, pieces=(drawn(name=name),), tracks=tracks, rows=2).but(copies=copies)


def nets(seed: int = 0) -> dict[str, nn.Module]:
    return {"policy": Net(seed), "critic": Net(seed + 1)}


def weights(state: State, name: str) -> list[float]:
    model: Any = state.lookup()[name]
    return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()


def go(m: Method, turns: int, state: State | None = None) -> State:
    LOG.clear()
    state = state or begin(m, None, nets())
    for _ in run(m, None, state.models, until=turns, state=state):
        pass
    return state


def test_phases_run_in_order_and_the_last_goes_on() -> None:
    m = phased(
        "three",
        [
            Phase("a", leg("one"), {"turns": 2}),
            Phase("b", leg("two"), {"updates": 2}),
            Phase("c", leg("three"), {"turns": 1}),
        ],
    )
    state = go(m, 7)
    assert [name for name, _ in LOG] == ["one", "one", "two", "three", "three", "three", "three"]
    assert (state.phases.index, state.phases.since) == (2, {"turns": 3, "updates": 6, "decisions": 12, "rows": 12})
    assert state.pieces["/count"] == 7, "phases share one state tree"


def test_a_phase_that_is_over_at_once_is_entered_and_left() -> None:
    m = phased(
        "m", [Phase("a", leg("one"), {"turns": 0}, (copy("policy", "critic"),)), Phase("b", leg("two"), {"turns": 1})]
    )
    state = begin(m, None, nets())
    go(m, 1, state)
    assert [name for name, _ in LOG] == ["two"]
    assert weights(state, "critic") == weights(begin(m, None, nets()), "policy")


def test_copy_freeze_and_thaw() -> None:
    both = leg("both", "policy", "critic")
    m = phased(
        "m",
        [
            Phase("a", both, {"turns": 1}),
            Phase("b", both, {"turns": 1}, (copy("policy", "critic"), freeze("policy"))),
            Phase("c", both, {"turns": 1}, (thaw("policy"), freeze("critic"))),
        ],
    )
    state = begin(m, None, nets())
    go(m, 1, state)
    policy, critic = weights(state, "policy"), weights(state, "critic")
    assert policy != critic
    go(m, 2, state)
    assert weights(state, "policy") == policy, "frozen"
    assert weights(state, "critic") != critic
    critic = weights(state, "critic")
    go(m, 3, state)
    assert weights(state, "policy") != policy
    assert weights(state, "critic") == critic
    assert state.phases.frozen == ["critic"]


def test_fresh_makes_parameters_optimiser_and_followers_new() -> None:
    slow = {"slow": polyak("policy", 0.01), "past": pool("policy", k=5, every=1)}
    m = phased(
        "m",
        [
            Phase("a", leg("one", **slow), {"turns": 3}),
            Phase("b", leg("two", **slow), {"turns": 3}, (fresh("policy"),)),
        ],
    )
    state = begin(m, None, nets())
    go(m, 3, state)
    old = weights(state, "policy")
    optimizer = state.pieces["policy/optimizer"]
    assert int(optimizer.state[next(iter(optimizer.state))]["step"]) == 6
    go(m, 4, state)
    optimizer = state.pieces["policy/optimizer"]
    assert int(optimizer.state[next(iter(optimizer.state))]["step"]) == 2
    assert torch.tensor(weights(state, "policy")).sub(torch.tensor(old)).abs().max() > 0.15, (
        "more than two steps of 0.1 from"
    )
    near = torch.tensor(weights(state, "slow")).sub(torch.tensor(weights(state, "policy"))).abs().max()
    assert near < 0.25, "a target network of the old parameters would pull the new ones back"
    assert len(state.copies["past"].memory["snapshots"]) == 1


def test_clear_makes_state_anew() -> None:
    m = phased("m", [Phase("a", leg("one"), {"turns": 3}), Phase("b", leg("two"), {"turns": 3}, (clear("/count"),))])
    assert go(m, 5).pieces["/count"] == 2


def test_at_phase_copies_hold_the_source_at_entry() -> None:
    ref = {"ref": at_phase("policy")}
    m = phased("m", [Phase("a", leg("one", **ref), {"turns": 2}), Phase("b", leg("two", **ref), {"turns": 9})])
    state = begin(m, None, nets())
    start = weights(state, "policy")
    go(m, 2, state)
    assert weights(state, "ref") == start
    at_entry = weights(state, "policy")
    go(m, 4, state)
    assert weights(state, "ref") == at_entry
    assert weights(state, "policy") != at_entry


@pytest.mark.parametrize("k", range(7))
def test_resuming_is_exact_at_every_turn(k: int, tmp_path: Path) -> None:
    """`fresh` draws from the global generators, so a phase must be entered after loading exactly as it was before."""
    copies = {"ref": at_phase("policy"), "slow": polyak("policy", 0.1)}
    one, two = leg("one", "policy", "critic", **copies), leg("two", "policy", "critic", **copies)
    m = phased(
        "m",
        [
            Phase("a", one, {"turns": 2}),
            Phase("b", two, {"rows": 8}, (fresh("critic"), clear("/count"))),
            Phase("c", one, {"turns": 1}, (copy("policy", "critic"), freeze("policy"), fresh("policy"))),
        ],
    )

    def some(turns: int, state: State) -> State:
        loop = run(m, None, state.models, until=7, state=state)
        for _ in range(turns):
            next(loop)
        return state

    straight = digest(some(7, begin(m, None, nets())))
    save(some(k, begin(m, None, nets())), tmp_path)
    torch.rand(3)
    state = begin(m, None, nets(9), seed=9)
    load(state, tmp_path)
    assert digest(some(7 - k, state)) == straight


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: phased("none", []), "none has no phases"),
        (
            lambda: phased("m", [Phase("a", leg("one"), {"turn": 1})]),
            "until='turn' is not counted.*Did you mean 'turns'",
        ),
        (
            lambda: phased("m", [Phase("a", leg("one"), {"turns": 1}, (copy("policy", "critc"),))]),
            "copy.*Did you mean 'critic'",
        ),
        (
            lambda: phased("m", [Phase("a", leg("one"), {"turns": 1}, (freeze("polcy"),))]),
            "freeze.*Did you mean 'policy'",
        ),
        (lambda: phased("m", [Phase("a", leg("one"), {"turns": 1}, (clear("/cuont"),))]), "no piece keeps '/cuont'"),
        (
            lambda: phased("m", [Phase("a", phased("inner", [Phase("b", leg("one"), {"turns": 1})]), {"turns": 1})]),
            "collect",
        ),
        (
            lambda: phased(
                "m",
                [
                    Phase("a", leg("one", c=at_phase("policy")), {"turns": 1}),
                    Phase("b", leg("two", c=polyak("policy", 0.1)), {"turns": 1}),
                ],
            ),
            "copy 'c' is at_phase.*polyak",
        ),
        (
            lambda: phased("m", [Phase("a", leg("one"), {"turns": 1})]).but(copies={"c": at_phase("policy")}),
            "belong into them",
        ),
        (
            lambda: phased(
                "m",
                [
                    Phase("a", leg("one"), {"turns": 1}),
                    Phase(
                        "b",
                        Method(
                            "two",
                            pieces=leg("two").pieces,
                            tracks=(Track("policy", trains="critic", pieces=(fit(),), update=adamw()),),
                        ),
                        {"turns": 1},
                    ),
                ],
            ),
            "share an optimiser",
        ),
    ],
)
def test_phases_that_cannot_run_are_refused(make: Any, words: str) -> None:
    with pytest.raises(MethodError, match=words):
        go(make(), 1)


def test_the_phases_are_part_of_the_fingerprint() -> None:
    def two(until: int, *enter: Any, name: str = "a") -> str:
        return phased(
            "m", [Phase(name, leg("one"), {"turns": until}, enter), Phase("b", leg("two"), {"turns": 1})]
        ).fingerprint()

    assert two(1) == two(1)
    assert len({two(1), two(2), two(1, fresh("policy")), two(1, freeze("policy")), two(1, name="c")}) == 5


def test_a_phase_may_add_a_loss() -> None:
    more = leg("two").then(fit_again())
    m = phased("m", [Phase("a", leg("one"), {"turns": 1}), Phase("b", more, {"turns": 1})])
    steps = list(run(m, None, nets(), until=2))
    assert any("second" in k for k in steps[1].logs)
    assert not any("second" in k for k in steps[0].logs)


def test_what_makes_the_state_of_a_piece_sees_the_method_of_its_phase() -> None:
    @piece("annotate", state={"learners": lambda kit, options: [t.name for t in kit.method.tracks]})
    def looking(kit: Kit, batch: Batch) -> Batch:
        return batch

    made = phased(
        "two", [Phase("one", leg("one", "a").then(looking()), {"turns": 1}), Phase("two", leg("two", "a"), {})]
    )
    state = begin(made, None, {"a": Net(0)})
    assert state.pieces["/learners"] == [t.name for t in made.phases[0].method.tracks]
