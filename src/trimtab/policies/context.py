"""Whether a problem and its answer fit into what a policy can read."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from trimtab.core.errors import EnvironmentFailure, TrimtabWarning

TRIES = 20


def too_long(policy: Any, problem: Any, answer: int) -> str | None:
    """What to say about a problem whose prompt leaves no room for `answer` tokens; None where it fits.

    The limit is `policy.context`. A policy that says nothing of one, such as a wrap, is not checked here; the sampler
    inside it still refuses.
    """
    limit = getattr(policy, "context", None)
    if limit is None:
        return None
    length = len(policy.encode(problem.prompt))
    if length + answer <= limit:
        return None
    name = getattr(policy, "name", "the policy")
    start = " ".join(problem.question.split())[:60]
    return (
        f"the prompt of {problem.where or 'a problem'} ({start!r}) has {length} tokens; with {answer} for the answer "
        f"that is more than the {limit} that {name} reads. Shorten or remove it, lower collect.new_tokens, or "
        f"choose a policy with a longer context."
    )


def that_fit(
    kit: Any,
    draw: Callable[[int], Sequence[Any]],
    n: int,
    fault: Callable[[Any], str | None],
    most: int = TRIES,
    counted: str = "too_long",
) -> list[Any]:
    """The next `n` of `draw` without a `fault`. The others are passed over: counted in the log, named in a warning.

    A long run is not ended by one long prompt, and nothing is cut off. counted: their name in the log. Raises
    EnvironmentFailure, with the last fault, when `most` draws were not enough.
    """
    taken: list[Any] = []
    passed, last = 0, ""
    for _ in range(most):
        for item in draw(n - len(taken)):
            found = fault(item)
            if found is None:
                taken.append(item)
                continue
            passed, last = passed + 1, found
            warnings.warn(f"passed over: {found}", TrimtabWarning, stacklevel=3)
        if len(taken) == n:
            kit.log(counted, float(passed))
            return taken
    raise EnvironmentFailure(
        f"{passed} of the {passed + len(taken)} problems drawn for one batch are {counted.replace('_', ' ')}; "
        f"the last one: {last}"
    )
