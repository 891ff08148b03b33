"""Text environments: verifiable questions, a fixed held-out set, and rewards that are a number or a typed failure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from trimtab.core.errors import CheckpointError, EnvironmentFailure
from trimtab.environments.pools import ListedPool, Pool
from trimtab.environments.problem import Failure, Problem, PromptTemplate, normalise, response_of, sentence_start
from trimtab.environments.procedural import Procedure, toy_pool
from trimtab.environments.scoring import FailureLog, ProcedureScorer, Scorer, make_scorer
from trimtab.environments.sources import datasets_pool, jsonl_pool
from trimtab.environments.spec import parse_spec

__all__ = ["Failure", "Problem", "TextEnvironment", "load_environment", "normalise"]

STATE = ("name", "fingerprint", "seed", "epoch", "cursor", "failures")


class TextEnvironment:
    """Questions to draw, held-out questions, a scorer; its state is a seed, an epoch, a cursor and failure counts."""

    def __init__(
        self, name: str, pool: Pool, scorer: Scorer, *, seed: int, template: PromptTemplate, holdout: float, most: float
    ) -> None:
        self.name = name
        self._pool, self._scorer, self._template, self._holdout = pool, scorer, template, holdout
        self._seed, self._epoch, self._cursor = seed, 0, 0
        self._log = FailureLog(most)
        if isinstance(pool, ListedPool) and scorer.name == "math-verify":
            self._scorer.check(pool.all())

    def draw(self, n: int) -> list[Problem]:
        """The next n training problems (n >= 0): seeded epochs over a listed pool, or a stream from a seeded start."""
        if n < 0:
            raise EnvironmentFailure(f"draw({n}): the number of problems must be 0 or more.")
        problems, epoch, cursor = self._pool.draw(self._seed, self._epoch, self._cursor, n)
        self._admit(problems)
        self._epoch, self._cursor = epoch, cursor
        return problems

    def held_out(self, n: int | None = None) -> list[Problem]:
        """The first n evaluation problems, the same whatever the seed; never trained on.

        A listed pool gives them in the order of their keys, fewer than n if it has fewer; a stream in its own order
        from index 0 (n=None: those among its first 256 problems). Raises EnvironmentFailure when there are none.
        """
        if n is not None and n < 1:
            raise EnvironmentFailure(f"held_out({n}): the number of problems must be at least 1.")
        problems = self._pool.held_out(n)
        self._admit(problems)
        return problems

    def _admit(self, problems: Sequence[Problem]) -> None:
        for problem in problems:
            if self._scorer.needs_answer and problem.answer is None:
                raise EnvironmentFailure(
                    f"{sentence_start(problem.where)} has no reference answer, which the reward {self._scorer.name!r} "
                    "compares with. "
                    "Use the data set's own scorer (leave reward out) or a reward 'module:function'."
                )
        self._scorer.check(problems)

    def score(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[float | Failure]:
        """One reward a response, finite; a Failure where the scorer raised, hung, crashed or returned no number.

        Raises EnvironmentFailure when more than max_failure_rate of the last 200 scores (from 20 on) are failures.
        """
        if len(problems) != len(texts):
            raise EnvironmentFailure(
                f"score() was given {len(problems)} problems and {len(texts)} responses; give one response a problem."
            )
        out: list[float | Failure] = []
        for problem, text in zip(problems, texts):
            result = self._scorer.score(problem, text)
            self._log.add(result, problem, text, self._scorer.name)
            out.append(result)
        return out

    def demonstrations(self, n: int) -> list[tuple[Problem, str]]:
        """The next n training problems with their reference answers, for supervised training; moves draw's cursor."""
        out: list[tuple[Problem, str]] = []
        for problem in self.draw(n):
            if problem.answer is None:
                raise EnvironmentFailure(
                    f"{sentence_start(problem.where)} has no reference answer, so it cannot be demonstrated. "
                    "Supervised training needs a data set with answers."
                )
            out.append((problem, problem.answer))
        return out

    def preferences(self, n: int) -> list[tuple[Problem, str, str]]:
        """The next n training problems with their chosen and rejected responses; moves draw's cursor.

        A response is text, or one message of the assistant. Raises EnvironmentFailure when a problem lacks either.
        """
        return [(p, response_of(p, "chosen"), response_of(p, "rejected")) for p in self.draw(n)]

    def peek(self) -> Problem:
        """A training problem, without drawing it."""
        problems, _, _ = self._pool.draw(self._seed, self._epoch, self._cursor, 1)
        return problems[0]

    def asks_any_of(self, keys: Iterable[str]) -> bool | None:
        """Whether a question with one of these keys is among its problems; None where they are made on demand.

        Keys are compared by their first 16 digits.
        """
        if not isinstance(self._pool, ListedPool):
            return None
        mine = {key[:16] for key in self._pool.keys}
        return any(key[:16] in mine for key in keys)

    @property
    def failures(self) -> dict[str, int]:
        """Failed scores so far, by kind."""
        return dict(self._log.counts)

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes while drawing and scoring, JSON-able."""
        return {
            "name": self.name,
            "fingerprint": self._pool.fingerprint,
            "seed": self._seed,
            "epoch": self._epoch,
            "cursor": self._cursor,
            "failures": self._log.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where a state was saved. Raises CheckpointError for a damaged state or one of other problems."""
        if set(state) != set(STATE):
            raise CheckpointError(
                f"The environment's state has the fields {', '.join(sorted(state))}; expected "
                f"{', '.join(sorted(STATE))}."
            )
        if state["fingerprint"] != self._pool.fingerprint:
            raise CheckpointError(
                f"The state was saved with {state['name']!r}; {self.name!r} now has other problems or another "
                "holdout share. "
                "Restore the data set as it was, or start a new run."
            )
        places = [state["seed"], state["epoch"], state["cursor"]]
        if not all(isinstance(v, int) for v in places) or min(state["epoch"], state["cursor"]) < 0:
            raise CheckpointError(f"The environment's state is damaged: seed, epoch and cursor are {places}.")
        self._log.load_state_dict(state["failures"])
        self._seed, self._epoch, self._cursor = places

    def describe(self) -> dict[str, Any]:
        """What it is and what happened, JSON-able: spec, reward, prompt, holdout, problem counts, failures by kind."""
        return {
            "spec": self.name,
            "reward": self._scorer.name,
            "prompt": self._template.text,
            "holdout": self._holdout,
            "seed": self._seed,
            **self._pool.describe(),
            "scored": self._log.scored,
            "failures": self.failures,
            "max_failure_rate": self._log.most,
        }

    def close(self) -> None:
        """End the scoring process, if this environment has one of its own; scoring again starts a new one."""
        self._scorer.close()


def load_environment(
    spec: str,
    *,
    seed: int = 0,
    reward: str | None = None,
    prompt: str | None = None,
    holdout: float = 0.25,
    timeout: float = 5.0,
    max_failure_rate: float = 0.1,
) -> TextEnvironment:
    """Build a text environment from one line of text.

    spec: 'reasoning-gym:NAME(key=value, ...)' | 'FILE.jsonl' | 'datasets:NAME(split=train, ...)' | 'toy:sum(limit=5)'
    (also first, larger).
    seed: order of training problems; the held-out set does not depend on it.
    reward: 'exact' | 'math-verify' | 'module:function' with f(problem, text) -> float, in its own process; None is the
    data set's own scorer (reasoning-gym) or 'exact'. prompt: template such as "{question}" (default).
    holdout: share kept for evaluation, 0 <= h < 1. timeout: seconds a score may take, > 0 (trimtab's own scorers and
    the start of a process are not timed). max_failure_rate: share of failed scores that stops the run, 0..1.
    Raises EnvironmentFailure, always a sentence: what was given, what is allowed, what to do.
    """
    if not 0.0 <= holdout < 1.0:
        raise EnvironmentFailure(
            f"holdout={holdout} must be at least 0 and less than 1: the share of problems kept for evaluation."
        )
    if not 0.0 <= max_failure_rate <= 1.0:
        raise EnvironmentFailure(f"max_failure_rate={max_failure_rate} must be between 0 and 1.")
    if not 0.0 < timeout <= 86400.0:
        raise EnvironmentFailure(f"timeout={timeout} must be a number of seconds above 0 (a day at most).")
    parsed = parse_spec(spec)
    template = PromptTemplate("{question}" if prompt is None else prompt)
    procedure = Procedure(parsed, template) if parsed.kind == "reasoning-gym" else None
    scorer: Scorer
    if procedure is not None and reward is None:
        scorer = ProcedureScorer(procedure, timeout)
    else:
        scorer = make_scorer("exact" if reward is None else reward, timeout)
    pool: Pool
    if procedure is not None:
        pool = procedure.pool(holdout)
    elif parsed.kind == "toy":
        pool = toy_pool(parsed, template, holdout)
    else:
        make = jsonl_pool if parsed.kind == "jsonl" else datasets_pool
        pool = make(parsed, template, holdout, scorer.needs_answer)
    return TextEnvironment(
        parsed.text, pool, scorer, seed=seed, template=template, holdout=holdout, most=max_failure_rate
    )
