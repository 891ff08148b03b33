"""Rewards are finite numbers or typed failures; whatever a scorer does, training is told and never hangs."""

from __future__ import annotations

import json
import math
import re
import threading
import time

import pytest

from trimtab.core.errors import EnvironmentFailure
from trimtab.environments import wire
from trimtab.environments.problem import Failure, Problem
from trimtab.environments.process import Asked
from trimtab.environments.text import load_environment

SCORERS = '''
import os, re, sys, time
count = 0

def good(problem, text):
    print("noise on standard output")
    return 1.0 if text == problem.answer else 0.25

def moody(problem, text):
    """Does what the response says."""
    global count
    count += 1
    if text == "raise":
        raise KeyError("no such thing")
    if text == "exit":
        sys.exit(3)
    if text == "crash":
        os._exit(7)
    if text == "sleep":
        time.sleep(60)
    if text == "stuck":  # in C code, holding the interpreter's lock
        re.match(r"(a+)+$", "a" * 40 + "b")
    return {"nan": float("nan"), "inf": float("inf"), "string": "1", "none": None, "tuple": (1, 2), "true": True,
            "false": False, "int": 1, "huge": 10**400, "count": count}.get(text, 0.5)

def numpy_scalar(problem, text):
    import numpy
    return numpy.float32(0.5)

def one_argument(problem):
    return 1.0

constant = 3
class Judge:
    def __init__(self):
        self.seen = 0
    def __call__(self, problem, text):
        return 1.0
judge = Judge()
'''


@pytest.fixture(scope="module", autouse=True)
def _module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "my_scorers.py").write_text(SCORERS)
    (folder / "broken_scorers.py").write_text("import re\nvalue = 1 / 0\n")
    (folder / "needs_scorers.py").write_text("import a_package_nobody_has\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield


@pytest.fixture
def moody():
    environment = load_environment("toy:sum", reward="my_scorers:moody", timeout=0.5, max_failure_rate=1.0)
    yield environment
    environment.close()


# --- module:function


def test_function_sees_the_problem():
    environment = load_environment("toy:sum", reward="my_scorers:good")
    problems = environment.draw(3)
    assert environment.score(problems, [problems[0].answer, "x", "y"]) == [1.0, 0.25, 0.25]
    environment.close()
    assert environment.score(problems[:1], ["x"]) == [0.25]  # a closed environment starts its scorer again
    environment.close()


@pytest.mark.parametrize("name", ["numpy_scalar", "judge"])
def test_function_kinds(name):
    environment = load_environment("toy:sum", reward=f"my_scorers:{name}")
    assert environment.score(environment.draw(1), ["x"])[0] in (0.5, 1.0)
    environment.close()


@pytest.mark.parametrize(
    ("reward", "match"),
    [
        ("exakt", "Did you mean 'exact'.*module:function"),
        ("my_scorers", "is unknown"),
        ("my_scorerz:good", "cannot be found"),
        ("my_scorers.deep:good", "cannot be found|cannot be imported"),
        ("my_scorers:goood", "has no 'goood'.*Did you mean 'good'"),
        ("my_scorers:constant", "is a int, not a function"),
        ("my_scorers:one_argument", r"signature \(problem\)"),
        ("broken_scorers:score", r"cannot be imported \(ZeroDivisionError.*broken_scorers\.py:2"),
        ("needs_scorers:score", "cannot be imported .*a_package_nobody_has"),
    ],
)
def test_function_faults_at_load(reward, match):
    with pytest.raises(EnvironmentFailure, match=match):
        load_environment("toy:sum", reward=reward)


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("raise", "raised", r"KeyError: 'no such thing' at .*my_scorers\.py:14"),
        ("exit", "raised", "SystemExit"),
        ("crash", "crashed", "exit status 7"),
        ("nan", "not-finite", "nan"),
        ("inf", "not-finite", "inf"),
        ("huge", "not-finite", "inf"),
        ("string", "not-a-number", "type str"),
        ("none", "not-a-number", "NoneType"),
        ("tuple", "not-a-number", "tuple"),
    ],
)
def test_function_failures_are_typed(moody, text, kind, message):
    (failure, after) = moody.score(moody.draw(2), [text, "fine"])
    assert isinstance(failure, Failure)
    assert failure.kind == kind
    assert re.search(message, failure.message)
    assert after == 0.5
    assert moody.failures == {kind: 1}
    assert moody.describe()["failures"] == {kind: 1}


def test_function_numbers(moody):
    assert moody.score(moody.draw(3), ["true", "false", "int"]) == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("text", ["sleep", "stuck"])
@pytest.mark.parametrize("threaded", [False, True])
def test_a_hanging_function_is_stopped(moody, text, threaded):
    problems, out = moody.draw(2), []
    began = time.monotonic()

    def score():
        out.extend(moody.score(problems, [text, "fine"]))

    if threaded:
        thread = threading.Thread(target=score)
        thread.start()
        thread.join(20)
    else:
        score()
    assert out[0].kind == "timeout"
    assert out[1] == 0.5
    assert time.monotonic() - began < 15


def test_a_process_is_reused_until_it_fails(moody):
    problems = moody.draw(1)
    assert [moody.score(problems, ["count"])[0] for _ in range(3)] == [1.0, 2.0, 3.0]
    moody.score(problems, ["crash"])
    assert moody.score(problems, ["count"]) == [1.0]


def test_threads_do_not_mix_up_replies():
    environment = load_environment("toy:sum", reward="my_scorers:good")
    problems = environment.draw(20)
    wrong = []

    def work(right):
        texts = [p.answer if right else "x" for p in problems]
        wrong.extend(r for r in environment.score(problems, texts) if r != (1.0 if right else 0.25))

    threads = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong
    environment.close()


def test_entry_that_cannot_be_sent_is_refused():
    environment = load_environment("toy:sum", reward="my_scorers:good")
    odd = Problem("k", "q", "q", "1", {"x": object()})
    with pytest.raises(EnvironmentFailure, match=r"type builtins\.object cannot be sent"):
        environment.score([odd], ["1"])
    assert environment.score(environment.draw(1), ["x"]) == [0.25]
    environment.close()


def test_an_interrupted_exchange_leaves_nothing_behind(monkeypatch):
    asked = Asked(opening=["open", "my_scorers:good"])
    fields = ["k", "q", "q", "1", {}, ""]
    assert asked.ask(["score", fields, "1"], 5.0) == 1.0
    with monkeypatch.context() as patch:
        patch.setattr(Asked, "_read", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            asked.ask(["score", fields, "1"], 5.0)
    assert asked.ask(["score", fields, "2"], 5.0) == 0.25
    asked.close()


def test_wire_keeps_types():
    import datetime
    from fractions import Fraction

    value = {
        "a": (1, 2.5, None),
        3: {True, False},
        "b": [b"x", Fraction(1, 3), datetime.date(2020, 1, 2)],
        "$trimtab": "t",
    }
    assert wire.loads(wire.dumps(value)) == value
    moment = datetime.datetime(2020, 1, 2, 3, 4, 5)
    assert wire.loads(wire.dumps({"m": moment, "s": "\ud800"})) == {"m": moment, "s": "\ud800"}
    assert math.isnan(wire.loads(wire.dumps(math.nan)))


# --- too many failures


def test_too_many_failures_stop_the_run():
    environment = load_environment("toy:sum", reward="my_scorers:moody", max_failure_rate=0.1)
    one = environment.draw(1)
    environment.score(one * 17, ["fine"] * 17)
    environment.score(one * 2, ["raise", "none"])  # 2 of 19: too few scores to judge, then 2 of 20 is allowed
    environment.score(one, ["fine"])
    with pytest.raises(EnvironmentFailure) as caught:
        environment.score(one, ["nan"])
    sentence = str(caught.value)
    for part in (
        "my_scorers:moody",
        "3 of the last 21",
        "1 x raised",
        "1 x not-finite",
        "max_failure_rate=0.1",
        one[0].question,
    ):
        assert part in sentence
    environment.close()


def test_failures_leave_the_window(moody):
    environment = load_environment("toy:sum", reward="my_scorers:moody", max_failure_rate=0.05)
    one = environment.draw(1)
    for _ in range(3):
        environment.score(one * 200, ["fine"] * 200)
        environment.score(one * 10, ["none"] * 10)  # 10 of 200 is allowed, again and again
    assert environment.failures == {"not-a-number": 30}
    with pytest.raises(EnvironmentFailure, match="11 of the last 200"):
        environment.score(one, ["none"])
    environment.close()


def test_scores_and_responses_must_match():
    environment = load_environment("toy:sum")
    with pytest.raises(EnvironmentFailure, match="2 problems and 1 responses"):
        environment.score(environment.draw(2), ["1"])


# --- math-verify


def math_file(tmp_path, *answers: str) -> str:
    path = tmp_path / "f.jsonl"
    path.write_text("".join(json.dumps({"question": f"q{i}", "answer": a}) + "\n" for i, a in enumerate(answers)))
    return str(path)


def test_math_verify(tmp_path):
    pytest.importorskip("math_verify")
    answers = ["1/2", r"\frac{1}{2}", "$x^2+1$", "x^2+1", "1,000", "1e3", "-7"]
    environment = load_environment(math_file(tmp_path, *answers), reward="math-verify", holdout=0)
    problems = sorted(environment.draw(7), key=lambda p: p.question)
    right = ["0.5", r"It is $\frac12$.", "$1+x^2$", "$1+x^2$", "1000", "1000", r"\boxed{-7}"]
    assert environment.score(problems, right) == [1.0] * 7
    assert environment.score(problems, ["5"] * 7) == [0.0] * 7
    assert environment.score(problems, ["no idea"] * 7) == [0.0] * 7  # a wrong format is a wrong answer
    assert environment.failures == {}


@pytest.mark.parametrize("answer", ["Paris", "3 apples", "", r"\frac{", "sqrt(2)"])
def test_math_verify_unreadable_answer_is_an_error_at_load(tmp_path, answer):
    pytest.importorskip("math_verify")
    with pytest.raises(EnvironmentFailure, match=r"of line 2 of .* cannot be read as mathematics"):
        load_environment(math_file(tmp_path, "5", answer), reward="math-verify")


def test_math_verify_hang_is_a_timeout(tmp_path):
    pytest.importorskip("math_verify")
    environment = load_environment(math_file(tmp_path, "5"), reward="math-verify", holdout=0, timeout=1.0)
    one = environment.draw(1)
    assert [getattr(r, "kind", r) for r in environment.score(one * 2, ["10**10**10", "5"])] == ["timeout", 1.0]


# --- reasoning-gym


def test_gym_scorers():
    pytest.importorskip("reasoning_gym")
    environment = load_environment("reasoning-gym:chain_sum(size=20)", holdout=0)
    problems = environment.draw(20)
    assert environment.score(problems, [f" {p.answer}.0\n" for p in problems]) == [1.0] * 20
    strict = load_environment("reasoning-gym:chain_sum(size=20)", holdout=0, reward="exact")
    assert strict.score(problems, [f" {p.answer}.0\n" for p in problems]) == [0.0] * 20


def test_gym_scorer_that_raises_is_a_failure():
    pytest.importorskip("reasoning_gym")
    environment = load_environment("reasoning-gym:prime_factorization(size=20)", holdout=0)
    problems = environment.draw(1)
    (result,) = environment.score(problems, ["no idea"])
    assert result.kind == "raised"
    assert "ValueError" in result.message
    assert environment.score(problems, [problems[0].answer]) == [1.0]
