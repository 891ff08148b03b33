"""The order of collect wraps, the method on the left outermost: how it acts, how it is printed, what it refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trimtab.catalogue.describe import pipeline
from trimtab.cli import main
from trimtab.core.batch import Batch
from trimtab.core.check import sound
from trimtab.core.errors import MethodError
from trimtab.core.loop import run
from trimtab.core.method import Method
from trimtab.core.piece import Piece
from trimtab.core.registry import find, parse
from trimtab.core.terms import SOURCES, rows_of
from trimtab.methods.cases import case
from trimtab.stages.collect import dynamic_sampling

THREE = "chord(share=0.25)+remix(share=0.5, window=1, reincarnate=2)+aepo(samples=2, target=0.01, low=0.9)"


def spied(collect: Piece, seen: list[tuple[str, Batch]]) -> Piece:
    """The same stack; what each layer gives is noted."""

    def fn(kit: Any, **options: Any) -> Batch:
        made: Batch = collect.fn(kit, **options)
        seen.append((collect.name, made))
        return made

    options = dict(collect.options)
    if collect.inner is not None:
        options["inner"] = spied(collect.inner, seen)
    return replace(collect, fn=fn, options=options)


def sources(batch: Batch) -> dict[str, int]:
    return {name: int(rows_of(batch, name).sum()) for name in SOURCES[:3]}


def watched(method: Method, seen: list[tuple[str, Batch]]) -> Method:
    pieces = tuple(spied(p, seen) if p.stage == "collect" else p for p in method.pieces)
    return replace(method, pieces=pieces)


def test_each_wrap_sees_the_batch_of_what_it_is_around() -> None:
    made, seen = case("text", 0), list[tuple[str, Batch]]()
    method = made.shrink(parse(THREE)).each(lambda _, inside: watched(inside, seen))
    for i, step in enumerate(run(method, made.environment, made.models, until=2)):
        names = [name for name, _ in seen]
        assert names == ["rollouts", "rollouts", "rerolled", "replayed", "with_experts"], "re-rolls ask rollouts again"
        drawn, again, rerolled, replayed, whole = (batch for _, batch in seen)
        fresh = len(drawn) + len(again)
        held = fresh if i else 0  # share 0.5: as many again, once some are held
        assert sources(rerolled) == {"policy": fresh, "expert": 0, "replay": 0}
        assert sources(replayed) == {"policy": fresh, "expert": 0, "replay": held}, "re-rolls are replayed too"
        experts = round(len(replayed) * 0.25 / 0.75)
        assert sources(whole) == {**sources(replayed), "expert": experts}, "a share of all that it is around"
        assert sources(step.batch)["expert"] == experts, "re-rolls take the place of none of them"
        assert len(step.batch) == len(whole) - int(whole.tempered.sum()), "the batch keeps its size"
        seen.clear()


def test_the_other_way_round_the_replay_holds_no_demonstration_but_is_beside_them() -> None:
    """`remix+chord` is another method: the replay is around the demonstrations, whose share is of the fresh rows."""
    made, seen = case("text", 0), list[tuple[str, Batch]]()
    method = made.shrink(parse("remix(share=0.5, window=1)+chord(share=0.5)")).each(lambda _, m: watched(m, seen))
    list(run(method, made.environment, made.models, until=2))
    assert [name for name, _ in seen[3:]] == ["rollouts", "with_experts", "replayed"]
    *_, (_, shown), (_, whole) = seen
    assert sources(shown)["expert"] == sources(shown)["policy"]
    assert sources(whole) == {**sources(shown), "replay": sources(shown)["policy"]}


def test_explain_prints_the_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "chord+remix+aepo"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    first = "with_experts (chord) around replayed (remix) around rerolled (aepo) around rollouts"
    assert f"phase 'mix': collect is {first}; each sees the batch of what it is around" in out
    assert "phase 'on policy': collect is with_experts (chord) around rerolled (aepo) around rollouts" in out
    (line,) = (note for note in pipeline(parse("chord+dapo"))[2] if "collect" in note)
    assert line.startswith("collect is with_experts (chord) around dynamic_sampling (dapo) around rollouts")
    assert not [note for note in pipeline(parse("grpo"))[2] if "collect" in note]


# -- refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "match"),
    [
        ("bapo+bapo(target=0.5)", "would replace or repeat itself; write it once"),
        ("grpo+chord", "chord is made with grpo already.*The other order can be built: chord\\+grpo"),
        ("reinforce+bapo", "a method of its own and changes no base, so it can only stand last"),
        ("dapo+hapo", "hapo is made with dapo already"),
        ("rloo+bapo", "rloo and grpo both swap 'credit'"),
        ("bapo+sft", "written as a change to grpo, which sft is not made from"),
        ("aepo+chord", "chord belongs to the left of aepo. The other order can be built: chord\\+aepo"),
        ("aepo+remix", "remix belongs to the left of aepo"),
        ("dapo+chord", "chord belongs to the left of dapo"),
        ("dapo+aepo", "aepo belongs to the left of dapo"),
        ("dapo+chord+remix+aepo", "belongs to the left of dapo"),
        ("gspo+remix", "the ratio is sequence_ratio; change the ratio before.*remix\\+gspo"),
        ("bnpo+remix", "'credit.rows' was set.*The other order can be built: remix\\+bnpo"),
        ("gspo+d3s", "per='row' of the surrogate.*The other order can be built: d3s\\+gspo"),
        ("bnpo(per='row_sum')+d3s", "per='row_sum' of the surrogate"),
        ("bnpo+dapo", r"takes up to 0\.5 off them. Say so, bnpo\(lower=-0\.5\)"),
        ("dapo+bnpo", r"takes up to 0\.5 off them. Say so, bnpo\(lower=-0\.5\)"),
        ("chord+sft", "sft gives no credit"),
        ("chord+dpo(source='rollouts')", "dpo gives no credit"),
        ("chord+ppo", "prompts and responses of text.*networks made for the spaces of an environment"),
        ("aepo+ppo", "reads column 'group', which nothing before it writes"),
        ("dapo+ppo", "reads column 'group', which nothing before it writes"),
        ("capo+ppo", "hidden states and the most probable tokens"),
        ("n_sgdm+capo", r"capo models the optimisers adamw and sgd"),
        ("remix+buffered", "would then be replayed twice over"),
        ("buffered+remix+ppo", "remix belongs to the left of buffered"),
    ],
)
def test_what_cannot_be_together_is_refused_when_it_is_built(expression: str, match: str) -> None:
    with pytest.raises(MethodError, match=match):
        parse(expression)


@pytest.mark.parametrize(
    "expression",
    [
        "bnpo(lower=-0.5)+dapo", "bnpo+dapo(penalty=0.0)", "dapo(batches=0)+chord", "dapo(batches=0)+remix",
        "chord+aepo+dapo", "remix+aepo+dapo", "chord+d3s+bapo", "chord+d3s+gspo", "d3s+capo+bnpo+bapo",
        "remix+d3s+gspo", "chord+remix+aepo+dapo",
    ],
)  # fmt: skip
def test_what_looks_alike_and_makes_sense_still_builds_and_trains(expression: str) -> None:
    made = case("text", 0)
    steps = list(run(made.shrink(parse(expression)), made.environment, made.models, until=2, debug=True))
    assert len(steps) == 2


def test_the_document_says_what_is_so() -> None:
    text = (Path(__file__).parents[2] / "docs" / "composition.md").read_text()
    table = [row.strip("|").split(" | ") for row in text.splitlines() if row.startswith("| `")]
    refused, instead = (
        [e for row in table if len(row) == 3 for e in re.findall(r"`([^`]+\+[^`]+)`", row[i])] for i in (0, 2)
    )
    assert len(refused) > 20
    for expression in refused:
        with pytest.raises(MethodError, match="cannot be built"):
            parse(expression)
    for expression in [*instead, *(row[0].strip(" `") for row in table if len(row) == 4)]:
        assert parse(expression)


def test_the_command_line_refuses_before_anything_is_made(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    words = ["train", "chord+ppo", "--env", "CartPole-v1", "--steps", "1", "--out", str(tmp_path / "run")]
    assert main(words) == 1
    assert "chord+ppo cannot be built: text_experts needs prompts" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def _around(method: Method) -> Method:
    return method.wrap("collect", dynamic_sampling())


@pytest.mark.parametrize("change", [_around, lambda m: m.set("surrogate.per", "row")])
def test_what_a_user_changes_is_held_to_the_same(change: Callable[[Method], Method]) -> None:
    with pytest.raises(MethodError, match=r"to the left of|per='row'"):
        sound(change(parse("chord+d3s")))


def test_capo_judges_whoever_is_given_credit() -> None:
    for expression in ("capo+remix", "remix+capo"):
        assert parse(expression).phases[0].method.get("trust_region.rows") == ("policy", "replay")
    assert find("capo")().get("trust_region.rows") == "policy"
