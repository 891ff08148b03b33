"""Several runs in one picture: the mean of each arm over its seeds, and every seed as a thin line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from trimtab.core.errors import TrimtabError
from trimtab.report.folder import RunFolder
from trimtab.report.keys import flat
from trimtab.report.plots import LARGE, smooth
from trimtab.report.style import CYCLE, Format, Theme, render, styled, tidy
from trimtab.report.words import is_number

Curve = tuple[np.ndarray, np.ndarray]
_GRID = 400


class CompareError(TrimtabError):
    """Runs cannot be drawn together."""


def curve(run: str | Path | RunFolder | Sequence[Mapping[str, Any]], y: str = "reward", x: str = "turn") -> Curve:
    """One run's `y` against `x`: two float arrays, in order, records without either left out.

    run: a run folder, or records. y: a key of `metrics.jsonl` (nested keys joined by `/`), or `held-out` for the mean
    of `eval.jsonl`. x: a clock key (`turn, updates, decisions, rows, seconds`).
    Raises `CompareError` when no record has both.
    """
    key = "mean" if y == "held-out" else y
    records: Sequence[Mapping[str, Any]]
    if isinstance(run, str | Path | RunFolder):
        folder = run if isinstance(run, RunFolder) else RunFolder(run)
        records = folder.evaluations() if y == "held-out" else folder.metrics()
        name = str(folder.path)
    else:
        records, name = run, "this run"
    pairs = [(r[x], flat(r)[key]) for r in records if is_number(r.get(x)) and key in flat(r)]
    if not pairs:
        raise CompareError(f"{name} has no record with both {x!r} and {y!r}; nothing can be drawn")
    points = np.array(sorted(pairs), dtype=float)
    return points[:, 0], points[:, 1]


def overlay(
    arms: Mapping[str, Sequence[Curve]],
    *,
    title: str,
    x_label: str = "turn",
    y_label: str = "mean reward",
    share: bool | None = None,
    smoothed: bool = False,
    seeds: bool = True,
    labels: bool = True,
    whole: bool = True,
    fmt: Format = "svg",
    theme: Theme = "light",
    size: tuple[float, float] = LARGE,
    name: str = "overlay",
) -> bytes:
    """Arms (at most 6, each a list of `curve`s, one a seed) as mean lines over thin lines, named at their right end.

    The mean is taken by linear interpolation where *all* seeds of the arm have values, so it ends with the shortest.
    share: show percent; by default where every value is in [0, 1]. smoothed: smooth the mean (not the seeds).
    seeds, labels: draw the thin lines, and the names. whole: show 0 to 100% in full. name: see `style.render`.
    Raises `CompareError` for no arms, more than 6, or an arm without curves.
    """
    empty = [name for name, curves in arms.items() if not curves]
    if not arms or len(arms) > len(CYCLE) or empty:
        given = f"{len(arms)} arms" + (f", {empty[0]!r} without a curve" if empty else "")
        raise CompareError(f"overlay got {given}; give 1 to {len(CYCLE)} arms with at least one curve each")
    values = np.concatenate([y for curves in arms.values() for _, y in curves])
    percent = bool(values.min() >= 0 and values.max() <= 1) if share is None else share
    with styled(theme) as colours:
        figure = Figure(figsize=size, layout="constrained")
        ax = figure.subplots()
        ends: list[tuple[float, str, str]] = []
        means: list[np.ndarray] = []
        for (arm, curves), key in zip(arms.items(), CYCLE):
            colour = colours[key]
            if len(curves) > 1 and seeds:
                for x, y in curves:
                    ax.plot(x, y, color=colour, lw=0.8, alpha=0.38)
            x, y = mean_curve(curves)
            means.append(smooth(y) if smoothed else y)
            ax.plot(x, means[-1], color=colour, lw=2.3, marker="o" if len(x) == 1 else None)
            ends.append((float(y[-1]), arm, colour))
        if percent:
            top = 1.0 if whole else min(1.0, max(0.01, 1.15 * max(y.max() for y in means)))
            ax.set_ylim(-0.015 * top, 1.015 * top)
            ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.{0 if top > 0.04 else 1}f}%"))
        ax.margins(x=0.01)
        for (_, arm, colour), place in zip(
            ends if labels else [], _spread([e[0] for e in ends], ax.get_ylim(), size[1])
        ):
            ax.annotate(
                arm, (1.015, place), xycoords=("axes fraction", "data"), color=colour, fontweight="bold", va="center",
                fontsize=8.5, annotation_clip=False,
            )  # fmt: skip
        tidy(ax, x_label, y_label, title)
        return render(figure, fmt, theme, name)


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean over seeds, on their own points if they share them, else interpolated on the span common to all.

    Seeds without a common span, as after a turn or two, give one point: the mean of their ends.
    """
    first = curves[0][0]
    if all(len(x) == len(first) and np.array_equal(x, first) for x, _ in curves):
        return first, np.mean([y for _, y in curves], axis=0)
    start, stop = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    if start > stop:
        return np.array([np.mean([x[-1] for x, _ in curves])]), np.array([np.mean([y[-1] for _, y in curves])])
    grid = np.linspace(start, stop, _GRID)
    return grid, np.mean([np.interp(grid, x, y) for x, y in curves], axis=0)


def _spread(places: list[float], limits: tuple[float, float], height: float) -> list[float]:
    """Move labels apart, so that neighbours are at least a line of text from each other, order kept."""
    gap = (limits[1] - limits[0]) * 0.2 / height
    order = sorted(range(len(places)), key=lambda i: places[i])
    out = list(places)
    for before, after in pairwise(order):
        out[after] = max(out[after], out[before] + gap)
    excess = max([out[i] for i in order], default=0.0) - limits[1]
    if excess > 0:  # pushed out at the top: let the stack slide down
        for place, i in enumerate(reversed(order)):
            out[i] = min(out[i], limits[1] - place * gap)
    return out
