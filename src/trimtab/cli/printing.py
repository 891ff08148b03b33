"""How commands print what came of them."""

from __future__ import annotations

from typing import Any


def outcome(made: dict[str, Any], as_json: bool) -> int:
    """Say what came of a run: one JSON object, or sentences."""
    from trimtab.report.records import to_json
    from trimtab.report.words import interval, is_number, number

    if as_json:
        print(to_json(made))
        return 0
    before, after = made["eval"]["before"], made["eval"]["after"]

    def said(e: dict[str, Any]) -> str:
        if not e:
            return "not measured"
        if "unit" in e:
            return f"{number(e['mean'])} {interval(e['low'], e['high'])} over {e['n']} episodes"
        known = is_number(e["low"]) and is_number(e["high"])  # one problem has no spread
        ends = f" [{e['low']:.1%}, {e['high']:.1%}]" if known else ""
        return f"{e['mean']:.1%}{ends} of {e['n']}"

    title = before.get("unit", "held-out")
    print(f"{title}: {said(before)} before, {said(after)} after, {made['seconds']:.0f} s")
    asked = after.get("pass_at", {})
    if asked:

        def cell(e: dict[str, Any], k: str) -> str:
            return said({**e["pass_at"][k], "n": e["n"]}) if k in e.get("pass_at", {}) else "not measured"

        table("held-out", ["", "before", "after"], [[f"pass@{k}", cell(before, k), cell(after, k)] for k in asked])
    if not made.get("finished", True):
        print(f"stopped after turn {made['turns']}; go on with: trimtab resume {made['run']}")
    if "report" in made:
        print(f"report: {made['report']}")
    return 0


def plain(*parts: str) -> str:
    """Text as part of a file name."""
    return "".join(c if c.isalnum() or c in "._-+" else "-" for c in "-".join(parts))


def table(title: str, heads: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for head in heads:
        drawn.add_column(head, overflow="fold")
    for row in rows:
        drawn.add_row(*[Text(str(cell)) for cell in row])
    Console().print(drawn)
