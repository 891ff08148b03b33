"""Claims: what each paper says, put to a test that it can fail. One file a method; `CLAIM` in it is the claim."""

from __future__ import annotations

import importlib
import pkgutil

from trimtab.claims.core import Claim
from trimtab.claims.statistics import ClaimError
from trimtab.core.errors import MethodError, nearest
from trimtab.core.registry import find, methods


def claims() -> list[str]:
    """The methods that have a claim, in alphabetical order."""
    files = {module.name for module in pkgutil.iter_modules(__path__)}
    return sorted(files & set(methods()))


def find_claim(name: str) -> Claim:
    """The claim of a method, by name, alias or arXiv id. Raises `ClaimError` with the nearest name."""
    known = claims()
    try:
        method = find(name).name
    except MethodError:
        raise ClaimError(f"there is no claim {name!r}. {nearest(name, known)}") from None
    if method not in known:
        raise ClaimError(f"the method {method!r} has no claim yet. {nearest(method, known)}")
    made: Claim = importlib.import_module(f"{__name__}.{method}").CLAIM
    return made


def statement_of(name: str) -> str | None:
    """What the paper says, in our words; None for a method without a claim."""
    return find_claim(name).statement if name in claims() else None
