"""Mistakes in a command are refused before anything is loaded: what was given, what is allowed, the nearest name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.faults.common import ENV, Say, ask, refused
from trimtab.cli import main
from trimtab.core.errors import MethodError, TrimtabError
from trimtab.core.loop import run
from trimtab.core.registry import find
from trimtab.core.schedules import linear
from trimtab.environments.text import load_environment
from trimtab.policies.builtin import load_policy
from trimtab.report.folder import RunFolder
from trimtab.runs import experiment
from trimtab.runs.experiment import resume, train
from trimtab.runs.limits import LARGEST_SEED, WHOLE

NAMES: list[tuple[dict[str, str], tuple[str, ...], tuple[str, ...]]] = [
    ({"method": "grpoo"}, (), ("no method 'grpoo'", "Did you mean 'grpo'?")),
    ({"method": "grpo(kll=0.1)"}, (), ("no option 'kll'", "Did you mean 'kl'?")),
    ({"method": "grpo(preset='verll')"}, (), ("no preset 'verll'", "Did you mean 'verl'?")),
    ({"method": "grpo("}, (), ("cannot read the method expression 'grpo('", "column 5", "joined by '+'")),
    ({"method": ""}, (), ("cannot read the method expression ''",)),
    ({"method": "grpo*2"}, (), ("'grpo * 2'", "is not the name of a method")),
    ({"method": "grpo(0.1)"}, (), ("must be named", "grpo(option=value)")),
    ({"method": "grpo(kl=abc)"}, (), ("must be plain values",)),
    ({}, ("--set", "updat.lr=1"), ("no piece 'updat.lr'", "Did you mean 'update'?")),
    ({}, ("--set", "update.lrr=1"), ("no option 'lrr'", "Did you mean 'lr'?")),
    ({}, ("--set", "update.lr"), ("piece.option=value", "update.lr=1e-5")),
    ({}, ("--set", "credit=1"), ("'credit' is a whole piece", "Known: ")),
    ({"env": "reasoning-gim:chain_sum"}, (), ("unknown kind 'reasoning-gim'", "Did you mean 'reasoning-gym'?")),
    ({"env": "chain_sum"}, (), ("Did you mean 'reasoning-gym:chain_sum'?",)),
    ({"env": "toy:sum(limits=5)"}, (), ("no parameter 'limits'", "Did you mean 'limit'?")),
    ({"env": "reasoning-gym:chain_sums"}, (), ("no data set 'chain_sums'", "Did you mean 'chain_sum'?")),
    ({"env": "reasoning-gym:chain_sum(min_term=2)"}, (), ("no parameter 'min_term'", "Did you mean 'min_terms'?")),
    ({}, ("--reward", "exackt"), ("'exackt' is unknown", "Did you mean 'exact'?", "module:function")),
    ({}, ("--prompt", "{questoin}"), ("{questoin}", "Did you mean 'question'?")),
    ({"policy": "nanoo"}, (), ("'nanoo' is not a builtin policy", "Did you mean 'nano'?")),
    ({"policy": "./nowhere"}, (), ("./nowhere is not a model folder", "config.json")),
]


@pytest.mark.parametrize(("given", "words", "parts"), NAMES, ids=lambda v: "-".join(map(str, v))[:40] if v else "")
def test_an_unknown_name_is_answered_with_the_nearest(
    given: dict[str, str], words: tuple[str, ...], parts: tuple[str, ...], say: Say, tmp_path: Path
) -> None:
    if "reasoning-gym:" in given.get("env", ""):
        pytest.importorskip("reasoning_gym")
    refused(say.train("a", *words, **given), *parts)
    assert not (tmp_path / "a").exists(), "a run that was refused leaves no folder"


KINDS = [
    ("update.lr=fast", "adamw: lr='fast' must be a number or a schedule"),
    ("update.lr=nan", "lr='nan' must be a number"),
    ("update.lr=True", "lr=True must be a number"),
    ("update.lr=-1", "lr=-1 must be a number of at least 0"),
    ("update.lr=1e999", "lr=inf must be a number of at least 0, and finite"),
    ("update.lr=linear('a', 0)", "linear: start='a' must be a number"),
    ("update.lr=linear(1)", "is not a schedule that can be made"),
    ("update.clip=0", "clip=0 must be above 0"),
    ("update.betas=3", "betas=3 must be two numbers"),
    ("collect.new_tokens=0", "new_tokens=0, but a response has at least one token"),
    ("collect.new_tokens=2.5", "new_tokens=2.5 must be a whole number"),
    ("collect.new_tokens=linear(1, 2)", "must be a whole number"),
    ("collect.group=x", "group='x' must be a whole number"),
    ("collect.group=0", "group=0 must both be at least 1"),
    ("collect.temperature=-1", "temperature=-1 is not in [0, inf)"),
    ("collect.top_p=2", "top_p=2 is not in (0, 1]"),
    ("collect.revisit=0", "revisit=0 must be in (0, 1]"),
    ("credit.scale=grupe", "Did you mean 'group'?"),
    ("credit.scale=3", "scale=3 must be text"),
    ("surrogate.per=tokn", "Did you mean 'token'?"),
]


@pytest.mark.parametrize(("pair", "sentence"), KINDS)
def test_a_value_of_the_wrong_kind_is_refused(pair: str, sentence: str, say: Say, tmp_path: Path) -> None:
    refused(say.train("a", "--set", pair), sentence)
    assert not (tmp_path / "a").exists()


WRONG = [(n, v) for n, (least, _) in WHOLE.items() for v in (least - 1, -7, 2.5, "3", True)]


@pytest.mark.parametrize(("name", "value"), [*WRONG, ("seed", LARGEST_SEED + 1), ("policy", None), ("env", 3)])
def test_a_number_that_is_not_whole_or_too_small_is_refused_before_anything_is_loaded(
    name: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment, "build", lambda _: pytest.fail("something was loaded"))
    with pytest.raises(MethodError, match=rf"{name}=.* must be"):
        train(replace(ask(tmp_path / "a"), **{name: value}), mode="silent")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", [n for n in WHOLE if n not in ("lora", "decisions")])
def test_the_command_line_refuses_the_same_numbers(name: str, say: Say, tmp_path: Path) -> None:
    least = WHOLE[name][0]
    flag = "--" + name.replace("_", "-")
    refused(say.train("a", flag, str(least - 1)), f"{name}={least - 1} must be a whole number of at least {least}")
    with pytest.raises(SystemExit) as caught:  # the parser's own refusal, before trimtab is asked
        main(["train", "grpo", "--policy", "nano", "--env", ENV, flag, "1.5"])
    assert caught.value.code == 2
    assert not (tmp_path / "a").exists()


def test_resume_and_eval_refuse_a_number_that_is_none(tmp_path: Path, say: Say) -> None:
    train(ask(tmp_path / "a", steps=2), mode="silent")
    for steps in (0, -1):
        with pytest.raises(MethodError, match=f"steps={steps} must be a whole number of at least 1"):
            resume(tmp_path / "a", steps=steps, mode="silent")
    refused(say("eval", "a", "--problems", "0"), "eval_problems=0 must be a whole number of at least 1")
    assert len(RunFolder(tmp_path / "a").metrics()) == 2


@pytest.mark.parametrize("memory", [0, -1, 2.5])
def test_the_loop_refuses_memory_for_no_rows(memory: Any) -> None:
    with pytest.raises(MethodError, match=f"memory={memory} must be a whole number"):
        next(run(find("grpo")(), load_environment(ENV), load_policy("nano"), until=1, memory=memory))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: load_policy("nano", dtype="float16"), "dtype='float16'"),
        (lambda: load_policy("nano", device="gpu"), "give auto, cpu"),
        (lambda: load_environment(ENV, holdout=1.0), "holdout=1.0 must be"),
        (lambda: load_environment(ENV, timeout=0), "timeout=0 must be"),
        (lambda: load_environment(ENV, max_failure_rate=2), "max_failure_rate=2 must be"),
        (lambda: linear("a", 0), "start='a' must be a number"),  # type: ignore[arg-type]
    ],
)
def test_python_answers_with_the_same_sentences(call: Any, sentence: str) -> None:
    with pytest.raises(TrimtabError) as caught:
        call()
    assert sentence in str(caught.value)
