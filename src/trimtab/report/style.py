"""One look for every picture: colours for light and dark, matplotlib settings, SVG that follows the page."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Theme = Literal["light", "dark", "page"]
Format = Literal["svg", "png"]

# Blue and orange stay apart for every common colour blindness; red and green never carry meaning alone.
LIGHT = {
    "paper": "#fefefd",
    "ink": "#1b2529",
    "muted": "#64737b",
    "grid": "#e3e8ea",
    "c0": "#0d6e93",
    "c1": "#cf5f1f",
    "c2": "#7458b3",
    "c3": "#4a8539",
    "c4": "#b43f6a",
    "c5": "#94720a",
}
DARK = {
    "paper": "#161d21",
    "ink": "#e4eaec",
    "muted": "#93a3ab",
    "grid": "#29343a",
    "c0": "#52b7d8",
    "c1": "#f2935a",
    "c2": "#b39ce8",
    "c3": "#8fc77c",
    "c4": "#ea86aa",
    "c5": "#d6b74e",
}
CYCLE = ("c0", "c1", "c2", "c3", "c4", "c5")


def palette(theme: Theme) -> dict[str, str]:
    """Colour names to hex; `page` draws in light colours, which `render` turns into CSS variables."""
    return DARK if theme == "dark" else LIGHT


@contextmanager
def styled(theme: Theme) -> Iterator[dict[str, str]]:
    """Matplotlib settings for figures made and drawn inside; yields the palette."""
    colours = palette(theme)
    settings: dict[Any, Any] = {
        "font.family": "sans-serif",
        "font.size": 9.0,
        "axes.titlesize": 10.0,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 9.0,
        "axes.labelsize": 8.5,
        "axes.labelcolor": colours["muted"],
        "axes.titlecolor": colours["ink"],
        "axes.edgecolor": colours["muted"],
        "axes.linewidth": 0.7,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "axes.formatter.useoffset": False,
        "grid.color": colours["grid"],
        "grid.linewidth": 0.8,
        "xtick.color": colours["muted"],
        "ytick.color": colours["muted"],
        "xtick.labelsize": 8.0,
        "ytick.labelsize": 8.0,
        "xtick.major.size": 3.0,
        "xtick.major.width": 0.7,
        "ytick.major.size": 0.0,
        "lines.linewidth": 1.9,
        "lines.solid_capstyle": "round",
        "lines.solid_joinstyle": "round",
        "legend.frameon": False,
        "legend.fontsize": 8.0,
        "legend.labelcolor": colours["ink"],
        "legend.handlelength": 1.4,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "text.color": colours["ink"],
        "text.parse_math": False,  # a `$` in a key or a title is a `$`
        "svg.fonttype": "none" if theme == "page" else "path",
    }
    with matplotlib.rc_context(settings):
        yield colours


def render(figure: Figure, fmt: Format, theme: Theme, name: str) -> bytes:
    """The figure as SVG or PNG bytes, the same bytes for the same figure.

    theme `page`: a bare `<svg>` whose colours are CSS variables `--plot-<name>` (light values as fallback), so that
    one picture serves light and dark. name: makes element ids unique among the pictures of a page.
    """
    buffer = io.BytesIO()
    if fmt == "png":
        FigureCanvasAgg(figure)
        figure.savefig(buffer, format="png", dpi=200, facecolor=palette(theme)["paper"], metadata={"Software": None})
        return buffer.getvalue()
    face = "none" if theme == "page" else palette(theme)["paper"]
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", facecolor=face, metadata={"Date": None, "Creator": None})
    if theme != "page":
        return buffer.getvalue()
    return _for_page(buffer.getvalue().decode(), name).encode()


def _for_page(svg: str, name: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Size comes from the page; `figure_1`, `axes_1`, ... are the same in every figure, and nobody refers to them.
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    variables = {value: f"var(--plot-{key}, {value})" for key, value in LIGHT.items()}
    return re.sub("|".join(variables), lambda m: variables[m.group()], svg)


def tidy(ax: Axes, x_label: str, y_label: str, title: str) -> None:
    """Title, axis names, few ticks."""
    ax.set_title(title)
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    if ax.get_xscale() == "linear":
        ax.locator_params(axis="x", nbins=6)
    if ax.get_yscale() == "linear":
        ax.locator_params(axis="y", nbins=5)
