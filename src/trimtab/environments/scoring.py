"""Who computes a reward: a function here (known to be fast), or a process that can be stopped."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from trimtab.core.errors import CheckpointError, EnvironmentFailure
from trimtab.environments import rewards
from trimtab.environments.problem import Failure, Problem
from trimtab.environments.procedural import Procedure
from trimtab.environments.process import START_SECONDS, Asked, shared

# Failures are judged over the last WINDOW scores, from FEWEST on.
WINDOW = 200
FEWEST = 20
FAST: dict[str, Callable[[Problem, str], float]] = {
    "exact": rewards.exact,
    "trimtab.environments.rewards:exact": rewards.exact,
    "trimtab.environments.rewards:bare_integer": rewards.bare_integer,
    "trimtab.environments.rewards:last_integer": rewards.last_integer,
}


class Scorer(Protocol):
    """name: as given. needs_answer: compares with the reference answer."""

    name: str
    needs_answer: bool

    def score(self, problem: Problem, text: str) -> float | Failure: ...

    def check(self, problems: Iterable[Problem]) -> None:
        """Refuse a reference answer that the scorer cannot use."""

    def close(self) -> None: ...


class FastScorer:
    """A scorer of trimtab's own that cannot hang; runs in place."""

    def __init__(self, name: str) -> None:
        self.name, self._function = name, FAST[name]
        self.needs_answer = self._function is not rewards.bare_integer

    def score(self, problem: Problem, text: str) -> float | Failure:
        return rewards.guarded(self._function, problem, text)

    def check(self, problems: Iterable[Problem]) -> None:
        """Any text will do."""

    def close(self) -> None:
        """Nothing is open."""


class FunctionScorer:
    """A user's module:function in its own process, stopped and started again after a timeout."""

    needs_answer = False

    def __init__(self, reference: str, seconds: float) -> None:
        self.name, self._seconds = reference, seconds
        self._process = Asked(opening=["open", reference])
        failed = self._process.ask(["open", reference], START_SECONDS)
        if isinstance(failed, Failure):
            raise EnvironmentFailure(f"The reward {reference!r} cannot be loaded: {failed.message}.")

    def score(self, problem: Problem, text: str) -> float | Failure:
        return self._process.ask(["score", _fields(problem), text], self._seconds)

    def check(self, problems: Iterable[Problem]) -> None:
        """Only the function knows what it needs."""

    def close(self) -> None:
        self._process.close()


class MathScorer:
    """math-verify in a process shared by all environments."""

    needs_answer = True

    def __init__(self, seconds: float) -> None:
        self.name, self._seconds = "math-verify", seconds
        self._process = shared("math")
        self._checked: set[str] = set()

    def score(self, problem: Problem, text: str) -> float | Failure:
        return self._process.ask(
            ["math-score", [problem.key, "", "", problem.answer, {}, problem.where], text], self._seconds
        )

    def check(self, problems: Iterable[Problem]) -> None:
        for problem in problems:
            if problem.answer is None or problem.answer in self._checked:
                continue
            good = self._process.ask(["math-gold", problem.answer], max(30.0, self._seconds))
            if good is not True:
                reason = f" ({good.message})" if isinstance(good, Failure) else ""
                raise EnvironmentFailure(
                    f"The reference answer {problem.answer[:80]!r} of {problem.where} cannot be read as "
                    f"mathematics{reason}. "
                    "Write LaTeX between $ signs, take the final answer with answer_after=..., or use reward 'exact'."
                )
            self._checked.add(problem.answer)

    def close(self) -> None:
        """The process is shared."""


class ProcedureScorer:
    """The scorer that a reasoning-gym data set brings along, in the process that makes its problems."""

    needs_answer = False

    def __init__(self, procedure: Procedure, seconds: float) -> None:
        self.name, self._procedure, self._seconds = f"reasoning-gym:{procedure.name}", procedure, seconds
        self._process = shared("gym")

    def score(self, problem: Problem, text: str) -> float | Failure:
        return self._process.ask(
            ["gym-score", self._procedure.name, self._procedure.params, problem.entry, text], self._seconds
        )

    def check(self, problems: Iterable[Problem]) -> None:
        """The library scores its own entries."""

    def close(self) -> None:
        """The process is shared."""


def _fields(problem: Problem) -> list[Any]:
    return [problem.key, problem.question, problem.prompt, problem.answer, problem.entry, problem.where]


def make_scorer(reward: str, seconds: float) -> Scorer:
    """The scorer of a reward name; raises EnvironmentFailure for an unknown one, or a function it cannot import."""
    rewards.check_reward(reward)
    if reward in FAST:
        return FastScorer(reward)
    return MathScorer(seconds) if reward == "math-verify" else FunctionScorer(reward, seconds)


class FailureLog:
    """Counts failed scores by kind, and stops the run when too many of the last WINDOW failed.

    most: allowed share of failures, 0..1. Raises EnvironmentFailure from FEWEST scores on, naming kinds, counts and
    an example.
    """

    def __init__(self, most: float) -> None:
        self.most = most
        self.scored = 0
        self.counts: Counter[str] = Counter()
        self._recent: deque[str] = deque(maxlen=WINDOW)

    def add(self, result: float | Failure, problem: Problem, text: str, reward: str) -> None:
        """Note one score."""
        self.scored += 1
        self._recent.append(result.kind if isinstance(result, Failure) else "")
        if not isinstance(result, Failure):
            return
        self.counts[result.kind] += 1
        recent = Counter(kind for kind in self._recent if kind)
        failed = sum(recent.values())
        if len(self._recent) >= FEWEST and failed > self.most * len(self._recent):
            kinds = ", ".join(f"{count} x {kind}" for kind, count in recent.most_common())
            raise EnvironmentFailure(
                f"The reward {reward!r} failed on {failed} of the last {len(self._recent)} responses ({kinds}), "
                f"more than max_failure_rate={self.most:g} allows. Example ({result.kind}): {result.message}; question "
                f"{problem.question[:120]!r}, response {text[:120]!r}. Correct the scorer, choose another reward, "
                "or allow more."
            )

    def state_dict(self) -> dict[str, Any]:
        """Counts and the window, JSON-able."""
        return {"scored": self.scored, "counts": dict(self.counts), "recent": list(self._recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of state_dict."""
        try:
            self.scored = int(state["scored"])
            self.counts = Counter(state["counts"])
            self._recent = deque(state["recent"], maxlen=WINDOW)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"The saved failure counts of the environment are damaged ({error!r}).") from None
