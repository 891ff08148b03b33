"""Rewards: what a response is worth. A reward is a finite number or a typed Failure, never a silent 0.

exact: 1.0 when the response equals the answer after `normalise` (ends stripped, white space collapsed; case counts).
math-verify: 1.0 when the library math_verify finds an expression of the response equal to the answer. Without an
expression a response earns 0.0, not a failure: a wrong format is a wrong answer.
module:function: whatever finite number f(problem, text) returns.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from trimtab.core.errors import EnvironmentFailure, nearest
from trimtab.environments.problem import Failure, Problem, normalise

NAMES = ("exact", "math-verify")
# Squares of larger ones overflow float32, and then the deviation of a group is infinite and its credit a silent 0.
LARGEST = 1e15
INTEGER = re.compile(r"[+-]?[0-9]+")
# "7-2" ends in 2, not -2, and "3.14" holds no integer: a sign counts only where no number stands before it.
INTEGER_IN_TEXT = re.compile(r"(?<![0-9.])(?:(?<![0-9]\s)[+-])?[0-9]+(?!\.?[0-9])")
REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def exact(problem: Problem, text: str) -> float:
    """1.0 when the response is the reference answer, up to white space at the ends and its amount inside; else 0.0."""
    return float(normalise(text) == normalise(_answer(problem)))


def bare_integer(problem: Problem, text: str) -> float:
    """Control: 1.0 when the response is nothing but one integer, right or wrong: what a policy earns for format."""
    return float(INTEGER.fullmatch(text.strip()) is not None)


def last_integer(problem: Problem, text: str) -> float:
    """Lenient: 1.0 when the last integer in the response equals the reference answer, whatever stands around it."""
    plain = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", text.replace("\u2212", "-"))
    answer = _answer(problem).strip().replace(",", "")
    if INTEGER.fullmatch(answer) is None:
        raise ValueError(f"last_integer needs an integer as reference answer, not {answer!r}; use another reward")
    found = INTEGER_IN_TEXT.findall(plain)
    return float(bool(found) and _digits(found[-1]) == _digits(answer))


def _digits(integer: str) -> str:
    # As text: Python refuses to read integers of more than 4300 digits, and a response may hold one.
    digits = integer.lstrip("+-").lstrip("0")
    return ("-" if integer.startswith("-") and digits else "") + (digits or "0")


class NoAnswer(Exception):
    """The problem has no reference answer to compare with."""


def _answer(problem: Problem) -> str:
    if problem.answer is None:
        raise NoAnswer(f"{problem.where or 'the problem'} has no reference answer")
    return problem.answer


def as_reward(value: Any) -> float | Failure:
    """Read what a scorer returned: a finite number (True and False count as 1 and 0), else a Failure."""
    if type(value).__module__.partition(".")[0] in ("numpy", "torch") and getattr(value, "shape", None) == ():
        value = value.item()
    if not isinstance(value, (bool, int, float)):
        return Failure(
            "not-a-number",
            f"the scorer returned {repr(value)[:80]} of type {type(value).__name__}; a reward is one number",
        )
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        return Failure("not-finite", f"the scorer returned {number}; a reward is finite")
    if abs(number) > LARGEST:
        return Failure("not-finite", f"the scorer returned {number:g}; a reward lies within {LARGEST:g} of 0")
    return number


def guarded(score: Callable[[Problem, str], Any], problem: Problem, text: str) -> float | Failure:
    """One score, with whatever the scorer raises turned into a Failure that names the line it came from."""
    try:
        return as_reward(score(problem, text))
    except NoAnswer as error:
        return Failure("no-answer", str(error))
    except (Exception, SystemExit, GeneratorExit) as error:
        return Failure("raised", describe_error(error))


def describe_error(error: BaseException) -> str:
    """Type, message and innermost place of an exception, in one line."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f" at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else ""
    message = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {message}{place}" if message else f"{type(error).__name__}{place}"


def check_reward(reward: str) -> None:
    """Refuse a reward that is neither a known name nor written as module:function."""
    if reward in NAMES or REFERENCE.fullmatch(reward):
        return
    raise EnvironmentFailure(
        f"The reward {reward!r} is unknown. {nearest(reward, NAMES)} Your own is written 'module:function'."
    )


def as_latex(gold: str) -> str | None:
    """A reference answer as given to math_verify, which reads LaTeX only between delimiters; None if not mathematics.

    Delimited answers go as they are, numbers stay plain (1e3 is written out), the rest gets $...$. Without a
    backslash it must have a digit or an operator and no word: "x^2+1" is mathematics, "Paris" and "3 apples" are
    not (LaTeX would multiply letters).
    """
    text = gold.strip()
    if any(mark in text for mark in ("$", "\\boxed", "\\(", "\\[")):
        return text
    if re.fullmatch(r"[+-]?\d+(\.\d+)?[eE][+-]?\d{1,3}", text):
        return format(Decimal(text), "f")
    if re.fullmatch(r"[+-]?(\d+|\d{1,3}(,\d{3})+)?(\.\d+)?%?", text):
        return text
    if "\\" in text:
        return f"${text}$"
    return f"${text}$" if re.search(r"[\d+*/^=()\[\]{}-]", text) and not re.search(r"[^\W\d_]{3,}", text) else None


class MathVerify:
    """Equality of expressions by the library math_verify; runs in a scoring process, whose owner keeps the time."""

    def __init__(self) -> None:
        import logging

        import math_verify

        # Its own timeouts use signals, which fail outside the main thread; ours ends the process instead.
        logging.getLogger("math_verify").setLevel(logging.ERROR)
        self._lib = math_verify
        self._gold: dict[str, list[Any]] = {}

    def gold(self, answer: str) -> list[Any]:
        """Expressions of a reference answer; [] when it cannot be read as mathematics."""
        if answer not in self._gold:
            if len(self._gold) > 4096:
                self._gold.clear()
            text = as_latex(answer)
            parsed = [] if text is None else self._lib.parse(text, parsing_timeout=None)
            # A parse that fell back to raw text only would compare strings, not mathematics.
            self._gold[answer] = parsed if any(not isinstance(p, str) for p in parsed) else []
        return self._gold[answer]

    def __call__(self, problem: Problem, text: str) -> float:
        """1.0 when any expression of the answer equals any of the response; an error while comparing is raised."""
        gold = self.gold(_answer(problem))
        if not gold:
            raise ValueError(f"the reference answer {problem.answer!r} cannot be read as mathematics")
        failed: Exception | None = None
        for target in self._lib.parse(text, parsing_timeout=None):
            for expression in gold:
                try:
                    if self._lib.verify(expression, target, timeout_seconds=None, raise_on_error=True):
                        return 1.0
                except Exception as error:
                    failed = error
        if failed is not None:
            raise failed
        return 0.0
