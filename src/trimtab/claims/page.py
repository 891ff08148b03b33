"""The rows of a claim as a page of Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

TITLES = {
    "mechanism": "Mechanism, on the smallest problem",
    "full": "Effect on `tiny`, a language model of a million parameters",
}


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """One method's page: its statement, for each scope its sentences, numbers and arms, and the command."""
    first = rows[0]
    lines = [f"# {first['method']}", "", first["statement"]]
    for scope, title in TITLES.items():
        mine = [r for r in rows if r["scope"] == scope]
        if not mine:
            continue
        command = f"trimtab claim {first['method']}" + (" --full" if scope == "full" else "")
        seconds = sum(arm_seconds(mine).values())
        lines += ["", f"## {title}", "", "| | the claim | effect [95%] | asked | detectable | verdict |",
                  "|---|---|---|---|---|---|", *map(_sentence, mine), "", "| | metric | arms: mean ± std over seeds |",
                  "|---|---|---|", *_means(mine), "", "| arm | what it is |", "|---|---|",
                  *(f"| {name} | {what} |" for name, what in _arms(mine).items()), "",
                  f"`{command}`: {mine[0]['seeds']} seeds, {seconds:.0f} s on one thread; "
                  + ", ".join(f"{k} {v}" for k, v in mine[0]["versions"].items()) + "."]  # fmt: skip
    return "\n".join([*lines, ""])


def numbers(r: Mapping[str, Any]) -> tuple[str, str, str]:
    """(effect with its interval, what was asked, what could have been detected) of a row, in words."""
    low, high = r["region"]
    asked = f"below {high:g}" if low is None else f"above {low:g}" if high is None else f"{low:g} to {high:g}"
    ratio = " / " in r["effect_is"]
    detectable = f"a ratio of {r['detectable']:.3g}" if ratio else f"{r['detectable']:.2g}"
    return f"{r['effect_is']}: {r['effect']:.3g} [{r['low']:.3g}, {r['high']:.3g}]", asked, detectable


def arm_seconds(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """arm -> what measuring it took, over all seeds."""
    return {name: arm["seconds"] for r in rows for name, arm in r["arms"].items()}


def _sentence(r: Mapping[str, Any]) -> str:
    effect, asked, detectable = numbers(r)
    return f"| {r['part']} | {r['claim']} | {effect} | {asked} | {detectable} | **{r['verdict']}** |"


def _means(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line a metric: the sentences that read it, and every arm that they name."""
    lines = []
    for metric in dict.fromkeys(r["metric"] for r in rows):
        mine = [r for r in rows if r["metric"] == metric]
        arms = {name: f"{name} {a['mean']:.3g} ± {a['std']:.2g}" for r in mine for name, a in r["arms"].items()}
        lines.append(f"| {', '.join(r['part'] for r in mine)} | `{metric}` | {'; '.join(arms.values())} |")
    return lines


def _arms(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    return {name: arm["what"] for r in rows for name, arm in r["arms"].items()}
