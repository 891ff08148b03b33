"""What `trimtab claim` does: measure, keep, and say it in a table."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.claims import claims, find_claim
from trimtab.claims.core import measure, write
from trimtab.claims.statistics import ClaimError

COLOURS = {"holds": "green", "does not hold": "red", "inconclusive": "yellow"}


def measured(
    name: str, *, every: bool = False, full: bool = False, seeds: int | None = None, out: str = "", quiet: bool = False
) -> list[dict[str, Any]]:
    """The rows of one claim, or of every one; progress goes to stderr unless `quiet`. out: see `write`.

    Raises `ClaimError` for an unknown name, or neither or both of a name and `every`.
    """
    if bool(name) == every:
        raise ClaimError(f"name one claim, or ask for --all. There are claims of: {', '.join(claims())}.")
    rows: list[dict[str, Any]] = []
    for claim in [find_claim(n) for n in (claims() if every else [name])]:

        def say(line: str, method: str = claim.method) -> None:
            if not quiet:
                print(f"{method}: {line}", file=sys.stderr, flush=True)

        made = measure(claim, seeds=seeds, full=full, say=say)
        if out:
            say(f"written to {write(made, Path(out))}")
        rows += made
    return rows


def shown(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows, one table a method: each sentence with its verdict, effect and arms."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for method in dict.fromkeys(r["method"] for r in rows):
        mine = [r for r in rows if r["method"] == method]
        console.print(Text(f"{method}, {mine[0]['scope']}: {mine[0]['statement']}", style="bold"))
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column()
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for r in mine:
            table.add_row(r["part"], Text(r["verdict"], style=COLOURS[r["verdict"]]), Text(r["claim"]))
            table.add_row("", "", Text(_numbers(r), style="dim"))
        console.print(table)
        console.print()


def _numbers(r: Mapping[str, Any]) -> str:
    effect, asked, detectable = numbers(r)
    arms = ", ".join(f"{name} {a['mean']:.3g}" + (" (control)" if a["role"] == "control" else "")
                     for name, a in r["arms"].items())  # fmt: skip
    return f"{effect}, asked: {asked}; detectable: {detectable} ({r['interval']})\n{r['metric']}: {arms}"


def numbers(r: Mapping[str, Any]) -> tuple[str, str, str]:
    """(effect with its interval, what was asked, what could have been detected) of a row, in words."""
    low, high = r["region"]
    asked = f"below {high:g}" if low is None else f"above {low:g}" if high is None else f"{low:g} to {high:g}"
    ratio = " / " in r["effect_is"]
    detectable = f"a ratio of {r['detectable']:.3g}" if ratio else f"{r['detectable']:.2g}"
    return f"{r['effect_is']}: {r['effect']:.3g} [{r['low']:.3g}, {r['high']:.3g}]", asked, detectable
