"""Values written as text on a command line: numbers, text, and schedules inside schedules."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from trimtab.core.errors import MethodError, nearest


def literal(text: str) -> Any:
    """A value given on the command line: a Python literal, a schedule such as `linear(1e-5, 0)`, else text.

    Schedules nest: `warmup(10, linear(1e-5, 0))`. Raises MethodError for one that is unknown or cannot be made; text
    that looks like a call is written in quotes.
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError):  # ValueError: a null byte
        return text.strip()
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return _made(node, text)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return text.strip()


def _made(node: ast.Call, text: str) -> Any:
    name, known = ast.unparse(node.func), _known()
    if name not in known:
        raise MethodError(f"{text.strip()!r}: there is no schedule {name!r}. {nearest(name, known)}")
    try:
        named = {k.arg: _value(k.value, text) for k in node.keywords if k.arg}
        return known[name](*[_value(a, text) for a in node.args], **named)
    except TypeError as e:
        raise MethodError(f"{text.strip()!r} is not a schedule that can be made: {e}") from None


def _value(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Call):
        return _made(node, text)
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise MethodError(f"{ast.unparse(node)!r} in {text.strip()!r} is neither a number nor a schedule") from None


def _known() -> dict[str, Callable[..., Any]]:
    from trimtab.core import schedules
    from trimtab.core.piece import Schedule
    from trimtab.core.terms import fixed

    made = {n: v for n, v in vars(schedules).items() if isinstance(v, type) and issubclass(v, Schedule)}
    del made["Schedule"]
    return {**made, "fixed": fixed}  # fixed(L), a reduction
