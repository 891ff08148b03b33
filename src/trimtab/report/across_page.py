"""The page of a comparison on several tasks: the aggregate, a panel for each task, and every raw table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.report import across
from trimtab.report.compare import curve, overlay
from trimtab.report.comparison import _X, _breakable, _differences, _foot, _key, _measure, _plots, _strong, _table
from trimtab.report.folder import RunFolder
from trimtab.report.page import document, section
from trimtab.report.paired import METRICS, PRIMARY, effect_of, mean_of, said
from trimtab.report.records import write_atomic
from trimtab.report.reliable import HEADS, rows
from trimtab.report.style import CYCLE
from trimtab.report.transcripts import clean
from trimtab.report.words import LANGUAGE, WORDS, count, duration

Made = Mapping[str, Any]


def write_across(out: str | Path, made: Made) -> Path:
    """Write `report.html`; returns its path. made: what `comparison.json` holds. At least one run finished."""
    arms = list(next(iter(made["tasks"].values()))["arms"])
    known = {**made, "arms": arms, "runs": [r for one in made["tasks"].values() for r in one["runs"]]}
    body = _top(known) + "".join(
        section(name, title, inside)
        for name, title, inside in (
            ("aggregate", "Over all tasks", _aggregate(known)),
            ("panels", "Task by task", _panels(known)),
            ("raw", "Raw scores", _raw(known)),
            ("differs", "What differs", _differences(known)),
            ("guide", "How to read this", _guide(known)),
        )
    )
    path = Path(out) / "report.html"
    others = ", ".join(a["arm"] for a in arms[1:])
    title = f"{others} against {made['base']} on {count(len(made['tasks']), 'task')}"
    write_atomic(path, document(f"{clean(title)} · trimtab", body + _foot(known)))
    return path


def _top(made: Made) -> str:
    tasks = made["tasks"]
    headline = f"{count(len(made['arms']) - 1, 'method')} against {clean(made['base'])} on {count(len(tasks), 'task')}"
    listed = "".join(f"<li>{_strong(c, a['arm'])}</li>" for c, a in zip(made["conclusions"], made["arms"][1:]))
    listed += "".join(f'<li class="calm">{clean(note)}</li>' for note in made["notes"])
    ((unit, n),) = made["budget"].items()
    facts = {
        **({"policy": made["task"]["policy"]} if made["task"]["policy"] else {}),
        "tasks": ", ".join(tasks),
        "seeds": ", ".join(map(str, made["seeds"])),
        "budget of a run": f"{n:,} decisions" if unit == "decisions" else f"that of {n:,} turns of {made['base']}",
        "training, all runs": duration(sum(a["seconds"] for one in tasks.values() for a in one["arms"])),
    }
    cells = "".join(f"<div><dt>{clean(k)}</dt><dd>{_breakable(v)}</dd></div>" for k, v in facts.items())
    return (
        f'<header><p class="eyebrow"><b>trimtab</b> comparison</p><h1>{headline}</h1><ul class=findings>{listed}</ul>'
        f'<dl class="facts">{cells}</dl><div class="command"><code>{clean(made["command"])}</code>'
        '<button data-copy type="button">copy</button></div></header>'
    )


# -- the aggregate ---------------------------------------------------------------------------------------------------


def _aggregate(made: Made) -> str:
    lead = (
        "The interquartile mean of normalised scores over all tasks and seeds, with its 95% interval, and the chance "
        f"that one run ends above one of {made['base']} on the same task, averaged over tasks. Normalised: 0 and 1 are "
        "the two scores of each task in the second table; a score may be below 0 or above 1."
    )
    scale = _table(["task", "is 0", "is 1", "by"], across.scale_rows(made["normalised"]))
    return (
        f'<p class="lead">{clean(lead)}</p>{_dots(made["aggregate"], made)}'
        f"{_table(across.HEADS, across.table_rows(made['aggregate']))}<br>{scale}"
    )


def _dots(found: Sequence[Made], made: Made) -> str:
    """The interquartile mean of each arm with its interval, on one scale."""
    drawn = [r for r in found if r["iqm"] is not None]
    if not drawn:
        return ""
    ends = [v for r in drawn for v in (r["iqm"], r["low"], r["high"], 0.0, 1.0) if v is not None]
    least, span = min(ends), (max(ends) - min(ends)) or 1.0

    def x(value: float) -> float:
        return 20 + 360 * (value - least) / span

    height = 26 * len(drawn) + 12
    lines = [
        f'<line x1="{x(v):.1f}" x2="{x(v):.1f}" y1="0" y2="{height}" stroke="var(--plot-muted)"/>'
        f'<text x="{x(v):.1f}" y="{height + 16}" text-anchor="middle">{v:g}</text>'
        for v in (0.0, 1.0)
    ]
    order = [a["arm"] for a in made["arms"]]
    for i, row in enumerate(drawn):
        y, colour = 18 + 26 * i, f"var(--plot-{CYCLE[order.index(row['arm']) % len(CYCLE)]})"
        if row["low"] is not None:
            lines.append(
                f'<line x1="{x(row["low"]):.1f}" x2="{x(row["high"]):.1f}" y1="{y}" y2="{y}" stroke="{colour}" '
                'stroke-width="9" opacity=".3"/>'
            )
        lines.append(f'<circle cx="{x(row["iqm"]):.1f}" cy="{y}" r="6" fill="{colour}"/>')
        lines.append(
            f'<text x="400" y="{y + 4}"><tspan class="v">{clean(row["arm"])}</tspan> {clean(across.scaled(row))}</text>'
        )
    return (
        f'<svg class="range" viewBox="0 0 760 {height + 22}" role="img" aria-label="interquartile means with their '
        f'intervals">{"".join(lines)}</svg>'
    )


# -- task by task ----------------------------------------------------------------------------------------------------


def _panels(made: Made) -> str:
    """One picture a task: held-out scores against decisions, the mean over seeds and every seed."""
    pictures = []
    for i, (task, one) in enumerate(made["tasks"].items()):
        folders = {
            a["arm"]: [RunFolder(r["run"]) for r in one["runs"] if r["arm"] == a["arm"] and r["state"] == "finished"]
            for a in one["arms"]
        }
        folders = {arm: mine for arm, mine in folders.items() if mine}
        if not folders:
            continue
        words = WORDS["control"] if one["reliable"] else LANGUAGE
        picture = overlay(
            {arm: [curve(f, "held-out", "decisions") for f in mine] for arm, mine in folders.items()},
            title=task, x_label=_X, y_label=_measure(folders, words), theme="page", name=f"task{i}",
            share=None if words.shares else False,
        )  # fmt: skip
        pictures.append((picture, "Thick: the mean over seeds. Thin: each seed."))
    return f"{_key(made)}{_plots(pictures, 'large')}"


def _raw(made: Made) -> str:
    """Every task by itself, in its own units: each arm, against the first, and robustly."""
    parts = []
    for task, one in made["tasks"].items():
        alone = [[a["arm"], mean_of(a["metrics"][PRIMARY]) if PRIMARY in a["metrics"] else "not measured",
                  f"{a['seeds']} of {a['of']}", f"{a['decisions']:,}", duration(a["seconds"])]
                 for a in one["arms"]]  # fmt: skip
        paired = [[r["arms"][1], effect_of(r), _smallest(r), f"{len(r['seeds'])} of {r['of']}"]
                  for r in one["rows"] if r["metric"] == PRIMARY]  # fmt: skip
        page = f"{Path(one['report']).parent.name}/report.html" if "report" in one else ""
        link = f' (<a href="{clean(page)}">its own page</a>)' if page else ""
        parts.append(f"<h3>{clean(task)}{link}</h3>")
        parts.append(_table(["arm", METRICS[PRIMARY], "seeds", "decisions", "training"], alone))
        if paired:
            heads = ["arm", f"difference from {made['base']}, paired by seed", "smallest likely to be shown", "seeds"]
            parts.append("<br>" + _table(heads, paired))
        if one["reliable"]:
            parts.append("<br>" + _table(HEADS, rows(one["reliable"])))
    return "".join(parts)


def _smallest(row: Made) -> str:
    return "unknown" if row["detectable"] is None else said(row["detectable"], row["share"])


def _guide(made: Made) -> str:
    entries = (
        (
            "Normalised",
            "Tasks pay in different units, so a score is put on a scale before scores of several tasks are averaged. "
            "Unless scores are given (--reference), 0 is what the policies of the first arm score before training and "
            "1 what its runs score at their end: the first arm is near 1 by construction, and the scale itself "
            "comes from few seeds.",
        ),
        (
            "Interquartile mean",
            "The mean of the middle half of all runs of an arm, whatever task and seed they are of: less swayed by one "
            "odd run than the mean, and of less variance than the median (Agarwal et al. 2021).",
        ),
        (
            "The chance",
            "50% is no difference. It looks at order alone, so it needs no scale and says nothing about how much.",
        ),
        (
            "The intervals",
            "A bootstrap that draws seeds anew within each task: they hold for new seeds on these tasks, not for other "
            "tasks. With few seeds they are rough, and too narrow more often than not.",
        ),
        (
            "Better or worse",
            "Said where the interval of the chance leaves out 50% and luck alone would bring it as far from there in "
            "less than 1 of 20 comparisons (seeds dealt anew to both sides within each task): where two arms do not "
            "overlap, an interval from two seeds has no width.",
        ),
    )
    cells = "".join(f"<div><dt>{clean(term)}</dt><dd>{clean(text)}</dd></div>" for term, text in entries)
    return f'<div class="box"><dl class="guide">{cells}</dl></div>'
