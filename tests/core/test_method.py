"""The algebra: addresses, edits, conflicts, expressions, registering, fingerprints."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.spikes.bapo import balanced, bapo, toy_grpo
from tests.spikes.chord import chord, d3s
from tests.spikes.tokens import mismatched, token_rollouts
from trimtab.core import registry
from trimtab.core.check import check
from trimtab.core.copies import frozen, polyak
from trimtab.core.errors import MethodError
from trimtab.core.kit import Kit
from trimtab.core.method import Method, Track, diff, show
from trimtab.core.piece import piece
from trimtab.core.registry import Definition, Neutral, find, method, methods, parse
from trimtab.core.schedules import linear
from trimtab.stages.annotate import logp_old
from trimtab.stages.credit import group_mean, group_normalised, leave_one_out
from trimtab.stages.downsample import entropy_old
from trimtab.stages.surrogate import clip, pessimistic, scaled, score_function, surrogate, token_ratio
from trimtab.stages.terms import kl_penalty, nll
from trimtab.stages.update import adamw, sgd

torch.set_num_threads(1)
grpo, reinforce, rloo = find("grpo"), find("reinforce"), find("rloo")


def two_tracks() -> Method:
    """Policy and critic; both have a loss `nll` and an update."""
    critic = Track("critic", trains="critic", pieces=(nll(),), update=sgd(lr=0.1))
    return toy_grpo().then(nll()).but(track=critic)


def made(name: str = "variant", base: Definition | None = grpo, **facts: Any) -> Any:
    """A decorator for unregistered methods of the tests."""
    facts = {"neutral": Neutral(), **facts} if base else facts

    def decorate(fn: Any) -> Definition:
        fn.__name__ = name
        return method(world="language", title=name, case="tokens", base=base, register=False, **facts)(fn)

    return decorate


# -- addresses ---------------------------------------------------------------------------------------------------


def test_addresses_reach_pieces_parts_and_options() -> None:
    m = toy_grpo()
    assert m.get("credit").name == "group_normalised"
    assert m.get("surrogate.bound").name == "clip"
    assert m.get("surrogate.bound.high") == 0.2
    assert m.get("update.betas") == (0.9, 0.999)
    assert m.get("policy:update.lr") == 0.05


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("credits", r"grpo has no piece 'credits'\. Known: collect, credit.*Did you mean 'credit'\?"),
        ("critic:update", r"has no piece 'critic:update'"),
        ("policy:credit", r"has no piece 'policy:credit'"),  # it is shared
        ("surrogate.bounds", r"surrogate has no option 'bounds'.*Did you mean 'bound'\?"),
        ("surrogate.bound.higher", r"clip has no option 'higher'.*Did you mean 'high'\?"),
        ("update.lr.start", r"adamw\.lr is 0\.05, which has no option 'start'"),
    ],
)
def test_a_wrong_address_says_what_there_is(path: str, words: str) -> None:
    for call in (lambda: toy_grpo().get(path), lambda: toy_grpo().swap(path, None)):
        with pytest.raises(MethodError, match=words):
            call()


def test_with_several_tracks_an_address_must_say_which() -> None:
    m = two_tracks()
    assert m.get("surrogate").name == "surrogate", "only the policy has one"
    for path in ("update.lr", "nll", "nll.per"):
        with pytest.raises(MethodError, match=rf"'{path}' could be in \['policy', 'critic'\]; write .*'track:{path}'"):
            m.get(path)
    assert m.get("critic:update.lr") == 0.1
    assert m.get("policy:update.lr") == 0.05
    m = m.on("critic").set("update.lr", 0.2).on("critic").drop("nll").on("policy").set("update.lr", 0.3)
    assert (m.get("critic:update.lr"), m.get("policy:update.lr")) == (0.2, 0.3)
    assert m.get("nll").name == "nll", "only the policy's is left"


def test_flatten_lists_every_option_once_in_running_order() -> None:
    rows = two_tracks().flatten()
    keys = list(rows)
    assert rows["critic:update.lr"] == 0.1
    assert rows["policy:surrogate.bound.high"] == 0.2
    assert rows["track critic"] == "trains critic, every 1, on update"
    assert keys.index("collect") < keys.index("credit") < keys.index("policy:surrogate") < keys.index("critic:update")
    for path, value in toy_grpo().flatten().items():
        if path not in ("rows", "passes") and not path.startswith("track "):
            found = toy_grpo().get(path)
            assert (found.name if hasattr(found, "options") else found) == value


# -- edits -------------------------------------------------------------------------------------------------------


def test_edits_make_new_methods_and_leave_the_old() -> None:
    m = toy_grpo()
    before = m.flatten()
    m.swap("credit", leave_one_out()).set("update.lr", 1.0).then(entropy_old()).drop("logp_old").but(rows=3)
    m.wrap("surrogate", scaled(by=2.0)).but(copies={"slow": polyak("policy", 0.1)})
    assert m.flatten() == before


def test_swap_of_a_piece_of_a_part_and_of_an_option() -> None:
    m = toy_grpo().swap("credit", leave_one_out()).swap("surrogate.bound", clip(0.1, 0.4)).swap("surrogate.per", "row")
    assert m.get("credit").name == "leave_one_out"
    assert m.get("surrogate.bound.high") == 0.4
    assert m.get("surrogate.per") == "row"
    assert [e.path for e in m.edits if e.by == "you"][-3:] == ["credit", "surrogate.bound", "surrogate.per"]


def test_a_swapped_piece_keeps_the_slot_it_stands_in() -> None:
    m = toy_grpo().swap("surrogate", nll())
    assert m.get("surrogate").name == "nll"
    assert m.get("surrogate").slot == "surrogate"


@pytest.mark.parametrize(
    ("path", "value"), [("credit", adamw()), ("credit", 3.0), ("update", group_mean()), ("surrogate.bound", nll()),
                        ("credit", None)]
)  # fmt: skip
def test_a_piece_stands_only_where_its_stage_is_run(path: str, value: Any) -> None:
    with pytest.raises(MethodError, match=rf"cannot stand at '{path}'"):
        toy_grpo().swap(path, value)


def test_set_changes_options_and_nothing_else() -> None:
    m = toy_grpo().set("surrogate.bound.high", 0.28)
    assert m.get("surrogate.bound.high") == 0.28
    assert m.explicit[-1] == "surrogate.bound.high"
    with pytest.raises(MethodError, match="is a whole piece"):
        m.set("surrogate", None)
    with pytest.raises(MethodError, match=r"is the part 'clip'; set one of its options: \['high', 'low'\]"):
        m.set("surrogate.bound", None)
    with pytest.raises(MethodError, match="low=3 must be"):
        m.set("surrogate.bound.low", 3)


def test_then_adds_behind_its_stage_and_refuses_doubles_and_strays() -> None:
    m = reinforce().then(logp_old())
    assert [s for _, s, _ in m.places()] == ["collect", "logp_old", "credit", "surrogate", "update"]
    with pytest.raises(MethodError, match="already has a piece 'logp_old'"):
        m.then(logp_old())
    with pytest.raises(MethodError, match=r"a method has one credit; use swap\('credit'"):
        m.then(group_mean())
    with pytest.raises(MethodError, match=r"has no track 'critc'"):
        m.then(nll(), track="critc")
    with pytest.raises(MethodError, match="cannot be added"):
        m.then(clip())  # a part
    with pytest.raises(MethodError, match="cannot be added"):
        m.then(scaled(by=2.0))  # a wrap around nothing
    with pytest.raises(MethodError, match="cannot be added"):
        Method("bare", pieces=(token_rollouts(),)).then(nll())  # a loss that no track would minimise


def test_then_is_associative() -> None:
    m, a, b, c = reinforce(), logp_old(), entropy_old(), nll()
    one, two, three = m.then(a, b, c), m.then(a).then(b, c), m.then(a, b).then(c)
    assert one.flatten() == two.flatten() == three.flatten()
    assert list(one.flatten()) == list(two.flatten()) == list(three.flatten())
    assert one.fingerprint() == two.fingerprint() == three.fingerprint()
    assert m.then().fingerprint() == m.fingerprint(), "adding nothing is neutral"


def test_drop_removes_whole_pieces_only() -> None:
    m = grpo(kl=0.1)
    assert "kl" not in reinforce().then(logp_old()).drop("logp_old").flatten()
    for path in ("credit", "update", "collect", "surrogate.bound"):
        with pytest.raises(MethodError, match="cannot be dropped"):
            m.drop(path)


def test_drop_does_not_lose_an_option_that_was_asked_for() -> None:
    with pytest.raises(MethodError, match=r"you drops 'kl'.*'kl.*' was set; it would be ignored"):
        grpo(kl=0.1).drop("kl")


def test_but_changes_fields_and_refuses_unknown_ones() -> None:
    m = reinforce().but(rows=4, passes=2, name="mine")
    assert (m.rows, m.passes, m.name) == (4, 2, "mine")
    with pytest.raises(MethodError, match="a method has no field 'row' to change"):
        m.but(row=3)
    with pytest.raises(MethodError, match="already has a track 'policy'"):
        m.but(track=m.tracks[0])
    with pytest.raises(MethodError, match=r"copy 'slow' is polyak.* already"):
        m.but(copies={"slow": polyak("policy", 0.1)}).but(copies={"slow": polyak("policy", 0.2)})
    same = m.but(copies={"slow": polyak("policy", 0.1)}).but(copies={"slow": polyak("policy", 0.1)})
    assert list(same.copies) == ["slow"]


@pytest.mark.parametrize("fields", [{"rows": 0}, {"rows": -1}, {"passes": 0}, {"rows": 2.5}, {"passes": None}])
def test_rows_and_passes_are_counts(fields: dict[str, Any]) -> None:
    """`passes=0` would make no update at all, and say nothing."""
    with pytest.raises(MethodError, match="whole number of at least 1"):
        toy_grpo().but(**fields)


def test_rows_asked_for_are_not_lost_to_a_method_put_on_top() -> None:
    with pytest.raises(MethodError, match=r"grpo sets rows=None, but 'rows' was set"):
        grpo(reinforce().but(rows=8))
    assert grpo(rows=8).but(rows=4).rows == 4, "changing one's own mind is fine"


@pytest.mark.parametrize("facts", [{"every": 0}, {"on": "batch"}])
def test_a_track_runs_every_k_or_on_the_last(facts: dict[str, Any]) -> None:
    with pytest.raises(MethodError, match="track 'critic'"):
        Track("critic", trains="critic", pieces=(), update=sgd(), **facts)


# -- wraps -------------------------------------------------------------------------------------------------------


def test_wraps_stack_outermost_last_and_addresses_stay() -> None:
    m = toy_grpo().wrap("collect", mismatched()).wrap("surrogate", scaled(by=2.0)).wrap("surrogate", scaled(by=3.0))
    assert m.get("collect.prompts") == 4
    assert m.get("surrogate.bound.high") == 0.2
    assert m.get("surrogate.by") == 3.0, "the outer one answers first"
    m = m.set("surrogate.bound.high", 0.3).set("collect.group", 2)
    assert (m.get("surrogate.bound.high"), m.get("collect.group")) == (0.3, 2)
    rows = m.flatten()
    assert rows["surrogate"] == "surrogate"
    assert rows["scaled(surrogate).by"] == 2.0
    assert rows["scaled(scaled(surrogate)).by"] == 3.0


@pytest.mark.parametrize("first", ["swap", "wrap"])
def test_a_swap_goes_inside_the_wraps(first: str) -> None:
    """A later method that swaps a piece must not silently undo the wrap of an earlier one."""
    new = surrogate(ratio=token_ratio(), bound=clip(0.3, 0.3), shape=pessimistic())
    m = toy_grpo()
    if first == "swap":
        m = m.swap("surrogate", new).wrap("surrogate", scaled(by=2.0))
    else:
        m = m.wrap("surrogate", scaled(by=2.0)).swap("surrogate", new)
    rows = m.flatten()
    assert rows["scaled(surrogate).by"] == 2.0
    assert rows["surrogate.bound.high"] == 0.3
    assert m.get("surrogate").core.slot == "surrogate"


def test_a_wrapped_part_keeps_its_wrap_too() -> None:
    @piece("part")
    def wider(batch: Any, now: Any, ratio: Any, *, inner: Any, by: float = 2.0) -> Any:
        b = inner(batch, now, ratio)
        return type(b)(b.low / by, b.high * by)

    m = toy_grpo().wrap("surrogate.bound", wider()).swap("surrogate.bound", clip(0.1, 0.1))
    assert m.flatten()["wider(surrogate.bound).by"] == 2.0
    assert m.flatten()["surrogate.bound.high"] == 0.1
    with pytest.raises(MethodError, match=r"'surrogate\.bound' is wrapped by wider, which None would lose"):
        m.swap("surrogate.bound", None)


def test_only_pieces_are_wrapped_by_wraps_of_their_stage() -> None:
    m = toy_grpo()
    with pytest.raises(MethodError, match=r"only a piece can be wrapped; 'update\.lr' is the value 0\.05"):
        m.wrap("update.lr", scaled())
    with pytest.raises(MethodError, match=r"group_mean has no 'inner' option, so it cannot wrap 'credit'"):
        m.wrap("credit", group_mean())
    with pytest.raises(MethodError, match="scaled wraps a loss piece, and 'credit' is a credit piece"):
        m.wrap("credit", scaled())


def test_a_wrap_runs_when_what_it_surrounds_runs() -> None:
    @piece("credit", at="update", writes=("advantage",))
    def late(batch: Any) -> Any: ...

    @piece("credit")
    def louder(batch: Any, *, inner: Any) -> Any: ...

    assert toy_grpo().swap("credit", late()).wrap("credit", louder()).get("credit").at == "update"
    assert toy_grpo().wrap("credit", louder()).get("credit").at == "batch"


def test_a_wrap_cannot_be_dropped_by_dropping_all_that_it_surrounds() -> None:
    with pytest.raises(MethodError, match="cannot be dropped"):
        toy_grpo().wrap("surrogate", scaled(by=2.0)).drop("scaled")


# -- conflicts ---------------------------------------------------------------------------------------------------


@made("rival")
def rival(base: Method) -> Method:
    return base.swap("surrogate.bound", clip(0.5, 0.5))


@made("deeper")
def deeper(base: Method) -> Method:
    return base.swap("surrogate.bound.high", 0.5)


@made("whole")
def whole(base: Method) -> Method:
    return base.swap("surrogate", surrogate(ratio=token_ratio(), shape=pessimistic()))


@made("other_credit", base=rloo)
def other_credit(base: Method) -> Method:
    return base.swap("credit", group_mean())


@pytest.mark.parametrize(("a", "b"), [(rival, bapo), (bapo, rival), (deeper, rival), (whole, deeper), (whole, bapo)])
def test_two_methods_that_swap_one_place_refuse_naming_both(a: Definition, b: Definition) -> None:
    with pytest.raises(MethodError, match=rf"{a.name} and {b.name} both swap 'surrogate"):
        a(b(toy_grpo()))


def test_a_conflict_is_seen_when_a_track_was_added_in_between() -> None:
    """Addresses get the prefix of their track then; the conflict must not hide behind it."""
    critic = Track("critic", trains="critic", pieces=(nll(),), update=sgd())
    with pytest.raises(MethodError, match=r"rival and bapo both swap 'surrogate\.bound'"):
        rival(bapo(toy_grpo()).but(track=critic))
    with pytest.raises(MethodError, match=r"'surrogate\.bound\.high' was set"):
        rival(toy_grpo().set("surrogate.bound.high", 0.28).but(track=critic))


def test_a_method_may_replace_what_its_own_lineage_swapped() -> None:
    @made("child", base=bapo)
    def child(base: Method) -> Method:
        return base.swap("surrogate.bound", clip(0.4, 0.4))

    assert child(bapo(toy_grpo())).get("surrogate.bound").name == "clip"


def test_you_may_replace_anything_but_not_what_you_asked_for() -> None:
    assert bapo(toy_grpo()).swap("surrogate.bound", clip()).get("surrogate.bound").name == "clip"
    asked = toy_grpo().set("surrogate.bound.high", 0.28)
    with pytest.raises(MethodError, match=r"'surrogate\.bound\.high' was set; it would be ignored"):
        asked.swap("surrogate.bound", clip())
    assert asked.swap("surrogate.bound.high", 0.3).get("surrogate.bound.high") == 0.3


def test_a_method_does_not_overwrite_an_option_that_was_asked_for() -> None:
    with pytest.raises(MethodError, match=r"deeper replaces 'surrogate.bound.high'.*was set; it would be ignored"):
        deeper(toy_grpo().set("surrogate.bound.high", 0.28))
    with pytest.raises(MethodError, match=r"'credit' was set; it would be ignored"):
        other_credit(rloo(leave_out=False))


def test_an_option_that_the_new_piece_carries_on_is_not_lost() -> None:
    @made("plain")
    def plain(base: Method) -> Method:
        return base.swap("surrogate", surrogate(shape=score_function(), per=base.get("surrogate.per")))

    made_of = plain(toy_grpo().set("surrogate.per", "row"))
    assert made_of.get("surrogate.per") == "row"
    with pytest.raises(MethodError, match=r"'surrogate.per' was set; it would be ignored"):
        grpo(reinforce(per="row"))


def test_a_method_does_not_set_again_what_you_have_set() -> None:
    @made("setter")
    def setter(base: Method) -> Method:
        return base.set("update.lr", 1e-6)

    assert setter(grpo()).get("update.lr") == 1e-6
    with pytest.raises(MethodError, match=r"setter sets 'update\.lr' to 1e-06, but 'update\.lr' was set"):
        setter(toy_grpo().set("update.lr", 0.7))
    assert setter(grpo()).set("update.lr", 0.7).get("update.lr") == 0.7


def test_an_option_whose_piece_is_swapped_out_is_an_error() -> None:
    with pytest.raises(MethodError, match=r"bapo replaces 'surrogate.bound'.*'surrogate.bound.high' was set"):
        bapo(grpo(clip_high=0.28))


def test_merging_with_neutral_changes_nothing_but_the_name() -> None:
    base = toy_grpo()
    neutral = rloo(leave_out=False)
    assert neutral.flatten() == reinforce().flatten()
    assert neutral.fingerprint() == reinforce().fingerprint()
    assert chord(base, mu=0.0, share=0.0).get("surrogate.bound") == base.get("surrogate.bound")


# -- definitions -------------------------------------------------------------------------------------------------


def test_an_option_that_changes_nothing_is_refused() -> None:
    with pytest.raises(MethodError, match=r"grpo\(kl_estimator='k2'\) changes nothing.*would be ignored"):
        grpo(kl_estimator="k2")
    assert grpo(kl=0.1, kl_estimator="k2").get("kl.estimator") == "k2"
    assert grpo(clip_low=0.2).explicit == (), "the default asks for nothing"


def test_unknown_options_and_presets_have_suggestions() -> None:
    with pytest.raises(MethodError, match=r"grpo has no option 'clip_hihg'.*Did you mean 'clip_high'"):
        grpo(clip_hihg=0.3)
    with pytest.raises(MethodError, match=r"grpo has no preset 'papr'.*Did you mean 'paper'"):
        grpo(preset="papr")


def test_presets_are_options_that_others_override() -> None:
    assert (grpo(preset="paper").get("kl.coef"), grpo(preset="paper").get("surrogate.per")) == (0.04, "row")
    assert grpo(preset="paper", kl=0.1).get("kl.coef") == 0.1
    assert grpo(preset="verl").get("credit.eps") == 1e-6
    assert grpo(preset="trl").fingerprint() == grpo().fingerprint()


def test_options_that_only_make_sense_together_are_accepted_together() -> None:
    @piece("part", validate=lambda o: None if o["a"] < o["b"] else "a must be below b")
    def window(batch: Any, now: Any, ratio: Any, *, a: float, b: float) -> Any: ...

    @made("windowed")
    def windowed(base: Method, *, a: float = 0.0, b: float = 1.0) -> Method:
        return base.swap("surrogate.bound", window(a=a, b=b))

    m = windowed(toy_grpo(), a=3.0, b=4.0)  # without b, a = 3 would be refused
    assert (m.get("surrogate.bound.a"), m.get("surrogate.bound.b")) == (3.0, 4.0)
    with pytest.raises(MethodError, match="a must be below b"):
        windowed(toy_grpo(), a=3.0)


def test_names_say_what_stands_on_what() -> None:
    assert bapo().name == "bapo"
    assert bapo(grpo()).name == "bapo"
    assert d3s(bapo(toy_grpo())).name == "d3s+bapo"
    assert (rloo + reinforce).name == "rloo"
    with pytest.raises(MethodError, match="reinforce is a method of its own"):
        reinforce(grpo())


def test_registering_refuses_a_second_name_and_leaves_no_half() -> None:
    before = dict(registry._METHODS)
    with pytest.raises(MethodError, match=r"two methods answer to 'grpo'.*Rename one"):

        @method(world="language", title="another", case="text", aliases=("grpo",))
        def brand_new() -> Method: ...

    with pytest.raises(MethodError, match=r"two methods answer to '2402\.03300'"):

        @method(world="language", title="another", case="text", arxiv="2402.03300")
        def brand_newer() -> Method: ...

    assert before == registry._METHODS
    with pytest.raises(MethodError, match="it must declare options at which it is grpo"):

        @method(world="language", title="no neutral", case="text", base=grpo)
        def brand_newest(base: Method) -> Method: ...

    assert "brand_newest" not in methods()


# -- expressions -------------------------------------------------------------------------------------------------


def test_expressions_name_methods_options_aliases_and_papers() -> None:
    assert parse("grpo").fingerprint() == grpo().fingerprint()
    assert (
        parse(" grpo( clip_high=0.28, per='row', rows=None ) ").fingerprint()
        == grpo(clip_high=0.28, per="row").fingerprint()
    )
    assert parse("2402.03300").fingerprint() == grpo().fingerprint()
    assert parse("2402.03300(kl=0.1)").fingerprint() == grpo(kl=0.1).fingerprint()
    assert parse("reinforce_baseline").name == "reinforce"
    assert parse("rloo(leave_out=False) + reinforce(lr=1e-3)").get("update.lr") == 1e-3
    assert parse("grpo(preset='paper')").get("kl.coef") == 0.04
    assert parse("grpo(clip_low=-0.0)").get("surrogate.bound.low") == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("grpo(", "cannot read the method expression"),
        ("", "cannot read the method expression"),
        ("grpo grpo", "cannot read the method expression"),
        ("grpo(kl=1, kl=2)", "must be named, each once"),
        ("grpoo", r"there is no method 'grpoo'.*Did you mean 'grpo'\?"),
        ("2402.99999", r"there is no method '2402\.99999'"),
        ("grpo(0.1)", "must be named"),
        ("grpo(**{'kl': 0.1})", "must be named"),
        ("grpo(kl=lr)", "must be plain values"),
        ("grpo(kl=open('x'))", "must be plain values"),
        ("grpo(kl={[]: 1})", "must be plain values"),
        ("grpo-rloo", "is not the name of a method"),
        ("trimtab.grpo", "is not the name of a method"),
        ("grpo(kll=0.1)", r"Did you mean 'kl'"),
        ("rloo+(reinforce+rloo)", "is not the name of a method"),
        ("reinforce+grpo", "changes no base"),
    ],
)
def test_expressions_that_cannot_be_read_say_why(text: str, words: str) -> None:
    with pytest.raises(MethodError, match=words):
        parse(text)


# -- fingerprints and differences --------------------------------------------------------------------------------


def test_the_fingerprint_changes_with_every_option_and_not_otherwise() -> None:
    base = chord(d3s(bapo(toy_grpo())))
    assert base.fingerprint() == chord(d3s(bapo(toy_grpo()))).fingerprint()
    assert base.but(name="other").fingerprint() == base.fingerprint(), "a name is not a setting"
    prints, changed = {base.fingerprint()}, 0
    for path, value in base.flatten().items():
        if path in ("rows", "passes") or path.startswith(("track ", "copy ", "scaled(", "with_experts(")):
            continue
        if hasattr(base.get(path), "options") or (value is None and path != "update.clip"):
            continue
        whole = type(value) is int
        other = value + 7 if whole else {str: "other", bool: not value, tuple: (0.1, 0.2)}.get(type(value), 0.123)
        known = {
            "surrogate.bound.metric": "ratio", "surrogate.bound.order": "low_first",
            "surrogate.bound.weighting": "none", "surrogate.bound.low": (0.5, 0.6, 0.1),
            "surrogate.bound.high": (1.5, 1.6, 0.1), "credit.scale": "batch", "imitation.weight": "none",
        }  # fmt: skip
        other = known.get(path, other)
        prints.add(base.swap(path, other).fingerprint())
        changed += 1
    assert changed > 20
    assert len(prints) == changed + 1
    others = [base.but(rows=3), base.but(passes=5), base.but(copies={"slow": polyak("policy", 0.1)}),
              base.set("scaled.by", 0.5), base.set("with_experts.share", 0.5), base.wrap("surrogate", scaled(by=1.0)),
              base.set("update.lr", linear(0.1, 0.2)), base.drop("imitation")]  # fmt: skip
    assert len({m.fingerprint() for m in others} | prints) == len(prints) + len(others)


def test_the_inner_of_two_equal_wraps_is_part_of_the_fingerprint() -> None:
    one, two = (toy_grpo().wrap("surrogate", scaled(by=by)).wrap("surrogate", scaled(by=3.0)) for by in (1.0, 2.0))
    assert one.fingerprint() != two.fingerprint()
    assert diff(one, two) == [("scaled(surrogate).by", "1.0", "2.0")]


def test_diff_is_symmetric_and_says_exactly_what_differs() -> None:
    a, b = toy_grpo(), bapo(toy_grpo().but(rows=5))
    forth, back = diff(a, b), diff(b, a)
    assert {(p, y, x) for p, x, y in forth} == set(back)
    assert ("rows", "8", "5") in forth
    assert ("surrogate.bound", "clip", "balanced") in forth
    assert ("surrogate.bound.target", "", "0.4") in forth
    assert diff(a, a) == []
    assert diff(a, toy_grpo()) == []


def test_show_writes_values_as_one_would() -> None:
    assert show(clip(0.1, 0.2)) == "clip(low=0.1, high=0.2)"
    assert show("row") == "'row'"
    assert "frozen" in show(frozen("policy"))


# -- checks before the first step --------------------------------------------------------------------------------


class Blind(torch.nn.Linear):
    provides = frozenset({"value"})


def models(**more: Any) -> dict[str, Any]:
    from tests.spikes.tokens import case

    return {**case(0)[1], **more}


@pytest.mark.parametrize(
    ("m", "given", "words"),
    [
        (toy_grpo(), {"policy": Blind(1, 1)}, r"surrogate of grpo wants 'logp'.*provides \['value'\]"),
        (two_tracks(), {}, r"trains 'critic', which is no model here"),
        (toy_grpo().then(kl_penalty()), {}, r"kl_penalty \(loss\) of grpo reads column 'logp_ref', which nothing"),
        (toy_grpo().but(copies={"old": frozen("polcy")}), {}, r"follows 'polcy'.*Did you mean 'policy'"),
        (toy_grpo().but(copies={"policy": frozen("policy")}), {}, "both a model and a copy"),
        (toy_grpo().but(copies={"a": frozen("b"), "b": frozen("a")}), {}, "follows itself"),
        (toy_grpo().but(copies={"a": frozen("policy"), "b": polyak("a", 0.1)}), {}, "follows updates of 'a', a copy"),
        (toy_grpo().drop("surrogate"), {}, "takes a gradient, and track 'policy' has no loss"),
        (Method("none"), {}, "has 0 collect pieces"),
    ],
)
def test_a_method_that_cannot_run_is_refused_with_the_reason(m: Method, given: dict[str, Any], words: str) -> None:
    with pytest.raises(MethodError, match=words):
        check(m, models(**given))


def test_a_piece_that_uses_an_unknown_model_is_refused() -> None:
    @piece("annotate", uses=("teacher",))
    def ask(kit: Kit, batch: Any) -> Any: ...

    with pytest.raises(MethodError, match=r"ask of grpo uses the model 'teacher'"):
        check(toy_grpo().then(ask()), models())
    check(toy_grpo().then(ask()).but(copies={"teacher": frozen("policy")}), models())


def test_group_normalised_and_balanced_are_values() -> None:
    assert group_normalised(ddof=0) == group_normalised("group", 0)
    assert balanced() == balanced()


def test_adding_definitions_is_applying_them() -> None:
    assert (d3s + (bapo + grpo)).name == "d3s+bapo"
    assert (d3s + bapo).flatten() == d3s(bapo()).flatten()


def test_a_track_more_does_not_rename_what_the_others_hold() -> None:
    from trimtab.core.registry import find

    paths = {path for path, _, _ in diff(find("props")(), find("ppo")())}
    assert "collect.policy" in paths
    assert "policy:update.lr" not in paths
    assert not any(path.startswith(("policy:surrogate", "surrogate")) for path in paths), "nothing there was changed"
