"""What the numbers of a request may be; asked before anything is loaded."""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from trimtab.core.errors import MethodError, TrimtabError, nearest

LARGEST_SEED = 2**63 - 1
# Least allowed value, and what a user who wrote something else may have wanted.
WHOLE = {
    "steps": (1, "turns of the loop; to measure a policy untrained, read the first evaluation of any run"),
    "decisions": (1, "decisions of our policy, instead of steps"),
    "seed": (0, f"at most {LARGEST_SEED}"),
    "envs": (1, "environments stepped together"),
    "lora": (0, "the rank of an adapter; 0 trains all parameters"),
    "rows": (1, "rows per update; leave it out for the method's own"),
    "passes": (1, "passes over each batch; leave it out for the method's own"),
    "memory": (1, "rows in memory at once; leave it out for what the policy reads well at once"),
    "eval_every": (1, "turns between evaluations; a number above steps evaluates only before and after"),
    "eval_problems": (1, "held-out problems, or episodes, per evaluation"),
    "eval_samples": (1, "answers to each of them"),
    "save_every": (1, "turns between checkpoints; a number above steps saves only at the end"),
    "keep": (1, "checkpoints kept"),
    "threads": (0, "CPU threads; 0 chooses"),
}
OPTIONAL = ("steps", "decisions", "envs", "rows", "passes", "memory", "eval_every", "eval_problems", "save_every")
TEXTS = ("method", "policy", "env", "out")


def check_numbers(request: Any) -> None:
    """Raise MethodError for a number of a request that is not whole or too small, and for a name that is not text."""
    for name in TEXTS:
        if not isinstance(getattr(request, name), str):
            raise MethodError(f"{name}={getattr(request, name)!r} must be text")
    for name, (least, meaning) in WHOLE.items():
        value = getattr(request, name)
        if value is None and name in OPTIONAL:
            continue
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or value < least or (name == "seed" and value > LARGEST_SEED):
            raise MethodError(f"{name}={value!r} must be a whole number of at least {least}: {meaning}")


def check_written(kind: type[Any], given: Any, path: Path) -> dict[str, Any]:
    """The request found in a `config.json`, or TrimtabError when its keys are not those of a `kind` of this version."""
    if not isinstance(given, dict):
        raise TrimtabError(f"{path} has no 'request', so the run cannot be built again; restore that file")
    known = {f.name: f for f in fields(kind)}
    for name in given:
        if name not in known:
            raise TrimtabError(
                f"the request in {path} has {name!r}, which this version of trimtab does not know. "
                f"{nearest(name, known)} Correct it, or use the version named under 'versions' there."
            )
    missing = [n for n, f in known.items() if f.default is MISSING and n not in given]
    if missing:
        raise TrimtabError(f"the request in {path} has no {missing[0]!r}; put it back, or start a new run")
    return given
