"""Plain values as JSON text and back, exactly: what trimtab and its scoring processes send each other."""

from __future__ import annotations

import base64
import datetime
import json
from fractions import Fraction
from typing import Any

# A dictionary with this one key is a tagged value; a real dictionary that has it is sent as pairs.
TAG = "$trimtab"
# A datetime is also a date, so it is asked first.
DATES: dict[str, Any] = {"datetime": datetime.datetime, "date": datetime.date, "time": datetime.time}


def dumps(value: Any) -> str:
    """One line of JSON. Tuples, sets, bytes, fractions, dates and non-text keys survive; numpy scalars become Python's.

    Raises TypeError naming the type of a value that cannot be sent.
    """
    return json.dumps(_encode(value), ensure_ascii=True)


def loads(text: str | bytes) -> Any:
    """Inverse of dumps."""
    return _decode(json.loads(text))


def _encode(value: Any) -> Any:
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is list:
        return [_encode(v) for v in value]
    if isinstance(value, dict):
        if all(type(k) is str for k in value) and TAG not in value:
            return {k: _encode(v) for k, v in value.items()}
        return {TAG: "dict", "v": [[_encode(k), _encode(v)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {TAG: "tuple", "v": [_encode(v) for v in value]}
    if isinstance(value, (set, frozenset)):
        return {TAG: "set", "v": [_encode(v) for v in value]}
    if isinstance(value, (bytes, bytearray)):
        return {TAG: "bytes", "v": base64.b64encode(value).decode("ascii")}
    if isinstance(value, Fraction):
        return {TAG: "fraction", "v": str(value)}
    for name, plain in DATES.items():
        if isinstance(value, plain):
            return {TAG: name, "v": value.isoformat()}
    if kind.__module__.partition(".")[0] == "numpy" and hasattr(value, "tolist"):
        return _encode(value.tolist())
    for base in (str, int, float):
        if isinstance(value, base):
            return base(value)
    raise TypeError(f"a value of type {kind.__module__}.{kind.__name__} cannot be sent to a scoring process")


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(v) for v in value]
    if not isinstance(value, dict):
        return value
    if TAG not in value:
        return {k: _decode(v) for k, v in value.items()}
    kind, inner = value[TAG], value["v"]
    if kind == "dict":
        return {_decode(k): _decode(v) for k, v in inner}
    if kind in ("tuple", "set"):
        items = [_decode(v) for v in inner]
        return tuple(items) if kind == "tuple" else set(items)
    if kind == "bytes":
        return base64.b64decode(inner)
    if kind == "fraction":
        return Fraction(inner)
    return DATES[kind].fromisoformat(inner)
