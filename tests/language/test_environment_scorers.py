"""trimtab's own scorers, and what counts as a reward."""

from __future__ import annotations

import json
import math

import pytest

from trimtab.environments.problem import Failure, Problem, PromptTemplate, make_problem
from trimtab.environments.rewards import as_reward, bare_integer, exact, last_integer
from trimtab.environments.text import load_environment


def problem(answer: str | None) -> Problem:
    return make_problem("q", answer, {}, PromptTemplate("{question}"), "line 1 of f.jsonl")


@pytest.mark.parametrize(
    ("answer", "text", "reward"),
    [
        ("5", "5", 1),
        ("5", " 5\n", 1),
        ("5", "5.0", 0),
        ("a  b", "a\nb", 1),
        ("Paris", "paris", 0),
        ("5", "", 0),
        ("", " ", 1),
    ],
)
def test_exact(answer, text, reward):
    assert exact(problem(answer), text) == reward


@pytest.mark.parametrize(
    ("text", "reward"),
    [("5", 1), (" -12 ", 1), ("+3", 1), ("5.0", 0), ("5 6", 0), ("= 5", 0), ("", 0), ("-", 0), ("five", 0), ("٣", 0)],
)
def test_bare_integer_is_blind_to_the_answer(text, reward):
    assert bare_integer(problem("999"), text) == reward
    assert bare_integer(problem(None), text) == reward


@pytest.mark.parametrize(
    ("answer", "text", "reward"),
    [
        ("5", "7 - 2 = 5", 1),
        ("5", "It is 5.", 1),
        ("5", "5 or 6", 0),
        ("2", "7-2", 1),
        ("-2", "7-2", 0),
        ("-3", "so: -3", 1),
        ("-3", "so: \u22123", 1),
        ("1000", "1,000", 1),
        ("34", "3,4", 0),
        ("4", "3,4", 1),
        ("14", "3.14", 0),
        ("3", "3.14", 0),
        ("7", "007", 1),
        ("0", "-0", 1),
        ("5", "none", 0),
        ("5", "9" * 5000, 0),
    ],
)
def test_last_integer(answer, text, reward):
    assert last_integer(problem(answer), text) == reward


def test_fast_scorers_fail_without_a_usable_answer(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text("".join(json.dumps({"question": f"q{i}", "answer": "east"}) + "\n" for i in range(5)))
    environment = load_environment(str(path), reward="trimtab.environments.rewards:last_integer", holdout=0)
    (failure,) = environment.score(environment.draw(1), ["5"])
    assert failure.kind == "raised"
    assert "needs an integer" in failure.message
    (failure,) = load_environment("toy:sum").score([problem(None)], ["5"])
    assert failure == Failure("no-answer", "line 1 of f.jsonl has no reference answer")


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (math.nan, "not-finite"),
        (-math.inf, "not-finite"),
        (10**400, "not-finite"),
        ("1", "not-a-number"),
        (None, "not-a-number"),
        ((1, 2), "not-a-number"),
        ([1.0], "not-a-number"),
        (1j, "not-a-number"),
    ],
)
def test_unusable_values_are_failures(value, kind):
    assert as_reward(value).kind == kind


def test_usable_values_are_floats():
    numpy = pytest.importorskip("numpy")
    for value in (True, 1, 1.0, numpy.float32(1), numpy.int64(1), numpy.bool_(True), numpy.array(1.0)):
        assert as_reward(value) == 1.0
        assert type(as_reward(value)) is float
    assert as_reward(numpy.float32("nan")).kind == "not-finite"
    assert as_reward(numpy.array([1.0])).kind == "not-a-number"
