"""Problems made by a procedure: every data set of reasoning-gym, and tiny `toy:` ones that need no package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trimtab.core.errors import EnvironmentFailure, nearest
from trimtab.environments.pools import ListedPool, StreamPool
from trimtab.environments.problem import Failure, Problem, PromptTemplate, make_problem
from trimtab.environments.process import START_SECONDS, shared
from trimtab.environments.spec import Spec, check_options

# Generators may search for a puzzle for a second or so each; more than this for one request is a hang.
MAKE_SECONDS = 300.0
LISTED_MOST = 100_000


TOYS: dict[str, Callable[[int, int], int]] = {"sum": lambda a, b: a + b, "first": lambda a, b: a, "larger": max}


def toy_pool(spec: Spec, template: PromptTemplate, holdout: float) -> ListedPool:
    """`toy:NAME(limit=5)`: "a+b=" for 0 <= a, b <= limit (1..99); characters 0-9 + = only. Needs no package.

    NAME says which answer is right: "sum", the "first" number, or the "larger" one. The last two look like sums and are
    something else: a policy that adds must find out and change its habit, which is learned in a minute and holds for
    numbers it was not trained on.
    """
    if spec.name not in TOYS:
        raise EnvironmentFailure(f"There is no toy environment {spec.name!r}. {nearest(spec.name, TOYS)}")
    check_options(spec, {"limit": int})
    limit = spec.options.get("limit", 5)
    if not 1 <= limit <= 99:
        raise EnvironmentFailure(f"toy:{spec.name}(limit={limit}): limit must be between 1 and 99.")
    problems = [
        make_problem(f"{a}+{b}=", str(TOYS[spec.name](a, b)), {"a": a, "b": b}, template, f"toy:{spec.name} {a}+{b}")
        for a in range(limit + 1)
        for b in range(limit + 1)
    ]
    return ListedPool([p.key for p in problems], problems.__getitem__, holdout, spec.text, duplicates=0)


class Procedure:
    """A reasoning-gym data set as problems by index, made and scored in another process (they may hang)."""

    def __init__(self, spec: Spec, template: PromptTemplate) -> None:
        self.name, self.params, self._template = spec.name, dict(spec.options), template
        self.source = spec.text
        self._process = shared("gym")
        self._tried = self._broken = 0
        self._example = ""
        for key, low in (("seed", 0), ("size", 1)):
            value = self.params.get(key, low)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value < 1 << 31:
                raise EnvironmentFailure(
                    f"The parameter {key}={value!r} of {self.source!r} must be an integer from {low} to 2^31-1."
                )
        self._ask(["gym-check", self.name, self.params], START_SECONDS)

    def _ask(self, request: list[Any], seconds: float) -> Any:
        reply = self._process.ask(request, seconds)
        if isinstance(reply, Failure):
            raise EnvironmentFailure(
                f"{self.source} cannot make problems: {reply.kind}, {reply.message}. Choose easier parameters."
            )
        return reply

    def make(self, low: int, high: int) -> list[Problem | None]:
        """Problems low..high-1; None where the generator raised; an error when a tenth of them (20 at least) did."""
        out: list[Problem | None] = []
        # Small requests, so that one slow problem is not mistaken for a hang.
        for start in range(low, high, 64):
            items = self._ask(["gym-items", self.name, self.params, start, min(start + 64, high)], MAKE_SECONDS)
            out += [self._problem(start + i, item) for i, item in enumerate(items)]
        if self._tried >= 20 and self._broken > self._tried / 10:
            raise EnvironmentFailure(
                f"{self.source} failed to make {self._broken} of {self._tried} problems. Example: {self._example}. "
                "Choose other parameters."
            )
        return out

    def _problem(self, index: int, item: dict[str, Any]) -> Problem | None:
        self._tried += 1
        if "question" not in item:
            self._broken += 1
            self._example = self._example or str(item.get("error", "no question"))
            return None
        answer = item.get("answer")
        where = f"problem {index} of {self.source}"
        return make_problem(str(item["question"]), None if answer is None else str(answer), item, self._template, where)

    def counts(self) -> dict[str, int]:
        """Problems the generator could not make."""
        return {"not_made": self._broken}

    def pool(self, holdout: float) -> ListedPool | StreamPool:
        """All distinct problems when they are few (see `scan`) or the spec gives a size; else a stream."""
        size = self.params.get("size")
        if size is None:
            found, complete = self.scan()
            if not complete:
                return StreamPool(self.make, holdout, self.source, self.counts, found)
        elif size > LISTED_MOST:
            raise EnvironmentFailure(
                f"{self.source}: size={size} is more than {LISTED_MOST}, the most that is made beforehand. Leave "
                "size out for an endless stream."
            )
        else:
            found = self.make(0, size)
        distinct: dict[str, Problem] = {}
        for problem in found:
            if problem is not None:
                distinct.setdefault(problem.key, problem)
        problems = list(distinct.values())
        repeats = 0 if size is None else len([p for p in found if p is not None]) - len(problems)
        return ListedPool(
            [p.key for p in problems], problems.__getitem__, holdout, self.source, duplicates=repeats, **self.counts()
        )

    def scan(self) -> tuple[list[Problem | None], bool]:
        """Make problems until no new one turns up (True), or until the data set looks too large to be listed (False).

        The share of problems met only once estimates the chance that the next one is new (Good and Turing). For a
        pool of D equally likely problems it falls like exp(-N/D): the bounds let pools up to about 400 pass, and
        cost a slow endless generator 64 problems, which the stream starts with.
        """
        found = self.make(0, 64)
        made = [p.key for p in found if p is not None]
        if len(made) - len(set(made)) <= 2:
            return found, False
        for most_new, size in (
            (0.5, 256),
            (0.3, 512),
            (0.12, 1024),
            (0.05, 2048),
            (0.05, 4096),
            (0.05, 8192),
            (0.05, 16384),
        ):
            found += self.make(len(found), size)
            keys = [p.key for p in found if p is not None]
            seen: dict[str, int] = {}
            for key in keys:
                seen[key] = seen.get(key, 0) + 1
            if sum(count == 1 for count in seen.values()) > most_new * len(keys):
                return found, False
            # Complete: the second half, at least ten times the size of the pool, brought nothing new.
            half = len(keys) // 2
            if len(set(keys[:half])) == len(seen) and half >= 10 * len(seen):
                break
        return found, True
