"""The report of a run: one HTML file, complete in itself, made from whatever the run folder holds so far."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.report import plots
from trimtab.report.course import Course
from trimtab.report.diagnose import checked, findings, summary
from trimtab.report.folder import RunFolder, RunFolderError
from trimtab.report.guide import GUIDES, LANGUAGE
from trimtab.report.keys import LOSS, Panel, failure_kinds, look_up
from trimtab.report.page import document, section
from trimtab.report.records import write_atomic
from trimtab.report.story import Point, Story, facts, tell
from trimtab.report.transcripts import clean, group_html, held_out_html
from trimtab.report.video import video_html
from trimtab.report.words import LANGUAGE as LANGUAGE_WORDS
from trimtab.report.words import (
    WHY_LOSS_IS_ZERO,
    Words,
    about_loss,
    count,
    interval,
    is_number,
    number,
    percent,
    words_of,
)

Record = Mapping[str, Any]


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into a run folder and return its path; and `findings.json`, what its numbers suggest.

    Works at any moment of a run, finished, running or killed: what is missing is left out, or said to be missing. A
    part that cannot be drawn from odd data is replaced by a sentence saying so; the other parts stand.
    Raises `RunFolderError` when there is no such folder, `OSError` when the page cannot be written.
    """
    folder = RunFolder(run_dir)
    if not folder.path.is_dir():
        raise RunFolderError(f"there is no folder {folder.path}; give the folder of a run")
    try:
        config, config_trouble = folder.config(), ""
    except RunFolderError as error:
        config, config_trouble = {}, str(error)
    history, evaluations, samples = folder.metrics(), folder.evaluations(), folder.samples()
    story = _guarded(lambda: tell(config, history, evaluations)) or Story("A run.", "", None, None, False, "reward")
    if isinstance(story, str):
        story = Story("This run could not be summed up.", re.sub("<[^>]+>", "", story), None, None, False, "reward")
    told, words = story, words_of(config.get("world"))
    course = Course.of(history, evaluations)
    parts: list[tuple[str, str, Callable[[], str]]] = [
        ("look", "What to look at", lambda: _findings(course, words)),
        ("video", "An episode", lambda: video_html(folder.path)),
        ("curves", "Curves", lambda: _curves(history, evaluations, told.measure, config)),
        ("guide", "How to read this", lambda: _guide(_about_loss(config), config)),
        ("held-out", "Held-out problems, before and after", lambda: held_out_html(samples)),
        ("group", "One training group", lambda: group_html(samples)),
        ("failures", "Failures", lambda: _failures(history, samples, words)),
        ("config", "Configuration", lambda: _config(config, config_trouble)),
    ]
    body = _guarded(lambda: _top(config, history, told))
    body += "".join(section(name, title, _guarded(part)) for name, title, part in parts)
    body += _guarded(lambda: _foot(folder, config))
    write_atomic(folder.report, document(f"{_title(config)} · trimtab", body))
    folder.write_json("findings", summary(course, words.mute))
    return folder.report


def _guarded(part: Callable[[], Any]) -> Any:
    # The record may have been written by another version, by hand, or by a policy that prints anything at all.
    try:
        return part()
    except Exception as error:
        what = clean(f"{type(error).__name__}: {error}"[:300])
        return f'<p class="none">This part could not be made from the record ({what}).</p>'


# -- parts ----------------------------------------------------------------------------------------------------------
def _title(config: Record) -> str:
    named = [value for label, value in facts(config, []) if label in ("method", "environment")]
    return " on ".join(named) or "a run"


def _top(config: Record, history: Sequence[Record], story: Story) -> str:
    given = facts(config, history)
    names = dict(given)
    eyebrow = f"<b>trimtab</b> report{' · ' + clean(names['method']) if 'method' in names else ''}"
    headline = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", clean(story.headline))
    headline = re.sub(r"(\[[^\]]*\])", r"<span>\1</span>", headline)
    cells = "".join(f"<div><dt>{clean(label)}</dt><dd>{_breakable(value)}</dd></div>" for label, value in given)
    remark = f'<p class="remark">{clean(story.remark)}</p>' if story.remark else ""
    return (
        f'<header><p class="eyebrow">{eyebrow}</p><h1>{headline}</h1>{remark}{_range(story)}'
        f'<dl class="facts">{cells}</dl>{_command(config)}</header>'
    )


def _breakable(value: str) -> str:
    """Escaped text that may break after `,`, `(` and `:` instead of inside a word."""
    return "<wbr>".join(map(clean, re.split(r"(?<=[,(:/])", value)))


def _command(config: Record) -> str:
    command = config.get("command")
    if isinstance(command, list):
        command = shlex.join(map(str, command))
    if not isinstance(command, str) or not command:
        return '<p class="none">config.json names no command, so none can be shown for repeating this run.</p>'
    return f'<div class="command"><code>{clean(command)}</code><button data-copy type="button">copy</button></div>'


def _range(story: Story) -> str:
    """Before and after as two intervals on one scale."""
    if story.before is None or story.after is None:
        return ""
    names = ["before", "after"] if not story.before.turn else [f"turn {number(story.before.turn)}", "last"]
    rows = list(zip(names, (story.before, story.after)))
    ends = [v for _, p in rows for v in (p.mean, p.low, p.high) if v is not None]
    least, most = (0.0, 1.0) if story.share else (min(ends), max(ends))
    span = (most - least) or 1.0

    def x(value: float) -> float:
        return 60 + 560 * (value - least) / span

    ticks = [least + span * i / 4 for i in range(5)]
    say = percent if story.share else number
    marks = "".join(
        f'<line x1="{x(t):.1f}" x2="{x(t):.1f}" y1="6" y2="66" stroke="var(--plot-grid)"/>'
        f'<text x="{x(t):.1f}" y="84" text-anchor="middle">{say(t)}</text>'
        for t in ticks
    )
    bars = "".join(
        _bar(name, point, x, 22 + 28 * i, "var(--plot-c1)" if i else "var(--plot-muted)", story.share)
        for i, (name, point) in enumerate(rows)
    )
    label = f"{story.measure} before and after, with 95% intervals"
    return f'<svg class="range" viewBox="0 0 760 90" role="img" aria-label="{clean(label)}">{marks}{bars}</svg>'


def _bar(name: str, point: Point, x: Callable[[float], float], y: int, colour: str, share: bool) -> str:
    low = point.mean if point.low is None else point.low
    high = point.mean if point.high is None else point.high
    value = percent(point.mean) if share else number(point.mean)
    return (
        f'<text x="46" y="{y + 4}" text-anchor="end">{name}</text>'
        f'<line x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="9" '
        f'opacity=".28"/><circle cx="{x(point.mean):.1f}" cy="{y}" r="6" fill="{colour}"/>'
        f'<text x="636" y="{y + 4}"><tspan class="v">{value}</tspan> {interval(point.low, point.high, share)}</text>'
    )


def _findings(course: Course, words: Words) -> str:
    said, rules = findings(course, words.mute), checked(course, words.mute)
    if not len(course):
        return ""
    quiet = [rule.about for rule in rules if rule.kind not in {f.kind for f in said}]
    lead = "Checked as well, without a finding" if said else "No rule fired. Checked were"
    items = [f"<li>{clean(f.sentence)}</li>" for f in said]
    calm = clean(f"{lead}: " + "; ".join(quiet) + ".")
    items += [f'<li class="calm">{calm}</li>'] if quiet else []
    return f'<ul class="findings">{"".join(items)}</ul>'


def _about_loss(config: Record) -> str:
    resolved = config.get("resolved")
    return about_loss(resolved if isinstance(resolved, Mapping) else (), config.get("world"))


def _curves(history: Sequence[Record], evaluations: Sequence[Record], measure: str, config: Record) -> str:
    loss, words = _about_loss(config), words_of(config.get("world"))
    if not history and not evaluations:
        return '<p class="none">No turn has been recorded yet.</p>'
    rewarded = any(look_up(record, "reward") is not None for record in history)
    large = (
        [(plots.reward_figure(history, theme="page", words=words), "")] if rewarded or loss == WHY_LOSS_IS_ZERO else []
    )
    if evaluations:
        large.append((plots.eval_figure(evaluations, theme="page", name=measure, words=words), ""))
    known: list[tuple[bytes, str]] = []
    other: list[tuple[bytes, str]] = []
    for panel, picture in plots.panel_figures(history, theme="page", words=words):
        hint = f"{loss.partition(':')[0]} (see below)." if panel.title == LOSS else _hint(panel, words)
        (known if panel.series else other).append((picture, hint))
    folded = (
        f"<details><summary>{count(len(other), 'more picture')}: everything else that was measured</summary>"
        f"{_plots(other, 'small')}</details>"
        if other
        else ""
    )
    return _plots(large, "large") + _plots(known, "small") + folded


def _hint(panel: Panel, words: Words) -> str:
    return "" if panel.title.lower() in words.mute else panel.hint


def _plots(pictures: Sequence[tuple[bytes, str]], size: str) -> str:
    figures = "".join(
        f"<figure>{svg.decode()}{f'<figcaption>{clean(hint)}</figcaption>' if hint else ''}</figure>"
        for svg, hint in pictures
    )
    return f'<div class="plots {size}">{figures}</div>' if figures else ""


def _guide(loss: str, config: Record) -> str:
    guide = GUIDES.get(str(config.get("world")), LANGUAGE)
    cells = f"<div class=wide><dt>The loss</dt><dd>{clean(loss)}</dd></div>"
    cells += "".join(f"<div><dt>{clean(term)}</dt><dd>{clean(text)}</dd></div>" for term, text in guide)
    return f'<div class="box"><dl class="guide">{cells}</dl></div>'


def _failures(history: Sequence[Record], samples: Sequence[Record], words: Words) -> str:
    turns: dict[str, list[tuple[Any, float]]] = {}
    for record in history:
        kinds = failure_kinds(record) or {"any kind": record["failures"] if is_number(record.get("failures")) else 0}
        for kind, n in kinds.items():
            if n > 0:
                turns.setdefault(kind, []).append((record.get("turn", "?"), n))
    example: dict[str, str] = {}
    for sample in samples:
        failure = sample.get("failure")
        if isinstance(failure, Mapping):
            example.setdefault(str(failure.get("kind")), str(failure.get("message", "")))
            turns.setdefault(str(failure.get("kind")), [])
    if not turns:
        scored = words is LANGUAGE_WORDS and any(look_up(record, "reward") is not None for record in history)
        said = "None: every response got a reward." if scored else ""
        return f'<p class="lead">{said}</p>' if said else ""
    rows = "".join(
        f'<tr><td>{clean(kind)}</td><td class="num">{number(sum(n for _, n in seen)) if seen else "?"}</td>'
        f'<td class="num">{len(seen)}</td><td class="num">{clean(seen[0][0]) if seen else ""}</td>'
        f'<td class="num">{clean(seen[-1][0]) if seen else ""}</td><td>{clean(example.get(kind, ""))}</td></tr>'
        for kind, seen in sorted(turns.items(), key=lambda item: -sum(n for _, n in item[1]))
    )
    head = "".join(
        f"<th{' class=num' if numeric else ''}>{name}</th>"
        for name, numeric in (("kind", 0), ("responses", 1), ("turns", 1), ("first", 1), ("last", 1), ("example", 0))
    )
    lead = "Responses that could not be scored. They have no reward, which is not the same as a reward of 0."
    return f'<p class="lead">{lead}</p><div class="box scroll"><table><tr>{head}</tr>{rows}</table></div>'


def _config(config: Record, trouble: str) -> str:
    if trouble:
        return f'<p class="none">{clean(trouble)}</p>'
    rows = "".join(f"<tr><td>{clean(key)}</td><td>{clean(value)}</td></tr>" for key, value in _leaves(config, ""))
    return (
        "<p class=lead>Every option as resolved; with it the run can be rebuilt.</p>"
        f"<details><summary>Show {count(rows.count('<tr>'), 'value')}</summary>"
        f'<div class="box scroll"><table><tr><th>option</th><th>value</th></tr>{rows}</table></div></details>'
    )


def _leaves(value: Any, where: str) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        return [leaf for k, v in value.items() for leaf in _leaves(v, f"{where}.{k}" if where else str(k))]
    return [(where, value)]


def _foot(folder: RunFolder, config: Record) -> str:
    versions = config.get("versions")
    named = ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, Mapping) else ""
    damaged = folder.damaged()
    lost = f" {count(damaged, 'line')} of the record could not be read." if damaged else ""
    return f"<footer>Made by trimtab from {clean(folder.path.name)}/. {clean(named)}.{lost}</footer>".replace(
        ". .", "."
    )
