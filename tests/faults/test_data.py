"""Files of problems and prompts as they come: broken, odd, or too long for the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.common import Say, refused
from trimtab.core.errors import EnvironmentFailure, TrimtabWarning
from trimtab.core.loop import begin, run
from trimtab.core.registry import find
from trimtab.core.state import load, save
from trimtab.environments.text import TextEnvironment, load_environment
from trimtab.evaluation import evaluate
from trimtab.policies.builtin import load_policy
from trimtab.policies.sampler import Sampling, SamplingError
from trimtab.report.folder import RunFolder
from trimtab.runs.experiment import resume
from trimtab.stages.collect import preferences

torch.set_num_threads(1)

FAST_WITHOUT_ANSWER = "trimtab.environments.rewards:bare_integer"
GOOD = [{"question": f"{i}+{i}=", "answer": str(2 * i)} for i in range(24)]


def lines(*more: dict[str, Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in (*GOOD, *more)).encode()


BROKEN: list[tuple[bytes, tuple[str, ...]]] = [
    (lines() + b'{"question": "a" "b"}\n', ("f.jsonl, line 25, column 18", "one complete JSON object")),
    (lines() + b'{"question": "a", "answer": "b"', ("line 25, column 32", "one complete JSON object")),
    (lines() + b"[1]\n", ("line 25, column 1", "a list, not an object")),
    (lines({"qestion": "a", "answer": "b"}), ("Line 25 of f.jsonl has neither", "Its fields: answer, qestion")),
    (lines({"question": "a"}), ("'answer' of line 25 of f.jsonl is missing", "Add it")),
    (lines({"question": "a", "answer": True}), ("'answer' of line 25", "of type bool", "text or a number")),
    (lines() + b'{"question": "a", "answer": NaN}\n', ("'answer' of line 25", "is nan")),
    (lines({"question": "", "answer": "b"}), ("'question' of line 25", "is empty")),
    (b"", ("holds no problem", "one JSON object a line")),
    (b"\xef\xbb\xbf\r\n \r\n", ("holds no problem",)),
    (lines() + b'{"question": "\xe9", "answer": "b"}\n', ("line 25, byte 15: not UTF-8", "Save the file as UTF-8")),
    (lines().decode().encode("utf-16"), ("line 1, byte 1: not UTF-8",)),
]


@pytest.mark.parametrize(("data", "parts"), BROKEN, ids=range(len(BROKEN)))
def test_a_broken_file_is_refused_with_the_place(data: bytes, parts: tuple[str, ...], say: Say, tmp_path: Path) -> None:
    Path("f.jsonl").write_bytes(data)
    refused(say.train("a", env="f.jsonl"), *parts)
    assert not (tmp_path / "a").exists()


def test_a_file_that_is_not_there_names_the_nearest(say: Say) -> None:
    Path("train.jsonl").write_bytes(lines())
    refused(say.train("a", env="trian.jsonl"), "does not exist", "Did you mean 'train.jsonl'?")


def test_bom_crlf_and_blank_lines_change_nothing(say: Say) -> None:
    Path("plain.jsonl").write_bytes(lines())
    Path("odd.jsonl").write_bytes(b"\xef\xbb\xbf" + lines().replace(b"\n", b"\r\n\r\n  \r\n"))
    asked = [[(p.question, p.answer) for p in load_environment(f).draw(24)] for f in ("plain.jsonl", "odd.jsonl")]
    assert asked[0] == asked[1]
    assert say.train("a", env="odd.jsonl").code == 0


def test_numbers_as_answers_and_duplicates_are_counted_where_the_run_is_described(say: Say) -> None:
    more = ({"question": "1+1=", "answer": 2}, {"question": " 2+2= ", "answer": "5"}, {"question": "x", "answer": 1.5})
    Path("f.jsonl").write_bytes(lines(*more))
    assert say.train("a", env="f.jsonl", method="sft").code == 0
    described = RunFolder("a").config()["environment"]
    assert (described["duplicates"], described["conflicting_answers"]) == (2, 1)
    by = {p.question: p.answer for p in load_environment("f.jsonl", holdout=0).draw(25)}
    assert by["2+2="] == "4", "the first answer counts"
    assert by["x"] == "1.5"


# -- too long for the model --------------------------------------------------------------------------------------


PADDED = ("--prompt", "{pad}{question}")  # so that the split, which follows the question, does not depend on length


def long_file(*places: int) -> str:
    rows = [{"question": f"{i}+{i}=", "answer": str(i), "pad": "9" * (600 if i in places else 1)} for i in range(24)]
    Path("long.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return "long.jsonl"


def padded(*places: int, seed: int = 0) -> TextEnvironment:
    return load_environment(long_file(*places), prompt=PADDED[1], seed=seed)


def places(held_out: bool) -> list[int]:
    """Problems of the file that are for evaluation, or for training in the order of seed 0."""
    environment = padded()
    counts = environment.describe()
    problems = environment.held_out() if held_out else environment.draw(counts["train"])
    return [int(p.question.split("+")[0]) for p in problems]


def test_a_held_out_problem_that_is_too_long_is_refused_before_anything_is_sampled(
    say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = places(True)[0]
    policy = load_policy("nano")
    monkeypatch.setattr(policy.sampler, "sample", lambda *_: pytest.fail("something was sampled"))
    with pytest.raises(EnvironmentFailure, match="a held-out problem is too long"):
        evaluate(policy, padded(place), new_tokens=3)
    said = say.train("a", *PADDED, env=long_file(place))
    refused(said, f"line {place + 1} of long.jsonl", "tokens; with 3 for the answer", "512 that nano reads",
            "lower collect.new_tokens", "Nothing was recorded yet")  # fmt: skip


@pytest.mark.parametrize("method", ["grpo", "sft"])
def test_a_training_problem_that_is_too_long_is_passed_over_counted_and_named(
    method: str, say: Say, tmp_path: Path
) -> None:
    place = places(False)[4]
    with pytest.warns(TrimtabWarning, match=f"passed over: the prompt of line {place + 1} of long.jsonl"):
        assert say.train("a", *PADDED, "--steps", "8", env=long_file(place), method=method).code == 0
    records = RunFolder("a").metrics()
    assert sum(r["too_long"] for r in records) >= 1
    assert all(r["rows"] == 3 * (4 if method == "grpo" else 1) * r["turn"] for r in records), "another took its place"


def test_a_preference_pair_that_is_too_long_is_passed_over(tmp_path: Path) -> None:
    rows = [{"question": f"{i}=", "chosen": "1" * (600 if i == 2 else 1), "rejected": "2"} for i in range(6)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    environment = load_environment(str(tmp_path / "pairs.jsonl"), holdout=0.0, reward=FAST_WITHOUT_ANSWER)
    method = find("sft")().swap("collect", preferences(pairs=5))
    with pytest.warns(TrimtabWarning, match="passed over: the prompt of line 3"):
        steps = list(run(method, environment, load_policy("nano"), until=2))
    assert [len(step.batch) for step in steps] == [10, 10]
    assert sum(step.logs["too_long"] for step in steps) >= 1


@pytest.mark.filterwarnings("ignore::trimtab.core.errors.TrimtabWarning")
def test_what_was_passed_over_is_passed_over_again_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    place = places(False)[4]  # drawn in the second turn
    method = find("grpo")().set("collect.prompts", 3).set("collect.group", 2).set("collect.new_tokens", 2)

    def go(seed: int, until: int, path: str | None) -> dict[str, Any]:
        policy, environment = load_policy("nano", seed=seed), padded(place, seed=seed)
        state = begin(method, environment, {"policy": policy}, seed=seed)
        if path:
            load(state, path)
        logs = [step.logs for step in run(method, environment, policy, until=until, state=state)]
        save(state, f"until-{until}")
        passed.append([log["too_long"] for log in logs])
        return {k: v.tolist() for k, v in policy.state_dict().items()}

    passed: list[list[float]] = []
    straight = go(0, 5, None)
    go(0, 1, None)
    assert go(7, 5, "until-1") == straight
    assert passed == [[0, 1, 0, 0, 0], [0], [1, 0, 0, 0]]


@pytest.mark.filterwarnings("ignore::trimtab.core.errors.TrimtabWarning")
def test_when_every_training_problem_is_too_long_the_run_stops_and_says_so(say: Say) -> None:
    said = say.train("a", *PADDED, env=long_file(*places(False)))
    refused(said, "problems drawn for one batch are too long", "512 that nano reads", "trimtab resume a")


@pytest.mark.parametrize(("length", "new"), [(510, 3), (513, 1)])
def test_the_sampler_itself_refuses_more_than_the_model_reads(length: int, new: int) -> None:
    policy = load_policy("nano")
    with pytest.raises(SamplingError, match=f"prompt 1 has {length} tokens, and new_tokens={new} more .* the 512"):
        policy.sampler.sample([[5], [5] * length], 1, torch.arange(2), Sampling(new_tokens=new))
    made = policy.sampler.sample([[5] * 510], 1, torch.arange(1), Sampling(new_tokens=2))
    assert made.tokens.shape[1] <= 2


def test_a_run_whose_file_changed_is_refused_on_resume(say: Say) -> None:
    Path("f.jsonl").write_bytes(lines())
    assert say.train("a", env="f.jsonl").code == 0
    Path("f.jsonl").write_bytes(lines({"question": "another", "answer": "1"}))
    refused(say("resume", "a", "--steps", "6"), "now has other problems", "Restore the data set as it was")
    Path("f.jsonl").write_bytes(lines())
    assert resume("a", steps=6, mode="silent")["finished"]
