"""Pictures of one run. Each function returns bytes; nothing touches pyplot or a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from trimtab.report.keys import Panel, arrange, column, look_up
from trimtab.report.style import CYCLE, Format, Theme, render, styled, tidy
from trimtab.report.words import LANGUAGE, Words, is_number, number

Records = Sequence[Mapping[str, Any]]
LARGE = (5.6, 3.0)
SMALL = (3.5, 2.2)
# Beyond this a curve has more points than pixels; buckets are drawn by their mean.
_POINTS = 600


def smooth(y: np.ndarray, width: int | None = None) -> np.ndarray:
    """A centred Gaussian mean over neighbouring points, `[n] -> [n]`; gaps (nan) stay out of it, and stay gaps.

    width: standard deviation in points; by default a thirtieth of the length, at least 1.
    """
    n = len(y)
    if n == 0:
        return y
    sigma = max(1.0, n / 30) if width is None else float(width)
    reach = min(n - 1, int(np.ceil(3 * sigma)))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    known = np.isfinite(y)
    total = np.convolve(np.where(known, y, 0.0), kernel)[reach : reach + n]
    weight = np.convolve(known.astype(float), kernel)[reach : reach + n]
    return np.where(known, total / np.maximum(weight, 1e-300), np.nan)


def reward_figure(history: Records, fmt: Format = "svg", theme: Theme = "light", words: Words = LANGUAGE) -> bytes:
    """Mean reward of the rows of each turn (dots, pale), its interval (band), and a smoothed line.

    The band is `reward_low .. reward_high` as recorded: of each turn by itself, not of the smoothed line. words: of the
    world of the run; in control it is the mean return of the episodes that ended in each turn.
    """
    x, x_label = _turns(history)
    y = _known(history, "reward")
    low, high = _key(history, "reward_low"), _key(history, "reward_high")
    with styled(theme) as colours:
        figure, ax = _one(LARGE)
        if np.isfinite(y).any():
            known = np.isfinite(y)  # where few turns have one, as where episodes end now and then, a line joins those
            xs, ys, lows, highs = _thin(x[known], y[known], low[known], high[known])
            band = np.isfinite(lows) & np.isfinite(highs)
            if band.any():
                ax.fill_between(
                    xs, lows, highs, where=band, color=colours["c0"], alpha=0.16, lw=0, label="95% interval, each turn"
                )
            dots = "o" if len(xs) <= 120 else ""
            ax.plot(
                xs, ys, marker=dots, ls="" if dots else "-", ms=2.6, lw=0.8, mew=0, color=colours["c0"], alpha=0.5,
                label="each turn",
            )  # fmt: skip
            if len(xs) >= 8:
                ax.plot(xs, smooth(ys), color=colours["c0"], lw=2.2, label="smoothed")
            if words.shares:
                _share_axis(ax, np.concatenate([y, low, high]))
            _legend(ax)
        else:
            _nothing(ax, f"no turn has recorded a {words.reward} yet")
        tidy(ax, x_label, f"mean {words.reward}", f"{words.reward.capitalize()} while training")
        return render(figure, fmt, theme, "reward")


def eval_figure(
    evaluations: Records,
    fmt: Format = "svg",
    theme: Theme = "light",
    name: str = "reward",
    words: Words = LANGUAGE,
) -> bytes:
    """Held-out evaluation with its interval, against turns (left) and against training time (right).

    name: what is averaged, on the axis (`accuracy`, `mean reward`).
    """
    y, low, high = (_key(evaluations, k) for k in ("mean", "low", "high"))
    seconds = _key(evaluations, "seconds")
    timed = bool((np.isfinite(seconds) & np.isfinite(y)).any())
    with styled(theme) as colours:
        figure = Figure(figsize=LARGE)
        axes = figure.subplots(1, 2, sharey=True) if timed else [figure.subplots()]
        _margins(figure)
        unit, scale = _time_unit(seconds)
        views = [(_key(evaluations, "turn"), "turn"), (seconds / scale, f"training time ({unit})")]
        for ax, (x, x_label), title in zip(axes, views, (f"Held-out {words.problem}s", "")):
            if np.isfinite(y).any():
                _points_with_interval(ax, x, y, low, high, colours["c1"])
                if words.shares:
                    _share_axis(ax, np.concatenate([y, low, high]))
            else:
                _nothing(ax, "no evaluation yet")
            tidy(ax, x_label, name if title else "", title)
            if x_label == "turn":
                ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        return render(figure, fmt, theme, "eval")


def _points_with_interval(
    ax: Axes, x: np.ndarray, y: np.ndarray, low: np.ndarray, high: np.ndarray, colour: str
) -> None:
    known = np.isfinite(low) & np.isfinite(high) & np.isfinite(x)
    if known.sum() > 1:
        ax.fill_between(x, low, high, where=known, color=colour, alpha=0.14, lw=0)
    ax.vlines(x[known], low[known], high[known], color=colour, lw=1.1, alpha=0.7)
    ax.plot(x, y, "-o", color=colour, ms=4.2, mew=0, lw=1.9)


def panel_figures(
    history: Records, fmt: Format = "svg", theme: Theme = "light", words: Words = LANGUAGE
) -> list[tuple[Panel, bytes]]:
    """One small picture for each panel of `keys.arrange`: every numeric key but the reward appears in exactly one."""
    x, x_label = _turns(history)
    out = []
    for index, (panel, keys) in enumerate(arrange(history)):
        with styled(theme) as colours:
            figure, ax = _one(SMALL)
            _panel(ax, history, panel, keys, x, colours)
            tidy(ax, x_label, panel.unit, panel.title.replace("Response", words.response))
            out.append((panel, render(figure, fmt, theme, f"panel{index}")))
    return out


def _panel(
    ax: Axes, history: Records, panel: Panel, keys: list[tuple[str, str]], x: np.ndarray, colours: dict[str, str]
) -> None:
    columns = {key: _drawable(np.array(column(history, key))) for key, _ in keys[: len(CYCLE)]}
    values = np.concatenate(list(columns.values()))
    values = values[np.isfinite(values)]
    if len(values) == 0:
        _nothing(ax, "no finite value yet")
        return
    logs = panel.log and values.min() > 0 and values.max() > 30 * values.min()
    for (key, label), colour in zip(keys, CYCLE):
        xs, ys = _thin(x, columns[key])
        many = len(xs) >= 40
        alone = not (np.isfinite(ys[1:]) & np.isfinite(ys[:-1])).any()  # measured now and then: no line joins them
        ax.plot(
            xs, ys, marker="o" if alone else "", ms=3.5, color=colours[colour],
            lw=0.8 if many else 1.5, alpha=0.35 if many else 1, label=None if many else label,
        )  # fmt: skip
        if many:  # on the scale it is drawn on, so that one peak does not lift its neighbours
            line = np.exp(smooth(np.log(ys))) if logs else smooth(ys)
            ax.plot(xs, line, color=colours[colour], lw=1.8, label=label)
    if any(label for _, label in keys):
        _legend(ax)
    if panel.share and values.min() >= 0 and values.max() <= 1:
        _share_axis(ax, values, whole=False)
    else:
        _plain_axis(ax, values, logs)


def _plain_axis(ax: Axes, values: np.ndarray, logs: bool) -> None:
    if logs:
        ax.set_yscale("log")
        ax.yaxis.set_minor_formatter(NullFormatter())
    elif values.min() >= 0 and values.min() < 0.5 * values.max():
        ax.set_ylim(0, 1.08 * values.max())
    elif values.min() == values.max():
        pad = abs(values[0])
        ax.set_ylim(values[0] - pad, values[0] + pad or 1.0)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: _tick(v)))


def _tick(value: float) -> str:
    """A number of at most six characters where that is possible: the margin holds no more."""
    said = number(value)
    if len(said) <= 6:
        return said
    digits, power = f"{value:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(power)}"


# -- shared ---------------------------------------------------------------------------------------------------------
def _one(size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size)
    ax = figure.subplots()
    _margins(figure)
    return figure, ax


def _margins(figure: Figure) -> None:
    """The same inches around every picture: plots line up in a grid, and drawing takes half the time of a solver."""
    width, height = figure.get_size_inches()
    figure.subplots_adjust(0.62 / width, 0.45 / height, 1 - 0.08 / width, 1 - 0.29 / height, wspace=0.06)


def _legend(ax: Axes) -> None:
    if ax.get_legend_handles_labels()[1]:
        ax.legend(loc="best", handletextpad=0.5, borderaxespad=0.2, labelspacing=0.25)


def _nothing(ax: Axes, text: str) -> None:
    ax.text(0.5, 0.5, text, ha="center", va="center", transform=ax.transAxes, style="italic", alpha=0.7)
    ax.set_xticks([])
    ax.set_yticks([])


def _share_axis(ax: Axes, values: np.ndarray, whole: bool = True) -> None:
    """Percent ticks where all values are in [0, 1]; `whole` shows 0..100% in full."""
    values = values[np.isfinite(values)]
    if len(values) == 0 or values.min() < 0 or values.max() > 1:
        return
    top = 1.0 if whole else min(1.0, max(1.15 * values.max(), 0.01))
    ax.set_ylim(-0.015 * top, 1.015 * top)
    digits = 0 if top > 0.04 else 1
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.{digits}f}%"))


def _turns(history: Records) -> tuple[np.ndarray, str]:
    if history and all(is_number(r.get("turn")) for r in history):
        return _drawable(np.array([float(r["turn"]) for r in history])), "turn"
    return np.arange(1, len(history) + 1, dtype=float), "record"


def _key(records: Records, key: str) -> np.ndarray:
    return _drawable(np.array([float(r[key]) if is_number(r.get(key)) else np.nan for r in records]))


def _known(history: Records, name: str) -> np.ndarray:
    values = [look_up(r, name) for r in history]
    return _drawable(np.array([np.nan if v is None else v for v in values], dtype=float))


def _drawable(values: np.ndarray) -> np.ndarray:
    # An axis reaches a little beyond its values; near the largest float that is infinite, and nothing can be drawn.
    return np.where(np.abs(values) < 1e300, values, np.nan)


def _time_unit(seconds: np.ndarray) -> tuple[str, float]:
    longest = np.nanmax(seconds) if np.isfinite(seconds).any() else 0.0
    return ("hours", 3600.0) if longest > 3 * 3600 else ("minutes", 60.0) if longest > 180 else ("seconds", 1.0)


def _thin(*columns: np.ndarray) -> tuple[np.ndarray, ...]:
    """Bucket long columns to at most `_POINTS` means; nan entries are left out of a bucket's mean."""
    n = len(columns[0])
    if n <= _POINTS:
        return columns
    bucket = np.arange(n) * _POINTS // n
    out = []
    for values in columns:
        known = np.isfinite(values)
        total = np.bincount(bucket, np.where(known, values, 0.0), _POINTS)
        share = np.bincount(bucket, known, _POINTS)
        out.append(np.where(share > 0, total / np.maximum(share, 1), np.nan))
    return tuple(out)
