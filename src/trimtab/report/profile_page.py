"""The page of a profile: a turn as nested bars, the table, the machine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.report.page import document, section
from trimtab.report.records import write_atomic
from trimtab.report.transcripts import clean
from trimtab.report.words import duration, percent

ROW, WIDTH = 34, 760
COLOURS = ("muted", "c0", "c1", "c2", "c3", "c4", "c5")


def write_profile(
    found: Mapping[str, Any], heads: Sequence[str], rows: Sequence[Sequence[str]], remarks: Sequence[str], out: Path
) -> Path:
    """Write `profile.json` and `profile.html`, complete in itself, into a folder; returns the page.

    found: what `runs.profile.profile` gives; heads, rows and remarks: its table in words. Raises `OSError` when the
    folder cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "profile.json", json.dumps(found, indent=1) + "\n")
    write_atomic(out / "profile.html", page(found, heads, rows, remarks))
    return out / "profile.html"


def page(found: Mapping[str, Any], heads: Sequence[str], rows: Sequence[Sequence[str]], remarks: Sequence[str]) -> str:
    """The whole HTML document."""
    policy, environment = found["policy"]["name"], found["environment"]
    head = "".join(f"<th{' class=num' if i else ''}>{clean(h)}</th>" for i, h in enumerate(heads))
    body = "".join(f"<tr>{''.join(_cell(i, text) for i, text in enumerate(row))}</tr>" for row in rows)
    notes = "".join(f"<li class=calm>{clean(r)}</li>" for r in remarks)
    return document(
        f"profile of {found['method']} · trimtab",
        f'<header><p class="eyebrow"><b>trimtab</b> profile · {clean(found["method"])}</p>'
        f"<h1>A turn takes <b>{duration(found['seconds_a_turn'])}</b> <span>{clean(policy)} on {clean(environment)}"
        f'</span></h1><div class="command"><code>{clean(found["command"])}</code>'
        f'<button data-copy type="button">copy</button></div></header>'
        + section("flame", "Where the seconds go", f"<figure>{flame(found['phases'])}</figure>")
        + section("table", "Phases", f'<div class="box scroll"><table><tr>{head}</tr>{body}</table></div>')
        + section("notes", "How to read this", f'<ul class="findings">{notes}</ul>')
        + f"<footer>Mean of {found['turns']} turns after two that are not counted. torch "
        f"{clean(found['machine']['torch'])}, {clean(found['machine']['processor'])}.</footer>",
    )


def _cell(place: int, text: str) -> str:
    if place:
        return f"<td class=num>{clean(text)}</td>"
    name = text.lstrip()
    return f'<td style="padding-left:{0.6 * (len(text) - len(name)):.1f}em">{clean(name)}</td>'


def flame(phases: Sequence[Mapping[str, Any]]) -> str:
    """A turn as nested horizontal bars, `<svg>`: a bar's width is its share, what it holds lies below it."""
    total = phases[0]["seconds"] or 1.0
    place: dict[tuple[str, ...], float] = {}
    bars, deepest = [], 0
    colour: dict[str, str] = {}
    for line in phases:
        path = tuple(line["path"])
        start = place.get(path[:-1], 0.0)
        wide = WIDTH * line["seconds"] / total
        place[path[:-1]] = start + wide  # where the next one beside it begins
        place[path] = start
        family = path[1] if len(path) > 1 else path[0]
        colour.setdefault(family, COLOURS[len(colour) % len(COLOURS)])
        deepest = max(deepest, len(path))
        bars.append(_bar(path, line, start, wide, colour[family]))
    height = ROW * deepest
    return (
        f'<svg class="flame" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="phases of a turn as nested bars">'
        f"{''.join(bars)}</svg>"
    )


def _bar(path: tuple[str, ...], line: Mapping[str, Any], x: float, wide: float, colour: str) -> str:
    y = ROW * (len(path) - 1)
    said = f"{path[-1]} {duration(line['seconds'])} ({percent(line['share'])})"
    fits = next((text for text in (said, path[-1]) if 6.6 * len(text) + 10 < wide), "")
    inside = f'<text x="{x + 6:.1f}" y="{y + 20}" font-size="12" fill="var(--plot-ink)">{clean(fits)}</text>'
    return (
        f"<g><title>{clean(' > '.join(path))}: {clean(said)}</title>"
        f'<rect x="{x:.2f}" y="{y}" width="{max(wide - 1, 0.5):.2f}" height="{ROW - 3}" rx="3" '
        f'fill="var(--plot-{colour})" fill-opacity="{0.42 if len(path) % 2 else 0.28}"/>{inside if fits else ""}</g>'
    )
