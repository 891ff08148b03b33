"""Recorded evidence for a method, as rows of a table; what cannot be read is refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from trimtab.core.errors import TrimtabError
from trimtab.report.words import is_number, number


class EvidenceError(TrimtabError):
    """A record of evidence cannot be read."""


@dataclass(frozen=True)
class Evidence:
    """One measured claim, in words; "" stands for what the record does not say."""

    claim: str
    metric: str
    arms: str
    effect: str
    detectable: str
    seeds: str
    seconds: str
    verdict: str


def evidence(path: Path) -> list[Evidence]:
    """The rows of `NAME.json`, a list of objects (or one object); none where there is no such file.

    Known keys: claim, part, scope, metric, arms, effect, effect_is, low, high, detectable, verdict, seeds, seconds.
    `arms` maps a name to its mean, to the values of its seeds, or to an object with a mean or values.
    Raises EvidenceError for a file that is not that.
    """
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EvidenceError(f"{path} cannot be read as JSON: {error}") from None
    rows = found if isinstance(found, list) else [found]
    if not all(isinstance(row, dict) for row in rows):
        raise EvidenceError(f"{path} must hold a list of objects, one a claim")
    return [_row(row) for row in rows]


def _row(row: Mapping[str, Any]) -> Evidence:
    effect, low, high = (row.get(k) for k in ("effect", "low", "high"))
    ends = f" [{number(low)}, {number(high)}]" if is_number(low) and is_number(high) else ""
    seeds = row.get("seeds")
    place = ", ".join(filter(None, (_text(row.get(k)) for k in ("part", "scope"))))
    between = f" ({row['effect_is']})" if row.get("effect_is") else ""
    return Evidence(
        claim=f"({place}) {_text(row.get('claim'))}" if place else _text(row.get("claim")),
        metric=_text(row.get("metric")),
        arms=_arms(row.get("arms")),
        effect=f"{_text(effect)}{ends}{between}",
        detectable=_text(row.get("detectable")),
        seeds=str(len(seeds)) if isinstance(seeds, list) else _text(seeds),
        seconds=_text(row.get("seconds")),
        verdict=_text(row.get("verdict")),
    )


def _arms(arms: Any) -> str:
    if not isinstance(arms, Mapping):
        return _text(arms)
    return ", ".join(f"{name} {_mean(value)}" for name, value in arms.items())


def _mean(value: Any) -> str:
    if isinstance(value, Mapping):
        inside = next((value[k] for k in ("mean", "values", "seeds") if k in value), None)
        return _mean(inside) if inside is not None else _text(dict(value))
    if isinstance(value, list) and value and all(map(is_number, value)):
        return number(fmean(value))
    return _text(value)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if is_number(value):
        return number(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
