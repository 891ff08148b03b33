"""Pieces: how options are bound, checked, found, replaced and resolved."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.spikes.bapo import toy_grpo
from tests.spikes.tokens import case
from trimtab.core.errors import MethodError
from trimtab.core.kit import Kit
from trimtab.core.loop import begin
from trimtab.core.piece import RESERVED, Piece, piece
from trimtab.core.schedules import linear
from trimtab.stages.surrogate import clip, pessimistic, scaled, score_function, surrogate, token_ratio
from trimtab.stages.terms import kl_penalty, nll
from trimtab.stages.update import adamw

torch.set_num_threads(1)


@piece("part", wants=("logp",), reads=("mask",))
def leaf(x: float, *, k: float = 2.0) -> float:
    return x * k


@piece("loss", slot="outer", uses=("reference",), per="row")
def outer(kit: Kit, x: float, *, inside: Any = None, needed: float) -> Any:
    return needed + (inside(x) if inside else 0)


@piece("loss")
def plus(x: float, *, inner: Any, more: float = 1.0) -> Any:
    return inner(x) + more


def kit() -> Kit:
    environment, models = case(0)
    method = toy_grpo()
    return Kit(begin(method, environment, models), method, None, False)


def test_options_go_by_name_or_in_written_order() -> None:
    assert clip(0.1, 0.3) == clip(low=0.1, high=0.3) == clip(0.1, high=0.3)
    assert clip(0.1).options == {"low": 0.1, "high": 0.2}
    assert clip() != clip(0.1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: clip(hihg=0.3), r"clip has no option 'hihg'\. Known: high, low\. Did you mean 'high'\?"),
        (lambda: clip(0.1, 0.2, 0.3), r"clip has no option '0.3'"),
        (lambda: clip(0.1, low=0.2), r"clip got its option 'low' twice"),
        (lambda: outer(), r"outer needs a value for its option 'needed'"),
        (lambda: clip(1.5), r"clip: low=1.5 must be in \[0, 1\]"),
        (lambda: surrogate(ratio=token_ratio(), shape=score_function()), "score_function.*uses no ratio"),
        (lambda: surrogate(shape=pessimistic()), "pessimistic.*needs a ratio"),
        (lambda: kl_penalty(estimator="k4"), r"estimator='k4' is not known"),
        (lambda: piece("credits"), r"'credits' is not a stage.*Did you mean 'credit'"),
    ],
)
def test_wrong_options_are_refused_with_a_sentence(make: Any, words: str) -> None:
    with pytest.raises(MethodError, match=words):
        make()


def test_options_of_the_core_have_defaults_of_the_piece_and_wraps_have_none() -> None:
    assert outer(needed=1.0).options == {"inside": None, "needed": 1.0, "per": "row", "rows": None, "unit": "row"}
    assert surrogate(ratio=token_ratio(), shape=pessimistic()).options["rows"] == "policy"
    assert nll().options["rows"] is None
    assert not set(scaled(by=2.0).options) & set(RESERVED["loss"])


def test_slots() -> None:
    assert adamw().slot == "update"
    assert nll().slot == "nll"
    assert surrogate(ratio=token_ratio(), shape=pessimistic()).slot == "surrogate"
    assert clip().slot == "clip"


def test_declarations_reach_up_from_parts() -> None:
    one = outer(inside=leaf(), needed=0.0)
    assert [p.name for p in one.walk()] == ["outer", "leaf"]
    assert one.union("wants") == {"logp"}
    assert one.union("reads") == {"mask"}
    assert one.union("uses") == {"reference"}
    assert one.wants == frozenset()


def test_find_and_assign_below_a_piece() -> None:
    one = outer(inside=leaf(k=3.0), needed=0.0)
    assert one.find([]) is one
    assert one.find(["inside", "k"]) == 3.0
    other = one.assign(["inside", "k"], 4.0)
    assert other.find(["inside", "k"]) == 4.0
    assert one.find(["inside", "k"]) == 3.0, "pieces are values"
    for call in (lambda: one.find(["needed", "k"]), lambda: one.assign(["needed", "k"], 1)):
        with pytest.raises(MethodError, match=r"outer\.needed is 0\.0, which has no option 'k'"):
            call()
    with pytest.raises(MethodError, match=r"leaf has no option 'j'"):
        one.assign(["inside", "j"], 1)


def test_assign_checks_again() -> None:
    with pytest.raises(MethodError, match="low=2 must be"):
        clip().assign(["low"], 2)
    with pytest.raises(MethodError, match="needs a ratio"):
        surrogate(ratio=token_ratio(), shape=pessimistic()).assign(["ratio"], None)


def wrapped(p: Piece, *wrappers: Piece) -> Piece:
    from dataclasses import replace

    for w in wrappers:
        p = replace(w, slot=p.slot, options={**w.options, "inner": p})
    return p


def test_wraps_run_from_the_outside_in_and_pass_on_what_they_do_not_own() -> None:
    core = outer(inside=leaf(k=3.0), needed=1.0)
    both = wrapped(core, plus(more=10.0), plus(more=100.0))
    assert both(kit(), 2.0) == 1.0 + 6.0 + 10.0 + 100.0
    assert both.core is core
    assert both.find(["inside", "k"]) == 3.0
    assert both.assign(["inside", "k"], 5.0)(kit(), 2.0) == 1.0 + 10.0 + 10.0 + 100.0


def test_the_same_wrap_twice_shows_both() -> None:
    """Otherwise the fingerprint would not know the inner one, and a checkpoint of another method would be accepted."""
    core = outer(needed=1.0)
    rows = wrapped(core, plus(more=10.0), plus(more=100.0)).flatten("outer")
    assert rows["plus(outer).more"] == 10.0
    assert rows["plus(plus(outer)).more"] == 100.0
    assert rows["outer.needed"] == 1.0
    assert rows["outer"] == "outer"


def test_numbers_may_be_schedules_resolved_at_each_call() -> None:
    k = kit()
    k.clock.budget = {"turns": 10}
    one = outer(inside=leaf(k=linear(0.0, 10.0)), needed=linear(1.0, 2.0))
    assert one(k, 1.0) == 1.0
    k.clock.turns = 5
    assert one(k, 1.0) == 1.5 + 5.0


def test_the_options_that_the_core_reads_do_not_reach_the_function() -> None:
    assert outer(needed=1.0, per="row_sum", unit="pair")(kit(), 0.0) == 1.0  # it takes no `per`


def test_undeclared_state_is_refused() -> None:
    @piece("update", state={"seen": lambda kit, options: 0})
    def counting(kit: Kit, closure: Any, *, key: str = "seen") -> Any:
        if key == "gone":
            del kit.state["seen"]
        kit.state[key] += 1
        return len(kit.state), list(kit.state)

    from trimtab.core.errors import PurityError

    k = kit()
    k._tree.pieces["/seen"] = 0
    assert counting()(k, None) == (1, ["seen"])
    assert k._tree.pieces["/seen"] == 1
    with pytest.raises(PurityError, match=r"counting uses state 'seeen' without declaring it\..*Did you mean 'seen'"):
        counting(key="seeen")(k, None)
    with pytest.raises(PurityError, match="not remove it"):
        counting(key="gone")(k, None)


def test_what_a_wrap_surrounds_is_not_given_by_place() -> None:
    assert scaled(0.5).options == scaled(by=0.5).options
    with pytest.raises(MethodError, match=r"scaled has no option '0\.1'"):
        scaled(0.5, 0.1)
