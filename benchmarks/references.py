"""Learning curves of ppo, sac and td3 beside Stable-Baselines3's: same settings, tasks, budget and evaluation.

    make peers && python benchmarks/references.py --side theirs     # hours, on one thread; goes on where it was stopped
    python benchmarks/references.py --side ours         # and narrow: ours with bfloat16 products
    python benchmarks/references.py --show

Every run is a file in docs/results/references/runs; the page compares the mean return of the last three evaluations.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from trimtab.report.intervals import paired_interval
from trimtab.report.style import Theme, render, styled, tidy

SIDES = {"ours": "trimtab", "narrow": "trimtab, bfloat16 products", "theirs": "Stable-Baselines3"}
HERE = Path(__file__).parent
HOME = HERE.parent / "docs" / "results" / "references"
METHODS, TASKS, SEEDS, DECISIONS = ("ppo", "td3", "sac"), ("Hopper-v5", "HalfCheetah-v5"), (0, 1, 2), 50_000


Span = tuple[float, float, float]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def whole(path: Path) -> bool:
    made = lines(path)
    return bool(made) and bool(made[-1].get("done"))


def place(side: str, name: str, task: str, seed: int) -> Path:
    return HOME / "runs" / f"{name}-{task}-{side}-{seed}.jsonl"


def sides(name: str) -> tuple[str, ...]:
    """Whose runs there are of a method: ppo's networks are too small for bfloat16 products."""
    return tuple(side for side in SIDES if side != "narrow" or name != "ppo")


def make(side: str, python: str, methods: list[str]) -> None:
    """The runs that are missing on one side, one after the other."""
    (HOME / "runs").mkdir(parents=True, exist_ok=True)
    for name, task, seed in product(methods, TASKS, SEEDS):
        if side not in sides(name):
            continue
        path = place(side, name, task, seed)
        if whole(path):
            continue
        print(f"{side} {name} {task} {seed}", flush=True)
        words = [python, str(HERE / "reference_work.py"), side, name, task, str(seed), str(DECISIONS), str(path)]
        subprocess.run(words, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


# -- showing -------------------------------------------------------------------------------------------------------
def last_three(path: Path) -> float:
    """The mean return of the last three evaluations of a run."""
    points = [line["mean"] for line in lines(path) if "mean" in line]
    return sum(points[-3:]) / len(points[-3:])


def picture(theme: Theme) -> bytes:
    """One panel a method and task: every run thin, the mean of the runs thick."""
    with styled(theme) as colours:
        figure = Figure(figsize=(10, 2.6 * len(METHODS)), layout="constrained")
        panels = figure.subplots(len(METHODS), len(TASKS), squeeze=False)
        for (i, name), (j, task) in product(enumerate(METHODS), enumerate(TASKS)):
            ax = panels[i][j]
            for side, colour in zip(SIDES, (colours["c0"], colours["c2"], colours["c1"])):
                curves = [
                    [(p["decisions"], p["mean"]) for p in lines(path) if "mean" in p]
                    for path in (place(side, name, task, seed) for seed in SEEDS)
                    if whole(path)
                ]
                for curve in curves:
                    ax.plot(*zip(*curve), color=colour, lw=0.7, alpha=0.5)
                if curves:
                    short = min(map(len, curves))
                    middle = [sum(c[k][1] for c in curves) / len(curves) for k in range(short)]
                    ax.plot([p[0] for p in curves[0][:short]], middle, color=colour, lw=2, label=SIDES[side])
            tidy(ax, "decisions", f"{name}, {task}: mean return", "")
            if ax.lines:
                ax.legend(frameon=False, fontsize=8)
        return render(figure, "svg", theme, "references")


def page() -> str:
    """Means over seeds with Student intervals, and whether they overlap."""
    out = [
        "# Learning curves beside Stable-Baselines3",
        "",
        f"{DECISIONS:,} decisions, {len(SEEDS)} seeds a side, Stable-Baselines3's default settings on both (our preset "
        '"sb3"), ten deterministic episodes every 5,000 decisions. A score is the mean of the last three evaluations; '
        "intervals are Student's over seeds, at 95%. Made by `python benchmarks/references.py`; runs are in `runs/`. "
        "With bfloat16 products the factors between hidden layers are rounded; the peer has float32 all the same. "
        "CPU seconds are of whatever machine a run was made on, and two of them differ by a factor of two; for speed "
        "see [bench-control](../bench-control.json).",
        "",
        '<picture><source media="(prefers-color-scheme: dark)" srcset="curves-dark.svg">'
        '<img src="curves-light.svg" alt="learning curves"></picture>',
        "",
        "| method | task | trimtab | Stable-Baselines3 | verdict | CPU seconds, ours | theirs |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = [(name, task, side) for name in METHODS for side in sides(name) if side != "theirs" for task in TASKS]
    for name, task, mine in rows:
        cells, spans, cost, seeds = [], [], [], []
        for side in (mine, "theirs"):
            paths = [p for p in (place(side, name, task, seed) for seed in SEEDS) if whole(p)]
            scores = [last_three(p) for p in paths]
            seeds.append(len(scores))
            spans.append(paired_interval(scores) if len(scores) > 1 else None)
            each = ", ".join(f"{s:.0f}" for s in scores)
            mean = f"{spans[-1][0]:.0f} [{spans[-1][1]:.0f}, {spans[-1][2]:.0f}]" if spans[-1] else "not run"
            cells.append(f"{mean} ({each})" if scores else "not run")
            cost.append(f"{sum(lines(p)[-1]['cpu_seconds'] for p in paths) / len(paths):.0f}" if paths else "-")
        said = verdict(*spans) if min(seeds) == len(SEEDS) else f"{min(seeds)} of {len(SEEDS)} seeds"
        named = name if mine == "ours" else f"{name}, bfloat16 products"
        out.append(f"| {named} | {task} | {cells[0]} | {cells[1]} | {said} | {cost[0]} | {cost[1]} |")
    return "\n".join([*out, ""])


def verdict(ours: Span | None, theirs: Span | None) -> str:
    if ours is None or theirs is None:
        return "not run"
    if ours[1] > theirs[2]:
        return "ours is better"
    return "intervals overlap" if ours[2] >= theirs[1] else "**ours is worse**"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=list(SIDES), help="make the runs of this side that are missing")
    parser.add_argument("--peers", default=os.environ.get("PEERS", ".venv-peers/bin/python"), help="their python")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--show", action="store_true", help="write the page and the curves from the runs there are")
    given = parser.parse_args()
    if given.side:
        make(given.side, given.peers if given.side == "theirs" else sys.executable, given.methods)
    themes: tuple[Theme, ...] = ("light", "dark")
    for theme in themes if given.show else ():
        (HOME / f"curves-{theme}.svg").write_bytes(picture(theme))
    if given.show:
        (HOME / "README.md").write_text(page())


if __name__ == "__main__":
    main()
