"""Pictures of how sparse an update is: layer by layer, in bfloat16 and in float32, and what two updates share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from trimtab.report.records import to_json, write_atomic
from trimtab.report.style import Format, Theme, render, styled, tidy

SIZE = (9.6, 3.4)
Made = Mapping[str, Any]


def write_sparsity(out: str | Path, made: Made) -> list[Path]:
    """`sparsity.json`, and the picture as svg and png in light and dark; returns the paths."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "sparsity.json"
    write_atomic(path, to_json(made, indent=1) + "\n")
    paths = [path]
    kinds: list[Format] = ["svg", "png"]
    themes: list[Theme] = ["light", "dark"]
    for kind in kinds:
        for theme in themes:
            paths.append(out / f"sparsity-{theme}.{kind}")
            paths[-1].write_bytes(sparsity_figure(made, kind, theme))
    return paths


def sparsity_figure(made: Made, fmt: Format = "svg", theme: Theme = "light") -> bytes:
    """Left: the share of weights unchanged, by layer. Right: the overlap of two updates, or how one came about.

    made: what `runs.sparsity.compare` returns. The right side is the course over checkpoints where there are several,
    else the kinds of matrices.
    """
    with styled(theme) as colours:
        figure = Figure(figsize=SIZE, layout="constrained")
        left, right = figure.subplots(1, 2)
        _layers(left, made, colours)
        if "overlap" in made:
            _shared(right, made, colours)
        elif "course" in made["updates"][0]:
            _course(right, made["updates"][0]["course"], made["dtype"], colours)
        else:
            _kinds(right, made["updates"][0]["tensors"], colours)
        return render(figure, fmt, theme, "sparsity")


def _layers(ax: Axes, made: Made, colours: Mapping[str, str]) -> None:
    """One line an update: as stored, and (pale, dashed) any change in float32."""
    for i, update in enumerate(made["updates"]):
        counts, colour = list(update["layers"].values()), colours[f"c{i}"]
        name = "" if len(made["updates"]) == 1 else f"{_short(update['update'])}, "
        places = range(len(counts))
        ax.plot(places, [c["sparsity"] for c in counts], "o-", ms=3.6, mew=0, color=colour,
                label=f"{name}{made['dtype']}, within {made['tol']:g}")  # fmt: skip
        ax.plot(places, [c["unchanged_float32"] for c in counts], "o--", ms=2.6, mew=0, lw=1.1, color=colour,
                alpha=0.6, label=f"{name}float32, no change at all")  # fmt: skip
    _names_below(ax, list(made["updates"][0]["layers"]))
    _shares(ax)
    ax.legend(loc="best")
    tidy(ax, "", "weights unchanged", "Unchanged weights, by layer")


def _shared(ax: Axes, made: Made, colours: Mapping[str, str]) -> None:
    """What each update shares with the other, by layer, against what chance would give."""
    for i, update in enumerate(made["updates"]):
        values = [layer[f"o{i + 1}"] for layer in made["layers"].values()]
        chance = [layer[f"chance_o{i + 1}"] for layer in made["layers"].values()]
        ax.plot(range(len(values)), values, "o-", ms=3.6, mew=0, color=colours[f"c{i}"],
                label=f"of {_short(update['update'])}")  # fmt: skip
        ax.plot(range(len(chance)), chance, ls=":", lw=1.3, color=colours[f"c{i}"], label="by chance")
    _names_below(ax, list(made["layers"]))
    _shares(ax)
    ax.legend(loc="best")
    tidy(ax, "", "changed by the other one too", "Overlap of the changed weights")


def _course(ax: Axes, course: Sequence[Mapping[str, float]], dtype: str, colours: Mapping[str, str]) -> None:
    turns = [c["turn"] for c in course]
    ax.plot(turns, [c["sparsity"] for c in course], "o-", ms=3.6, mew=0, color=colours["c0"], label=dtype)
    ax.plot(turns, [c["unchanged_float32"] for c in course], "o--", ms=2.6, mew=0, lw=1.1, color=colours["c0"],
            alpha=0.6, label="float32, no change at all")  # fmt: skip
    _shares(ax)
    ax.legend(loc="best")
    tidy(ax, "turn", "weights unchanged", "Unchanged since the start")


def _kinds(ax: Axes, tensors: Mapping[str, Mapping[str, Any]], colours: Mapping[str, str]) -> None:
    """Tensors of one name together (`q_proj.weight` of all layers), larger ones counting for more."""
    kinds: dict[str, list[float]] = {}
    for name, c in tensors.items():
        sums = kinds.setdefault(".".join(name.rpartition("/")[2].split(".")[-2:]), [0.0, 0.0])
        sums[0] += c["sparsity"] * c["weights"]
        sums[1] += c["weights"]
    names = list(kinds)[::-1]
    ax.barh(range(len(names)), [kinds[n][0] / kinds[n][1] for n in names], height=0.62, color=colours["c0"])
    ax.set_yticks(range(len(names)), names)
    ax.set_xlim(0, 1)
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.grid(False)
    ax.set_title("By kind of matrix")
    ax.set_xlabel("weights unchanged")


def _shares(ax: Axes) -> None:
    ax.set_ylim(-0.03, 1.03)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _names_below(ax: Axes, layers: Sequence[str]) -> None:
    """At most about a dozen layers are named."""
    step = max(1, math.ceil(len(layers) / 12))
    places = list(range(0, len(layers), step))
    ax.set_xticks(places, [short_layer(layers[i]) for i in places], rotation=40, ha="right", rotation_mode="anchor")


def short_layer(name: str) -> str:
    """The last word of a layer's name, with the one before it where that is a number: `embed_tokens`, `layers.3`."""
    words = name.rpartition("/")[2].split(".")
    return ".".join(words[-2:]) if words[-1].isdecimal() else words[-1]


def _short(name: str) -> str:
    return Path(name).name if "->" not in name else name
