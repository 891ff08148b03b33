"""The options of a method: their defaults, what its docstring says of them, and which pieces read them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from trimtab.core.errors import MethodError
from trimtab.core.method import Method, diff
from trimtab.core.piece import Piece
from trimtab.core.registry import Definition


@dataclass(frozen=True)
class Option:
    """read_by: the addresses that its value reaches; empty where none was found by changing it alone."""

    name: str
    default: Any
    text: str
    read_by: tuple[str, ...]


def options(d: Definition) -> list[Option]:
    """Every option of a method, in order.

    Where an option is read is found by building the method: with marked values, which are then looked for in the
    pipeline; and for what cannot be marked (None, a bool, a value that is computed with), by changing it alone.
    """
    said = described(d.doc, list(d.parameters))
    marked, made = _marked(d), d()
    out = []
    for name, default in d.parameters.items():
        found = marked.get(name) or _changed(d, name)
        text = said.get(name) or next(filter(None, (_at(made, a) for a in found)), "")
        out.append(Option(name, default, text, tuple(found)))
    return out


def described(doc: str, names: list[str]) -> dict[str, str]:
    """What a docstring says of each option, written `name: text` or `name, other: text`: its first sentence.

    What follows a sentence may be about the method, and a docstring does not tell where that begins.
    """
    one = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    if not one:
        return {}
    head = re.compile(rf"(?<![\w.(`])((?:{one})(?:, (?:{one}))*): ")
    found = list(head.finditer(doc))
    out: dict[str, str] = {}
    for match, following in zip(found, [*found[1:], None]):
        text = doc[match.end() : following.start() if following else len(doc)]
        text = re.split(r"\n\s*\n|\.\n|(?<!e\.g)(?<!i\.e)\.\s+(?=[A-Za-z`])", text)[0]
        for name in match.group(1).split(", "):
            out.setdefault(name, " ".join(text.split()).rstrip("."))
    return out


def _at(made: Method, address: str) -> str:
    """What the piece that reads an address says of it, where it says something."""
    owner, _, name = address.rpartition(".")
    if not owner or address not in made.flatten() or any(c in address for c in "(/ "):
        return ""
    piece = made.get(owner)
    return described(inspect.getdoc(piece.fn) or "", [name]).get(name, "") if isinstance(piece, Piece) else ""


# -- marked values --------------------------------------------------------------------------------------------------
class _Float(float):
    """A number that can be told from its equals."""


class _Int(int):
    """A whole number that can be told from its equals."""


class _Text(str):
    """A text that can be told from its equals."""

    __slots__ = ()


_KINDS = {float: _Float, int: _Int, str: _Text}


def _marked(d: Definition) -> dict[str, list[str]]:
    """`option -> addresses` at which its very value stands, with the defaults, each preset and the neutral options."""
    out: dict[str, list[str]] = {}
    for given in ({}, *d.presets.values(), d.neutral.options if d.neutral else {}):
        values = {n: _KINDS[type(v)](v) if type(v) in _KINDS else v for n, v in {**d.parameters, **given}.items()}
        try:
            made = d(**values)
        except MethodError:  # an option of no use beside these others; another set of options shows it
            continue
        for address, value in made.flatten().items():
            for name, mine in values.items():
                if value is mine and (type(value) in _KINDS.values() or _rare(value)):
                    out.setdefault(name, [])
                    if address not in out[name]:
                        out[name].append(address)
    return out


def _rare(value: Any) -> bool:
    """Whether being the same object means that it was handed on."""
    return not isinstance(value, bool | int | float | str | tuple | None)


# -- changing one ---------------------------------------------------------------------------------------------------
def _changed(d: Definition, name: str) -> list[str]:
    """The addresses that differ when this option alone is another value; the first value that can be tried counts."""
    for value in _others(d, name):
        try:
            found = [address for address, _, _ in diff(d(), d(**{name: value}))]
        except (MethodError, TypeError, ValueError):  # not a value of this option
            continue
        return [a for a in found if not any(a.startswith(f"{other}.") for other in found)]
    return []


def _others(d: Definition, name: str) -> Iterator[Any]:
    default = d.parameters[name]
    sets = [*d.presets.values(), d.neutral.options if d.neutral else {}]
    yield from (given[name] for given in sets if name in given and given[name] != default)
    if isinstance(default, bool):
        yield not default
    elif isinstance(default, int | float):
        yield from (default + 1, default / 2, -default)
    elif default is None:
        yield from (8, 0.5, True)
