"""The smallest case of each world: where the laws are checked for every registered method.

A case is a fresh environment, fresh models and settings that make two steps take well under a second.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from trimtab.core.errors import MethodError, nearest
from trimtab.core.method import Method


@dataclass(frozen=True)
class Case:
    """environment, models: freshly made. small: `address -> value`, applied where the method has a value there.

    hidden: the layers of every network that the method itself names, where the case has no models. seed: of those.
    """

    environment: Any
    models: dict[str, nn.Module]
    small: dict[str, Any] = field(default_factory=dict)
    hidden: tuple[int, ...] = ()
    seed: int = 0

    def shrink(self, method: Method) -> Method:
        """The method with this case's settings."""
        if method.phases:
            return method.each(lambda _, inside: self.shrink(inside))
        known = method.flatten()
        for path, value in self.small.items():
            if path in ("rows", "passes") and getattr(method, path) not in (None, 1):
                method = method.but(**{path: value})
            elif "." in path and known.get(path) is not None:
                method = method.set(path, value)
        smaller = {name: replace(n, hidden=self.hidden) for name, n in method.networks.items() if n.hidden}
        return method.but(networks=smaller) if smaller else method

    def models_of(self, method: Method) -> dict[str, nn.Module]:
        """The case's models, or the networks that the method names, built small in float64."""
        if self.models:
            return self.models
        from trimtab.policies.networks import build_networks

        return build_networks(self.shrink(method), self.environment, self.seed, dtype=torch.float64)


class Coin:
    """A scorer that a random policy satisfies half of the time: no law would be tested on rewards that are all 0."""

    name = "coin"
    needs_answer = False

    def score(self, problem: Any, text: str) -> float:
        """1.0 when the characters' codes add up to an even number."""
        return float(sum(map(ord, text)) % 2 == 0)

    def check(self, problems: Any) -> None:
        """Every problem will do."""

    def close(self) -> None:
        """Nothing is open."""


def text(seed: int) -> Case:
    """Sums of two small numbers, answered by a random character-level language model in float64."""
    from trimtab.environments.problem import PromptTemplate
    from trimtab.environments.procedural import toy_pool
    from trimtab.environments.spec import parse_spec
    from trimtab.environments.text import TextEnvironment
    from trimtab.policies.builtin import load_policy

    template = PromptTemplate("{question}")
    pool = toy_pool(parse_spec("toy:sum(limit=5)"), template, 0.25)
    return Case(
        TextEnvironment("toy:coin", pool, Coin(), seed=seed, template=template, holdout=0.25, most=0.1),
        {"policy": load_policy("nano", seed=seed, dtype="float64")},
        {"collect.prompts": 3, "collect.group": 4, "collect.new_tokens": 4, "update.lr": 3e-3},
    )


def pairs(seed: int) -> Case:
    """The sums of `text`, each with its right answer as the chosen response and another number as the rejected one."""
    from trimtab.environments.pools import ListedPool
    from trimtab.environments.problem import PromptTemplate
    from trimtab.environments.procedural import toy_pool
    from trimtab.environments.spec import parse_spec
    from trimtab.environments.text import TextEnvironment
    from trimtab.policies.builtin import load_policy

    template = PromptTemplate("{question}")
    asked = toy_pool(parse_spec("toy:sum(limit=5)"), template, 0.25).all()
    problems = [
        replace(p, entry={**p.entry, "chosen": p.answer, "rejected": f"{int(p.answer or 0) + 7}!"}) for p in asked
    ]
    pool = ListedPool([p.key for p in problems], problems.__getitem__, 0.25, "toy:pairs")
    return Case(
        TextEnvironment("toy:pairs", pool, Coin(), seed=seed, template=template, holdout=0.25, most=0.1),
        {"policy": load_policy("nano", seed=seed, dtype="float64")},
        {"collect.pairs": 4, "update.lr": 3e-3},
    )


SMALL = {
    "collect.horizon": 6, "collect.count": 4, "rows": 7, "passes": 2, "update.lr": 1e-2, "policy:update.lr": 1e-2,
    "critic:update.lr": 1e-2, "temperature:update.lr": 1e-2, "collect.batch": 9, "collect.warmup": 6,
    "collect.capacity": 40, "uniform_first.decisions": 4,
}  # fmt: skip


def steps(seed: int) -> Case:
    """A point pushed along a line, three of them at once; episodes of about five steps, some ended by the clock."""
    from trimtab.environments.toy import PointEnvironment

    return Case(PointEnvironment(seed=seed), {}, SMALL, hidden=(5, 4), seed=seed)


def choices(seed: int) -> Case:
    """`steps` with three numbered actions instead of a push."""
    from trimtab.environments.toy import PointEnvironment

    return Case(PointEnvironment(discrete=True, seed=seed), {}, SMALL, hidden=(5, 4), seed=seed)


def table(seed: int) -> Case:
    """A random process of four states, one of which ends an episode; at most five steps, a table of logits."""
    from trimtab.environments.tabular import random_mdp
    from trimtab.policies.tabular import TableSoftmax

    environment = random_mdp(states=4, horizon=5, final=True, envs=2, seed=seed)
    policy = TableSoftmax(environment.states, environment.actions, scale=1.0, seed=seed)
    return Case(environment, {"policy": policy}, {"collect.count": 3})


CASES: dict[str, Callable[[int], Case]] = {
    "text": text, "pairs": pairs, "steps": steps, "choices": choices, "table": table,
}  # fmt: skip


def case(name: str, seed: int = 0) -> Case:
    """A case by name. Raises MethodError for an unknown one."""
    if name not in CASES:
        raise MethodError(f"there is no case {name!r}. {nearest(name, CASES)}")
    return CASES[name](seed)
