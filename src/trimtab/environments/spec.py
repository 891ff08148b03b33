"""Environment specifications: one line of text that names a data source and its parameters."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.core.errors import EnvironmentFailure, nearest

KINDS = ("reasoning-gym", "datasets", "toy")
FORMS = (
    "An environment is 'reasoning-gym:NAME(key=value, ...)', 'path/to/FILE.jsonl', "
    "'datasets:NAME(split=train, ...)' or 'toy:sum(limit=5)'."
)


@dataclass(frozen=True)
class Spec:
    """A parsed specification: kind ("reasoning-gym", "jsonl", "datasets", "toy"), name, options, and the text given."""

    kind: str
    name: str
    options: dict[str, Any]
    text: str


def parse_spec(text: str) -> Spec:
    """Split a specification into kind, name and options; raises EnvironmentFailure with the allowed forms."""
    given = text.strip()
    if not given:
        raise EnvironmentFailure(f"The environment is empty. {FORMS}")
    split = given.find(".jsonl(")
    if given.endswith(".jsonl"):
        return Spec("jsonl", given, {}, given)
    if split >= 0:
        name, options = _split(given, split + len(".jsonl"))
        return Spec("jsonl", name, options, given)
    kind, colon, rest = given.partition(":")
    if not colon or kind not in KINDS:
        raise EnvironmentFailure(_unknown(given, kind if colon else None))
    bracket = rest.find("(")
    name, options = _split(rest, bracket) if bracket >= 0 else (rest, {})
    if not name.strip():
        raise EnvironmentFailure(f"The environment {given!r} names no data set after '{kind}:'. {FORMS}")
    if ")" in name:
        raise EnvironmentFailure(f"The environment {given!r} has a ')' without a '('. {FORMS}")
    return Spec(kind, name.strip(), options, given)


def _unknown(given: str, kind: str | None) -> str:
    if kind is not None:
        return f"The environment {given!r} is of unknown kind {kind!r}. {nearest(kind, KINDS)} {FORMS}"
    name = given.partition("(")[0]
    if name.replace("_", "").isalnum():
        return f"The environment {given!r} has no kind. Did you mean 'reasoning-gym:{given}'? {FORMS}"
    return f"The environment {given!r} is not one trimtab knows. {FORMS}"


def _split(text: str, bracket: int) -> tuple[str, dict[str, Any]]:
    name, inside = text[:bracket], text[bracket + 1 :]
    if not inside.endswith(")"):
        raise EnvironmentFailure(f"The parameters of {text!r} must end with ')': write {name}(key=value, ...).")
    return name, parse_options(inside[:-1], text)


def parse_options(inside: str, text: str) -> dict[str, Any]:
    """Read "a=1, split=train" as literals; a bare word is text. Nothing is ever evaluated.

    Raises EnvironmentFailure for positional values, expressions, repeated keys, and for true/false/none (write True).
    """
    how = f"Write key=value pairs with plain Python literals, such as {text.partition('(')[0]}(size=10, split=train)."
    try:
        call = ast.parse(f"f({inside}\n)", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = getattr(error, "msg", None) or str(error)
        raise EnvironmentFailure(f"The parameters of {text!r} cannot be read ({reason}). {how}") from None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise EnvironmentFailure(f"The parameters of {text!r} cannot be read. {how}")
    if call.args:
        raise EnvironmentFailure(f"The parameter {ast.unparse(call.args[0])!r} of {text!r} has no name. {how}")
    options: dict[str, Any] = {}
    for item in call.keywords:
        if item.arg is None:
            raise EnvironmentFailure(f"The parameters of {text!r} contain '**', which is not a key=value pair. {how}")
        if item.arg in options:
            raise EnvironmentFailure(f"The parameter {item.arg!r} of {text!r} is given twice; keep one.")
        options[item.arg] = _literal(item.arg, item.value, text)
    return options


def _literal(key: str, node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Name):
        if node.id in ("true", "false", "none", "null"):
            right = {"true": "True", "false": "False"}.get(node.id, "None")
            raise EnvironmentFailure(
                f"The parameter {key}={node.id} of {text!r} must be written {key}={right} (or quoted, if it is text)."
            )
        return node.id
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise EnvironmentFailure(
            f"The parameter {key}={ast.unparse(node)} of {text!r} is not a literal. "
            f"Numbers, True/False/None, lists and quoted text are allowed: {key}='...'."
        ) from None


def check_options(spec: Spec, allowed: Mapping[str, type | tuple[type, ...]]) -> None:
    """Refuse an option that nobody reads, and one of the wrong type, naming what is allowed."""
    for key, value in spec.options.items():
        if key not in allowed:
            raise EnvironmentFailure(f"{spec.name!r} has no parameter {key!r}. {nearest(key, allowed)}")
        given = allowed[key]
        kinds = given if isinstance(given, tuple) else (given,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise EnvironmentFailure(
                f"The parameter {key}={value!r} of {spec.text!r} must be {' or '.join(k.__name__ for k in kinds)}."
            )


def nearest_path(path: Path) -> str:
    """The end of a "does not exist" sentence: the likeliest name beside it, or the first folder that is missing."""
    folder, missing = path.parent, path
    while not folder.is_dir() and folder != folder.parent:
        folder, missing = folder.parent, folder
    if missing != path:
        return f"The folder {str(missing)!r} does not exist either."
    names = _names(folder)
    # Names of one kind share their suffix, so half of the letters alike would mean nothing.
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.7)
    if close:
        return f"Did you mean {str(folder / close[0])!r}?"
    same = [name for name in names if name.endswith(path.suffix)] if path.suffix else []
    listed = ", ".join((same or names)[:10]) or "nothing"
    return f"The folder {str(folder)!r} holds: {listed}."


def _names(folder: Path) -> list[str]:
    try:
        found: Iterable[Path] = folder.iterdir()
        return sorted(p.name for p in found if not p.name.startswith("."))
    except OSError:
        return []
