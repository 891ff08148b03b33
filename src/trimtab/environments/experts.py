"""Demonstrations from a file: prompts with an expert's responses, drawn in seeded epochs beside an environment."""

from __future__ import annotations

import warnings
from typing import Any

from trimtab.core.errors import CheckpointError, EnvironmentFailure, TrimtabWarning
from trimtab.environments.problem import Problem, PromptTemplate
from trimtab.environments.sources import datasets_pool, jsonl_pool
from trimtab.environments.spec import parse_spec
from trimtab.environments.text import TextEnvironment

FILES = {"jsonl": jsonl_pool, "datasets": datasets_pool}


class Experts:
    """The demonstrations of a file; its state is a place in them.

    spec: 'FILE.jsonl' or 'datasets:NAME(split=train, ...)' with the fields prompt (or question) and response (or
    answer, chosen; or question=FIELD, answer=FIELD). One question may have several responses; equal ones count once.
    environment: whose prompt template, seed and held-out share are used, so that no question that it holds out is ever
    demonstrated.

    Raises EnvironmentFailure for a file that cannot be read (see `jsonl_pool`), prompts of another form than the
    environment's (chat messages or text), a template field that the file lacks, or nothing left to demonstrate. Warns
    where the environment knows all its questions and none of them is in the file.
    """

    def __init__(self, spec: str, environment: TextEnvironment) -> None:
        parsed = parse_spec(spec)
        if parsed.kind not in FILES:
            raise EnvironmentFailure(
                f"Experts cannot come from {spec!r}: demonstrations are prompts with responses in a file, "
                f"'FILE.jsonl' or 'datasets:NAME(split=train, ...)'. Leave experts out to take the environment's own "
                f"reference answers."
            )
        described = environment.describe()
        self._source = parsed.text
        self._pool = FILES[parsed.kind](
            parsed, PromptTemplate(described["prompt"]), described["holdout"], need_answer=True, shown=True
        )
        self._seed, self._epoch, self._cursor = described["seed"], 0, 0
        self._match(environment)

    def _match(self, environment: TextEnvironment) -> None:
        problems, _, _ = self._pool.draw(self._seed, 0, 0, 1)
        forms = ["text" if isinstance(p.prompt, str) else "chat messages" for p in (problems[0], environment.peek())]
        if forms[0] != forms[1]:
            raise EnvironmentFailure(
                f"The experts of {self._source!r} answer {forms[0]} and the environment {environment.name!r} asks with "
                f"{forms[1]}, so the policy would learn to answer prompts that it never meets. Write both in one form."
            )
        if environment.asks_any_of(self._pool.keys) is False:
            warnings.warn(
                f"none of the prompts of {self._source!r} is a question of {environment.name!r}; that is as it should "
                "be where experts show other problems of the same kind, and a mistake where they show these",
                TrimtabWarning,
                stacklevel=2,
            )

    def draw(self, n: int) -> list[tuple[Problem, str]]:
        """The next n demonstrations as (problem, response)."""
        problems, self._epoch, self._cursor = self._pool.draw(self._seed, self._epoch, self._cursor, n)
        return [(p, p.answer or "") for p in problems]

    def state_dict(self) -> dict[str, Any]:
        return {
            "source": self._source,
            "fingerprint": self._pool.fingerprint,
            "seed": self._seed,
            "epoch": self._epoch,
            "cursor": self._cursor,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where a state was saved. Raises CheckpointError for one of other demonstrations."""
        if state["fingerprint"] != self._pool.fingerprint:
            raise CheckpointError(
                f"The state was saved with the experts {state['source']!r}; {self._source!r} now holds other "
                "demonstrations, or the held-out share is another. Restore the file as it was, or start a new run."
            )
        self._seed, self._epoch, self._cursor = state["seed"], state["epoch"], state["cursor"]
