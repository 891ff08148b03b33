"""Expert files that do not fit, experts that cannot be shown, replay that is too small, thresholds out of range."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.common import Say, refused
from trimtab.core.errors import CheckpointError, EnvironmentFailure, MethodError, TrimtabWarning
from trimtab.core.loop import begin, run
from trimtab.core.registry import find
from trimtab.core.state import load, save
from trimtab.environments.problem import is_held_out, key_of
from trimtab.environments.text import TextEnvironment, load_environment
from trimtab.policies.builtin import load_policy
from trimtab.report.folder import RunFolder

torch.set_num_threads(1)

ASKED = [f"{i}+{i}=" for i in range(24)]


def problems(prompt: Any = None) -> str:
    """24 problems in a file."""
    rows = [{"prompt": prompt(q) if prompt else q, "answer": str(i)} for i, q in enumerate(ASKED)]
    Path("problems.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return "problems.jsonl"


def experts(*rows: dict[str, Any], name: str = "experts.jsonl") -> str:
    Path(name).write_text("".join(json.dumps(r) + "\n" for r in rows))
    return name


def shown(*questions: str, response: str = "7") -> list[dict[str, Any]]:
    return [{"prompt": q, "response": response} for q in questions or ASKED]


def chord(file: str, **options: Any) -> Any:
    made = find("chord")(experts=file, share=0.5, **options)
    for path, value in (("collect.prompts", 2), ("collect.group", 2), ("collect.new_tokens", 2)):
        made = made.set(path, value)
    return made


def go(file: str, environment: TextEnvironment | None = None, turns: int = 3, seed: int = 0) -> list[Any]:
    environment = environment or load_environment(problems(), seed=seed)
    return list(run(chord(file), environment, load_policy("nano", seed=seed), until=turns, seed=seed))


def test_demonstrations_come_from_the_file_and_never_from_what_is_held_out(say: Say) -> None:
    steps = go(experts(*shown(response=" two words ")), turns=8)
    asked = {q for s in steps for q, source in zip(s.batch.question, s.batch.source.tolist()) if source == 1}
    assert asked == {q for q in ASKED if not is_held_out(key_of(q), 0.25)}
    first = steps[0].batch
    row = first.take(first.source == 1).take(torch.arange(1))
    assert row.response == [" two words "]
    assert load_policy("nano").decode(row.action[0][row.mask[0]].tolist()).strip() == "two words"


def test_one_question_may_have_several_experts_and_equal_ones_count_once(say: Say) -> None:
    place = next(q for q in ASKED if not is_held_out(key_of(q), 0.25))
    twice = shown(place, response="1") + shown(place, response="2") + shown(place, response="2")
    steps = go(experts(*twice), turns=2)
    given = [r for s in steps for r, source in zip(s.batch.response, s.batch.source.tolist()) if source == 1]
    assert given.count("1") == given.count("2") == 4


def test_a_data_set_of_hugging_face_will_do(say: Say) -> None:
    import datasets

    datasets.Dataset.from_list(shown(response="from a folder")).save_to_disk("saved")
    steps = go("datasets:saved", turns=1)
    assert "from a folder" in steps[0].batch.response


def test_prompts_of_another_form_are_refused(say: Say) -> None:
    file = experts(*[{"prompt": [{"role": "user", "content": q}], "response": "1"} for q in ASKED])
    with pytest.raises(EnvironmentFailure, match=r"answer chat messages and .* asks with text.*Write both in one form"):
        go(file)
    said = say.train("a", env=problems(), method=f"chord(experts='{file}')")
    refused(said, "answer chat messages", "Write both in one form")


def test_a_field_of_the_prompt_template_that_the_file_lacks_is_named(say: Say) -> None:
    rows = [{"prompt": q, "answer": "1", "a": i} for i, q in enumerate(ASKED)]
    Path("problems.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    environment = load_environment("problems.jsonl", prompt="add {a} {question}")
    with pytest.raises(EnvironmentFailure, match=r"template uses \{a\}, which line 1 of experts.jsonl does not have"):
        go(experts(*shown()), environment)


def test_prompts_that_the_environment_does_not_know_are_named_once(say: Say) -> None:
    with pytest.warns(
        TrimtabWarning, match=r"none of the prompts of 'experts.jsonl' is a question of 'problems.jsonl'"
    ):
        go(experts(*shown("what?", "who?", "where?", "why?")), turns=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        go(experts(*shown(ASKED[0], *ASKED[3:9])), turns=1)


def test_an_expert_file_without_responses_or_of_another_kind_is_refused(say: Say) -> None:
    with pytest.raises(EnvironmentFailure, match=r"line 1 of experts.jsonl"):
        go(experts({"prompt": "1+1="}))
    with pytest.raises(EnvironmentFailure, match="demonstrations are prompts with responses in a file"):
        go("toy:sum(limit=5)")
    with pytest.raises(EnvironmentFailure, match=r"Did you mean 'experts.jsonl'"):
        go("exprts.jsonl")


@pytest.mark.parametrize(
    ("bad", "why"), [("☃", "reproduce the .*{}"), ("", "{}.* is empty"), ("9" * 600, "{}.* 512 that nano")]
)
def test_a_response_that_cannot_be_shown_is_passed_over_counted_and_named(bad: str, why: str, say: Say) -> None:
    place = next(i for i, q in enumerate(ASKED) if not is_held_out(key_of(q), 0.25))
    rows = shown()
    rows[place]["response"] = bad
    file = experts(*rows)
    with pytest.warns(TrimtabWarning, match="passed over: .*" + why.format(f"line {place + 1} of experts.jsonl")):
        steps = go(file, turns=6)
    assert sum(s.logs["unusable_experts"] for s in steps) >= 1
    assert all(int((s.batch.source == 1).sum()) == 4 for s in steps), "another took its place"
    assert all(bad not in s.batch.response or bad == "" for s in steps)


@pytest.mark.filterwarnings("ignore::trimtab.core.errors.TrimtabWarning")
def test_when_no_response_can_be_shown_the_run_stops_and_says_so(say: Say) -> None:
    with pytest.raises(EnvironmentFailure, match=r"unusable experts; the last one: the tokenizer cannot reproduce"):
        go(experts(*shown(response="☃")))


def test_the_stream_goes_on_where_it_stopped_and_a_changed_file_is_refused(say: Say, tmp_path: Path) -> None:
    rows = [{"prompt": q, "response": f"{i}"} for i, q in enumerate(ASKED)]
    file = experts(*rows)

    def upto(turns: int, path: Path | None = None, seed: int = 0) -> list[list[str]]:
        environment, policy = load_environment(problems(), seed=seed), load_policy("nano", seed=seed)
        method = chord(file)
        state = begin(method, environment, {"policy": policy}, seed=seed)
        if path:
            load(state, path)
        steps = list(run(method, environment, policy, until=turns, state=state))
        save(state, tmp_path / f"{turns}-{seed}")
        return [[r for r, s in zip(x.batch.response, x.batch.source.tolist()) if s == 1] for x in steps]

    straight = upto(4)
    assert upto(2) == straight[:2]
    assert upto(4, tmp_path / "2-0", seed=5) == straight[2:]
    assert len({r for turn in straight for r in turn}) > 8, "an epoch has no repetition"
    rows[3]["response"] = "changed"
    experts(*rows)
    with pytest.raises(CheckpointError, match="now holds other demonstrations"):
        upto(4, tmp_path / "2-0")


def test_a_run_with_experts_records_the_reward_of_its_own_rows_and_resumes(say: Say) -> None:
    file = experts(*shown(response="3"))
    method = f"chord(experts='{file}')+d3s+bapo"
    assert say.train("a", "--steps", "3", env=problems(), method=method).code == 0
    records = RunFolder("a").metrics()
    assert all(r["reward"] == r["reward"] and "imitation" in r for r in records)
    assert say("resume", "a", "--steps", "5").code == 0
    assert len(RunFolder("a").metrics()) == 5


# -- replay, and thresholds --------------------------------------------------------------------------------------


def test_a_replay_smaller_than_one_update_is_refused(say: Say) -> None:
    said = say.train("a", env=problems(), method="remix(share=0.8)")
    refused(said, "share=0.8 asks for 4 replayed rows to each fresh one", "window=2 holds 2", "Raise window or lower")
    assert not Path("a").exists()


def test_while_the_replay_is_short_all_of_it_is_used() -> None:
    from tests.golden.test_golden import toy
    from tests.spikes.tokens import case

    environment, models = case(0)
    method = find("remix")(toy(find("grpo")()), share=0.75, window=3)
    shares = [s.logs["replayed"] for s in run(method, environment, models, until=5)]
    assert shares == pytest.approx([0.0, 0.5, 2 / 3, 0.75, 0.75])


@pytest.mark.parametrize(
    ("method", "part"),
    [
        ("chord(mu=2)", "mu=2 must be in [0, 1]"),
        ("chord(share=1)", "share=1 must be in [0, 1)"),
        ("chord(cutoff=0)", "cutoff=0 must be in (0, 1]"),
        ("d3s(share=0)", "share=0 must be in (0, 1]"),
        ("d3s(tokens=3)", "tokens=3 must be in (0, 1]"),
        ("remix(share=-0.5)", "share=-0.5 must be in [0, 1)"),
        ("remix(kl_floor=2)", "kl_floor=2 must be in [0, 1]"),
    ],
)
def test_a_threshold_out_of_range_is_refused_before_a_folder_is_made(method: str, part: str, say: Say) -> None:
    refused(say.train("a", env=problems(), method=method), part)
    assert not Path("a").exists()


def test_a_schedule_out_of_range_is_refused_when_it_gets_there() -> None:
    from tests.spikes.bapo import toy_grpo
    from tests.spikes.chord import chord as toy_chord
    from tests.spikes.tokens import case
    from trimtab.core.schedules import linear

    environment, models = case(0)
    with pytest.raises(MethodError, match=r"must be in \[0, 1\]"):
        list(run(toy_chord(toy_grpo(), mu=linear(0.5, 2.0)), environment, models, until=4))
