"""The page of a comparison: what may be concluded, the curves, the tables, what differs, how to repeat it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.report import reliable
from trimtab.report.compare import Curve, curve, overlay
from trimtab.report.folder import RunFolder
from trimtab.report.keys import dead_share, look_up
from trimtab.report.page import document, section
from trimtab.report.paired import METRICS, PRIMARY, effect_of, mean_of, said
from trimtab.report.plots import SMALL
from trimtab.report.records import write_atomic
from trimtab.report.style import CYCLE, Theme
from trimtab.report.transcripts import clean
from trimtab.report.words import LANGUAGE, WORDS, Words, count, duration

Made = Mapping[str, Any]
_X = "decisions of the policy"
_DECIDES = "The mean of the last three held-out evaluations"


def write_comparison(out: str | Path, made: Made) -> Path:
    """Write `report.html` and the pictures `held-out-light.svg` and `held-out-dark.svg`; returns the page's path.

    made: what `comparison.json` holds; the curves are read from the run folders it names. At least one run finished.
    """
    out = Path(out)
    folders = {
        a["arm"]: [RunFolder(r["run"]) for r in made["runs"] if r["arm"] == a["arm"] and r["state"] == "finished"]
        for a in made["arms"]
    }
    folders = {arm: mine for arm, mine in folders.items() if mine}
    held_out = {arm: [curve(f, "held-out", "decisions") for f in mine] for arm, mine in folders.items()}
    words = WORDS["control"] if made.get("reliable", []) else LANGUAGE
    measure = _measure(folders, words)

    def picture(theme: Theme) -> bytes:
        title, share = f"Held-out {words.problem}s", None if words.shares else False
        return overlay(held_out, title=title, x_label=_X, y_label=measure, theme=theme, name="held-out", share=share)

    for theme in ("light", "dark"):
        (out / f"held-out-{theme}.svg").write_bytes(picture(theme))
    body = _top(made) + "".join(
        section(name, title, inside)
        for name, title, inside in (
            ("effects", "Against the first", _forest(made)),
            ("curves", "Curves", _curves(made, folders, picture("page"), words)),
            ("reliable", "Robust summaries", _reliable(made)),
            ("table", "Every measure", _measures(made)),
            ("seeds", "Seed by seed", _by_seed(made)),
            ("differs", "What differs", _differences(made)),
            ("guide", "How to read this", _guide(made)),
        )
    )
    path = out / "report.html"
    write_atomic(path, document(f"{_title(made)} · trimtab", body + _foot(made)))
    return path


def _measure(folders: Mapping[str, Sequence[RunFolder]], words: Words) -> str:
    """What the evaluations averaged, and over how many problems."""
    last = next(iter(folders.values()))[0].evaluations()[-1]
    return f"{last.get('measure', 'mean')} on {count(int(last['n']), words.problem)}"


def _title(made: Made) -> str:
    others = [a["arm"] for a in made["arms"][1:]]
    return f"{', '.join(others)} against {made['base']}"


# -- the top -----------------------------------------------------------------------------------------------------


def _top(made: Made) -> str:
    arms, said_of = made["arms"], made["conclusions"]
    if len(said_of) == 1:
        headline, findings = _strong(said_of[0], arms[1]["arm"]), []
    else:
        headline = f"{len(said_of)} methods against {clean(made['base'])}, {count(len(made['seeds']), 'seed')} each"
        findings = [_strong(c, a["arm"]) for c, a in zip(said_of, arms[1:])]
    listed = "".join(f"<li>{f}</li>" for f in findings)
    listed += "".join(f'<li class="calm">{clean(note)}</li>' for note in made["notes"])
    ((unit, n),) = made["budget"].items()
    facts = {
        **({"policy": made["task"]["policy"]} if made["task"]["policy"] else {}),
        "environment": made["task"]["environment"],
        "seeds": ", ".join(map(str, made["seeds"])),
        "budget of a run": f"{n:,} decisions" if unit == "decisions" else f"that of {n:,} turns of {made['base']}",
        "training, all runs": duration(sum(a["seconds"] for a in arms)),
    }
    cells = "".join(f"<div><dt>{clean(k)}</dt><dd>{_breakable(v)}</dd></div>" for k, v in facts.items())
    return (
        f'<header><p class="eyebrow"><b>trimtab</b> comparison</p><h1>{headline}</h1>'
        f'{f"<ul class=findings>{listed}</ul>" if listed else ""}<dl class="facts">{cells}</dl>'
        f'<div class="command"><code>{clean(made["command"])}</code><button data-copy type="button">copy</button></div>'
        "</header>"
    )


def _strong(sentence: str, arm: str) -> str:
    """A conclusion as HTML: the arm strong, the interval weak."""
    text = re.sub(r"(\[-?[\d.,]+, -?[\d.,]+\])", r'<span style="white-space:nowrap">\1</span>', clean(sentence))
    return text.replace(clean(arm), f"<b>{clean(arm)}</b>", 1)


def _breakable(value: str) -> str:
    return "<wbr>".join(map(clean, re.split(r"(?<=[,(:/])", value)))


# -- effects -----------------------------------------------------------------------------------------------------


def _forest(made: Made) -> str:
    """The difference of each arm on the measure that decides, with its interval, on one scale around 0."""
    rows = [r for r in made["rows"] if r["metric"] == PRIMARY]
    if not rows:
        return ""
    share = all(r["share"] for r in rows)
    ends = [v for r in rows for v in (r["effect"], r["low"], r["high"], 0.0) if v is not None]
    reach = 1.1 * max(map(abs, ends)) or 1.0

    def x(value: float) -> float:
        return 190 + 190 * value / reach

    height = 26 * len(rows) + 12
    lines = [f'<line x1="{x(0)}" x2="{x(0)}" y1="0" y2="{height}" stroke="var(--plot-muted)"/>']
    for i, row in enumerate(rows):
        y, colour = 18 + 26 * i, f"var(--plot-{CYCLE[(_index(made, row['arms'][1])) % len(CYCLE)]})"
        if row["low"] is not None and row["high"] is not None:
            lines.append(
                f'<line x1="{x(row["low"]):.1f}" x2="{x(row["high"]):.1f}" y1="{y}" y2="{y}" stroke="{colour}" '
                'stroke-width="9" opacity=".3"/>'
            )
        lines.append(f'<circle cx="{x(row["effect"]):.1f}" cy="{y}" r="6" fill="{colour}"/>')
        lines.append(
            f'<text x="400" y="{y + 4}"><tspan class="v">{clean(row["arms"][1])}</tspan> {clean(effect_of(row))}</text>'
        )
    unit = "points" if share else "units of the reward"
    lines.append(f'<text x="184" y="{height + 16}" text-anchor="end">worse</text>')
    lines.append(f'<text x="196" y="{height + 16}">better than {clean(made["base"])}, {unit}</text>')
    lead = f"{_DECIDES}: the difference from {made['base']}, paired by seed, with its 95% interval."
    return (
        f'<p class="lead">{clean(lead)}</p><svg class="range" viewBox="0 0 760 {height + 22}" role="img" '
        f'aria-label="differences with their intervals">{"".join(lines)}</svg>'
    )


def _index(made: Made, arm: str) -> int:
    return [a["arm"] for a in made["arms"]].index(arm)


# -- curves ------------------------------------------------------------------------------------------------------

_PANELS: tuple[tuple[str, str, str, Callable[[Mapping[str, Any]], float | None]], ...] = (
    ("Entropy", "nats per decision", "", lambda r: look_up(r, "entropy")),
    ("Clip rate", "% of decisions", "Decisions whose gradient the bound removed.", lambda r: look_up(r, "clip")),
    ("Gradient norm", "norm before clipping", "", lambda r: look_up(r, "grad_norm")),
    ("Dead groups", "% of groups", "Groups with one reward for all: they teach nothing.", dead_share),
    ("Response length", "decisions", "", lambda r: look_up(r, "length")),
)


def _curves(made: Made, folders: Mapping[str, Sequence[RunFolder]], held_out: bytes, words: Words) -> str:
    history = {arm: [f.metrics() for f in mine] for arm, mine in folders.items()}
    large = [(held_out, "Thick: the mean over seeds. Thin: each seed.")]
    rewards = _series(history, lambda r: look_up(r, "reward"))
    if rewards:
        picture = overlay(
            rewards, title=f"{words.reward.capitalize()} while training", x_label=_X, theme="page", name="reward",
            smoothed=True, seeds=False, y_label=f"mean {words.reward}", share=None if words.shares else False,
        )  # fmt: skip
        large.append((picture, "The mean over seeds, smoothed, while it trains."))
    small = []
    for i, (title, unit, hint, read) in enumerate(_PANELS):
        if series := _series(history, read):
            named = title.replace("Response", words.response)
            picture = overlay(
                series, title=named, x_label="decisions", y_label=unit, theme="page", name=f"panel{i}", size=SMALL,
                smoothed=True, seeds=False, whole=False, labels=False,
            )  # fmt: skip
            small.append((picture, hint))
    return f"{_key(made)}{_plots(large, 'large')}{_plots(small, 'small')}"


def _series(
    history: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], read: Callable[[Mapping[str, Any]], float | None]
) -> dict[str, list[Curve]]:
    """The curves of one number against decisions, of the arms that recorded it."""
    made: dict[str, list[Curve]] = {}
    for arm, seeds in history.items():
        records = [
            [{"decisions": r["decisions"], "y": y} for r in rows if (y := read(r)) is not None] for rows in seeds
        ]
        made[arm] = [curve(rows, "y", "decisions") for rows in records if rows]
    return {arm: curves for arm, curves in made.items() if curves}


def _key(made: Made) -> str:
    marks = "".join(
        f'<span style="color:var(--plot-{CYCLE[i % len(CYCLE)]});font-weight:650;margin-right:1.2em">&#9632; '
        f"{clean(a['arm'])}</span>"
        for i, a in enumerate(made["arms"])
    )
    return f"<p>{marks}</p>"


def _plots(pictures: Sequence[tuple[bytes, str]], size: str) -> str:
    figures = "".join(
        f"<figure>{svg.decode()}{f'<figcaption>{clean(hint)}</figcaption>' if hint else ''}</figure>"
        for svg, hint in pictures
    )
    return f'<div class="plots {size}">{figures}</div>' if figures else ""


# -- tables ------------------------------------------------------------------------------------------------------


def _measures(made: Made) -> str:
    """Each arm by itself, then every measure of every arm against the base."""
    arms = made["arms"]
    alone = [
        [METRICS[m], *(mean_of(a["metrics"][m]) if m in a["metrics"] else "not measured" for a in arms)]
        for m in METRICS
        if any(m in a["metrics"] for a in arms)
    ]
    alone.append(["seeds", *(f"{a['seeds']} of {a['of']}" for a in arms)])
    alone += [[key, *(f"{a[key]:,}" for a in arms)] for key in ("decisions", "updates")]
    alone.append(["training time", *(duration(a["seconds"]) for a in arms)])
    heads = ["", *(a["arm"] for a in arms)]
    paired = [
        [
            r["arms"][1],
            r["label"],
            effect_of(r),
            said(r["detectable"], r["share"]) if r["detectable"] is not None else "unknown",
            f"{len(r['seeds'])} of {r['of']}",
        ]
        for r in made["rows"]
    ]
    more = ["arm", "measure", f"difference from {made['base']}", "smallest likely to be shown", "seeds paired"]
    lead = "<p class=lead>{}</p>"
    return (
        lead.format("Each arm by itself: the mean over its seeds and its 95% interval; counts are sums over seeds.")
        + _table(heads, alone)
        + lead.format("<br>Against the first, paired by seed: the mean difference and its 95% interval.")
        + _table(more, paired)
    )


def _reliable(made: Made) -> str:
    """Interquartile means and chances to beat the base; nothing where scores are no returns."""
    if not made.get("reliable", []):
        return ""
    lead = (
        f"{_DECIDES}, over seeds. The interquartile mean leaves out the lowest and the highest quarter; the chance is "
        f"that of one run to end above one of {made['base']} (50% is no difference). 95% bootstrap intervals over "
        "seeds, after Agarwal et al. 2021; they too are rough with few seeds."
    )
    return f'<p class="lead">{clean(lead)}</p>' + _table(reliable.HEADS, reliable.rows(made.get("reliable", [])))


def _by_seed(made: Made) -> str:
    runs = {(r["arm"], r["seed"]): r for r in made["runs"]}
    share = all(r["share"] for r in made["rows"] if r["metric"] == PRIMARY)
    rows = []
    for seed in made["seeds"]:
        cells = [f"{seed}"]
        for arm in made["arms"]:
            run = runs[arm["arm"], seed]
            value = run["values"].get(PRIMARY)
            spent = f"{run['decisions']:,} decisions, {duration(run['seconds'])}"
            cells.append(run["state"] if value is None else f"{said(value, share)}{'%' if share else ''} ({spent})")
        rows.append(cells)
    lead = f"{_DECIDES}, and what the run used."
    return f'<p class="lead">{lead}</p>' + _table(["seed", *(a["arm"] for a in made["arms"])], rows)


def _differences(made: Made) -> str:
    parts = []
    for arm, rows in made["differences"].items():
        table = _table(
            ["address", made["base"], arm], [[r["address"], r["base"] or "-", r["arm"] or "-"] for r in rows]
        )
        parts.append(table)
    lead = "Everything that is not in these tables is the same in both, seeds and order of the problems included."
    return f'<p class="lead">{lead}</p>' + "<br>".join(parts)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{clean(h)}</th>" for h in heads)
    body = "".join(f"<tr>{''.join(f'<td>{clean(c)}</td>' for c in row)}</tr>" for row in rows)
    return f'<div class="box scroll"><table><tr>{head}</tr>{body}</table></div>'


# -- words -------------------------------------------------------------------------------------------------------


def _guide(made: Made) -> str:
    entries = (
        (
            "Paired by seed",
            "A seed fixes the start of the policy, the order of the problems and the noise of sampling and of "
            f"evaluation under every arm. What is averaged is the difference from {made['base']} at each seed, so that "
            "luck which both arms share cancels.",
        ),
        (
            "The interval",
            "Student's t over seeds, 95%. It holds for new seeds on these held-out problems; all runs share the "
            "problems, so more seeds do not make more problems.",
        ),
        (
            "No difference shown",
            "Not the same as no difference. The smallest likely to be shown is the true difference that so many seeds "
            "of this spread would find 8 times in 10.",
        ),
        (
            "The same budget",
            f"Every arm makes as many decisions as {made['base']} at that seed, and stops after the turn that reaches "
            "them. Seconds and updates may differ: see the tables."
            if "decisions" not in made["budget"]
            else "Every arm stops after the turn that reaches the budget of decisions. Seconds and updates may differ.",
        ),
        (
            "The measures",
            '"Last three" decides: the mean of the last three evaluations, greedy answers; one evaluation is noisier '
            '("last one"). "Sampled" is the same of answers drawn at temperature 1, "all training" the mean under '
            'the held-out curve, "training reward, end" that of the last tenth of the turns.',
        ),
        (
            "Few seeds",
            "With one seed nothing is known about chance. With two to four the interval is wide, and right only if the "
            "differences are spread like a normal distribution.",
        ),
    )
    cells = "".join(f"<div><dt>{clean(term)}</dt><dd>{clean(text)}</dd></div>" for term, text in entries)
    return f'<div class="box"><dl class="guide">{cells}</dl></div>'


def _foot(made: Made) -> str:
    named = ", ".join(f"{k} {v}" for k, v in made["versions"].items())
    made_from = f"Made by trimtab from {count(len(made['runs']), 'run folder')}"
    return f"<footer>{made_from}. {clean(named)}. {clean(made['machine'])}.</footer>"
