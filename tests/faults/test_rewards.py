"""A user's reward that misbehaves, through the command line: a failure is counted or stops the run, never a 0."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.faults.common import LETTERS, Say, refused
from trimtab.environments import process, scoring
from trimtab.environments.text import load_environment
from trimtab.report.folder import RunFolder

# `fault` happens at every 30th score; held-out problems and training alike.
RARE = """
import itertools, os, sys, time, zlib
calls = itertools.count(1)
def grade(problem, text):
    if next(calls) % 30:
        return zlib.crc32(text.encode()) % 3
    {fault}
"""
FAULTS = {
    "raised": ("raise ValueError('no grader today')", "ValueError: no grader today at"),
    "crashed": ("os._exit(7)", "exit status 7"),
    "timeout": ("time.sleep(60)", "gave no result within"),
    "not-a-number": ("return 'good'", "returned 'good' of type str"),
    "not-finite": ("return float('nan')", "returned nan"),
}
ALSO = {"kill": "os.kill(os.getpid(), 9)", "huge": "return 1e30", "none": "return None"}


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A score may take a second here, not 5, and less where it never ends."""
    name, real = request.node.name, scoring.make_scorer
    seconds = 0.3 if "always" in name else 0.5 if "timeout" in name else 1.0
    monkeypatch.setattr("trimtab.environments.text.make_scorer", lambda reward, _: real(reward, seconds))


def write(name: str, text: str) -> str:
    Path(f"{name}.py").write_text(text)
    return f"{name}:grade"


@pytest.mark.parametrize("fault", [*(f for f, _ in FAULTS.values()), *ALSO.values()], ids=[*FAULTS, *ALSO])
def test_a_rare_failure_leaves_the_batch_and_is_counted(fault: str, say: Say, request: pytest.FixtureRequest) -> None:
    name = f"rare_{request.node.callspec.id}".replace("-", "_")
    assert say.train("a", "--steps", "6", "--reward", write(name, RARE.format(fault=fault))).code == 0
    records = RunFolder("a").metrics()
    failed = sum(r["failures"] for r in records)
    assert failed >= 1
    assert records[-1]["rows"] == 6 * 12 - failed, "a failed score is no row"
    assert all(r["reward"] is not None for r in records)


@pytest.mark.parametrize("kind", ["raised", "crashed", "timeout"])
def test_a_reward_that_always_fails_stops_the_run_with_an_example(kind: str, say: Say) -> None:
    fault, message = FAULTS[kind]
    text = f"import os, time\ndef grade(problem, text):\n    {fault}\n"
    said = say.train("a", "--reward", write(f"always_{kind}".replace("-", "_"), text))
    refused(said, "failed on 20 of the last 20 responses", f"20 x {kind}", message, "max_failure_rate",
            "Correct the scorer", "trimtab resume a")  # fmt: skip
    assert RunFolder("a").report.exists()


@pytest.mark.parametrize(
    ("value", "reward"),
    [
        ("True", 1.0), ("False", 0.0), ("3", 3.0), ("numpy.float32(0.5)", 0.5), ("numpy.int64(2)", 2.0),
        ("numpy.array(0.25)", 0.25), ("torch.tensor(0.5)", 0.5),
    ],
)  # fmt: skip
def test_every_scalar_counts_as_its_number(value: str, reward: float, say: Say) -> None:
    library = value.partition(".")[0]
    name = "scalar_" + "".join(c for c in value if c.isalnum())
    head = f"import {library}\n" if "." in value and library in ("numpy", "torch") else ""
    ref = write(name, f"{head}def grade(problem, text):\n    return {value}\n")
    environment = load_environment("toy:sum", reward=ref, timeout=30)
    assert environment.score(environment.draw(2), ["1", "2"]) == [reward, reward]
    environment.close()


@pytest.mark.parametrize("value", ["numpy.zeros(2)", "numpy.float32('nan')", "numpy.array(['a'])"])
def test_an_array_or_a_nan_of_numpy_is_a_failure(value: str, say: Say) -> None:
    ref = write(
        "array_" + "".join(c for c in value if c.isalnum()), f"import numpy\ndef grade(p, t):\n    return {value}\n"
    )
    environment = load_environment("toy:sum", reward=ref)
    (failure,) = environment.score(environment.draw(1), ["1"])
    assert getattr(failure, "kind", failure) in ("not-a-number", "not-finite")
    environment.close()


def test_what_a_reward_prints_does_not_reach_the_answer(say: Say) -> None:
    noise = "def grade(problem, text):\n    print('x' * 100_000)\n    return float(len(text))\n"
    said = say.train("a", "--steps", "2", "--json", "--reward", write("noisy", noise))
    assert said.code == 0
    assert set(json.loads(said.out)) >= {"run", "seconds", "eval"}


def test_a_slow_import_is_not_held_against_the_first_score(say: Say) -> None:
    assert say.train("a", "--reward", write("slow", "import time\ntime.sleep(1.3)\n" + LETTERS)).code == 0
    assert all(r["failures"] == 0 for r in RunFolder("a").metrics())


def test_an_import_that_never_ends_is_refused(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "START_SECONDS", 0.5)
    monkeypatch.setattr(scoring, "START_SECONDS", 0.5)
    said = say.train("a", "--reward", write("endless", "import time\ntime.sleep(60)\n" + LETTERS))
    refused(said, "'endless:grade' cannot be loaded", "no result within 0.5 seconds")
    assert not Path("a").exists()


@pytest.mark.parametrize(
    ("reward", "parts"),
    [
        ("nowhere:grade", ("names module 'nowhere'", "must be installed, or lie in the working folder")),
        ("present:grad", ("'present' has no 'grad'", "Did you mean 'grade'?")),
        ("present:one", ("has the signature (problem)", "f(problem, text)")),
        ("present:number", ("is a int, not a function",)),
        ("present", ("'present' is unknown", "'module:function'")),
        ("broken:grade", ("'broken' cannot be imported", "ZeroDivisionError", "broken.py:1")),
        ("quits:grade", ("'quits' cannot be imported", "SystemExit")),
    ],
)
def test_a_function_that_cannot_be_had_is_refused(reward: str, parts: tuple[str, ...], say: Say) -> None:
    write("present", LETTERS + "number = 3\ndef one(problem):\n    return 1\n")
    write("broken", "1 / 0\n")
    write("quits", "import sys\nsys.exit(1)\n")
    refused(say.train("a", "--reward", reward), *parts)
    assert not Path("a").exists()
