"""Every refusal trimtab makes on purpose. Each message says what was given, what is allowed, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TrimtabError(Exception):
    """Base of all deliberate refusals; the command line prints its message without a traceback."""


class ColumnError(TrimtabError):
    """A column is missing, undeclared, or has the wrong number of rows."""


class MethodError(TrimtabError):
    """A method cannot be built: unknown name, unread option, conflicting swaps, unmet need."""


class CheckpointError(TrimtabError):
    """A checkpoint is missing, damaged, or belongs to another method."""


class NonFiniteError(TrimtabError):
    """A loss term or gradient is nan or infinite; raised before any parameter changes."""


class EnvironmentFailure(TrimtabError):
    """Rewards failed more often than the environment allows, or a data source is unusable."""


class DiskError(TrimtabError, OSError):
    """A file cannot be written: the disk is full, the place does not exist, or this user may not."""


class TrimtabWarning(UserWarning):
    """Something was left out and the run goes on; the text names it."""


class PurityError(TrimtabError):
    """Debug mode: a stage that must not change parameters or undeclared state did."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error sentence: what is allowed, and the likeliest intention."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    guess = f" Did you mean {close[0]!r}?" if close else ""
    return f"Known: {', '.join(known)}.{guess}"
