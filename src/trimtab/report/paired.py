"""What a comparison says: every arm against the first one, paired by seed. Pure functions of what runs recorded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np

from trimtab.report.intervals import detectable, paired_interval
from trimtab.report.keys import look_up
from trimtab.report.reliable import summarised
from trimtab.report.words import count, is_number, number

Record = Mapping[str, Any]

# Keys of what is measured, with the short words of the tables (`measured` says what each is). The first decides: the
# mean of the last three evaluations is less noisy than the last one.
METRICS = {
    "last_three": "held-out, last three",
    "final": "held-out, last one",
    "sampled": "held-out, sampled",
    "area": "held-out, all training",
    "reward": "training reward, end",
}
PRIMARY = "last_three"


@dataclass(frozen=True)
class Run:
    """One arm with one seed. values: by key of METRICS, those that could be measured; none unless it finished.

    state: "finished", "failed" or "unfinished"; reason: why it failed. unit: of the values, where they are returns.
    start: the held-out mean before training.
    """

    arm: str
    seed: int
    values: dict[str, float] = field(default_factory=dict)
    state: str = "finished"
    reason: str = ""
    turns: int = 0
    updates: int = 0
    decisions: int = 0
    seconds: float = 0.0
    unit: str = ""
    start: float | None = None


def measured(arm: str, seed: int, metrics: Sequence[Record], evaluations: Sequence[Record]) -> Run:
    """A finished run, read off its records.

    last_three, final: the mean of the last three evaluations, and the last one. sampled: that of the last three, of
    answers drawn at temperature 1. area: the trapezoid under the held-out curve against decisions, divided by the
    decisions it spans; the evaluation from before training takes part in this one only. reward: mean training reward
    over the last tenth of the turns.
    """
    after = [e for e in evaluations if e.get("turn", 0) > 0]
    rewards = [r for r in (look_up(m, "reward") for m in metrics) if r is not None]
    values = {
        "last_three": _mean([e.get("mean") for e in after[-3:]]),
        "final": _mean([e.get("mean") for e in after[-1:]]),
        "sampled": _mean([e.get("sampled") for e in after[-3:]]),
        "area": _area(evaluations),
        "reward": _mean(rewards[-max(1, math.ceil(len(rewards) / 10)) :]),
    }
    last = metrics[-1] if metrics else {}
    known = {key: value for key, value in values.items() if value is not None}
    turns, updates, decisions = (int(last.get(key, 0)) for key in ("turn", "updates", "decisions"))
    seconds = float(last.get("seconds", 0.0))
    unit = str(evaluations[-1].get("unit", "")) if evaluations else ""
    start = _mean([e.get("mean") for e in evaluations if e.get("turn") == 0])
    spent = {"turns": turns, "updates": updates, "decisions": decisions, "seconds": seconds}
    return Run(arm, seed, known, **spent, unit=unit, start=start)  # type: ignore[arg-type]


def _mean(values: Sequence[Any]) -> float | None:
    known = [v for v in values if is_number(v)]
    return fmean(known) if known else None


def _area(evaluations: Sequence[Record]) -> float | None:
    pairs = [(e["decisions"], e["mean"]) for e in evaluations if is_number(e.get("decisions")) and is_number(e["mean"])]
    if len(pairs) < 2 or pairs[-1][0] == pairs[0][0]:
        return None
    x, y = np.array(pairs, dtype=float).T
    return float(np.trapezoid(y, x) / (x[-1] - x[0]))


# -- against the first arm ---------------------------------------------------------------------------------------


def compared(arms: Sequence[str], seeds: Sequence[int], runs: Sequence[Run]) -> dict[str, Any]:
    """`arms` (each by itself), `rows` (each arm against the first, by metric), `conclusions` and `notes`; of returns
    also `reliable`, summaries that a few odd seeds do not sway.

    arms: the first is the base. runs: at most one an arm and seed. Only seeds that finished under both arms of a row
    are paired, and how many of how many that was is part of the row and of its conclusion.
    """
    base, by = arms[0], {(r.arm, r.seed): r for r in runs}
    alone = [_alone(arm, seeds, by, runs) for arm in arms]
    ended = [r for r in runs if r.state == "finished"]
    rows = [
        row
        for arm in arms[1:]
        for metric in METRICS
        if (row := _row(base, arm, metric, seeds, by, _is_share(metric, runs))) is not None
    ]
    return {
        "base": base,
        "primary": PRIMARY,
        "arms": alone,
        "rows": rows,
        "reliable": summarised(arms, ended, PRIMARY) if all(r.unit == "return" for r in ended) else [],
        "conclusions": [_conclusion(base, arm, rows, seeds, by) for arm in arms[1:]],
        "notes": _notes(arms, seeds, alone),
    }


def _is_share(metric: str, runs: Sequence[Run]) -> bool:
    return all(0 <= r.values[metric] <= 1 and not r.unit for r in runs if metric in r.values)


def _alone(arm: str, seeds: Sequence[int], by: Mapping[tuple[str, int], Run], runs: Sequence[Run]) -> dict[str, Any]:
    """An arm by itself; the interval of a share is cut to [0, 1]."""
    mine = [by[arm, s] for s in seeds if (arm, s) in by]
    ended = [r for r in mine if r.state == "finished"]
    means = {}
    for metric, label in METRICS.items():
        values = [r.values[metric] for r in ended if metric in r.values]
        if values:
            mean, low, high = paired_interval(values)
            if share := _is_share(metric, runs):
                low, high = max(low, 0.0), min(high, 1.0)
            ends = {"low": _known(low), "high": _known(high)}
            means[metric] = {"label": label, "share": share, "mean": mean, **ends, "n": len(values)}
    return {
        "arm": arm,
        "seeds": len(ended),
        "of": len(seeds),
        "metrics": means,
        "decisions": sum(r.decisions for r in ended),
        "updates": sum(r.updates for r in ended),
        "seconds": round(sum(r.seconds for r in ended), 3),
        "failures": [{"seed": r.seed, "reason": r.reason} for r in mine if r.state == "failed"],
        "unfinished": [s for s in seeds if (arm, s) not in by or by[arm, s].state == "unfinished"],
    }


def _row(
    base: str, arm: str, metric: str, seeds: Sequence[int], by: Mapping[tuple[str, int], Run], share: bool
) -> dict[str, Any] | None:
    """One metric of one arm against the base; None where no seed has it under both."""
    pairs = [(by[base, s], by[arm, s]) for s in seeds if (base, s) in by and (arm, s) in by]
    pairs = [(b, a) for b, a in pairs if metric in b.values and metric in a.values]
    if not pairs:
        return None
    differences = [a.values[metric] - b.values[metric] for b, a in pairs]
    effect, low, high = paired_interval(differences)
    sides = {base: [b for b, _ in pairs], arm: [a for _, a in pairs]}
    return {
        "arms": [base, arm],
        "metric": metric,
        "label": METRICS[metric],
        "share": share,
        "seeds": [b.seed for b, _ in pairs],
        "of": len(seeds),
        "values": {name: [r.values[metric] for r in side] for name, side in sides.items()},
        "differences": differences,
        "effect": effect,
        "low": _known(low),
        "high": _known(high),
        "detectable": _known(detectable(differences)),
        "decisions": {name: [r.decisions for r in side] for name, side in sides.items()},
        "seconds": {name: [r.seconds for r in side] for name, side in sides.items()},
    }


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


# -- in words ----------------------------------------------------------------------------------------------------


def said(value: float, share: bool, signed: bool = False) -> str:
    """A difference or a value: in points of percent for shares, else as a number."""
    text = f"{100 * value:.1f}" if share else number(value)
    return f"+{text}" if signed and value > 0 and not text.startswith("-") else text


def bracket(low: float | None, high: float | None, share: bool) -> str:
    """`[-1.1, 7.0]`, or nothing where an end is unknown."""
    return "" if low is None or high is None else f"[{said(low, share)}, {said(high, share)}]"


def mean_of(metric: Record) -> str:
    """`62.5% [21.6, 88.0]` of a metric of an arm."""
    share = metric["share"]
    return (
        f"{said(metric['mean'], share)}{'%' if share else ''} {bracket(metric['low'], metric['high'], share)}".rstrip()
    )


def effect_of(row: Record) -> str:
    """`+4.2 points [1.1, 7.0]` of a row."""
    unit = " points" if row["share"] else ""
    ends = bracket(row["low"], row["high"], row["share"])
    return f"{said(row['effect'], row['share'], signed=True)}{unit} {ends}".rstrip()


def _conclusion(
    base: str, arm: str, rows: Sequence[Record], seeds: Sequence[int], by: Mapping[tuple[str, int], Run]
) -> str:
    """One sentence that a reader may repeat about an arm; of its first metric."""
    mine = [r for r in rows if r["arms"][1] == arm and r["metric"] == PRIMARY]
    if not mine:
        return f"{arm} cannot be compared with {base}: no seed finished under both{_because(base, arm, seeds, by)}."
    row = mine[0]
    of = "" if len(row["seeds"]) == row["of"] else f" of {row['of']}"
    over = f"over {count(len(row['seeds']), 'seed')}{of}"
    effect, low, high = effect_of(row), row["low"], row["high"]
    if low is None or high is None:
        if len(row["seeds"]) == 1:
            return f"Nothing can be concluded about {arm} against {base} from one seed{of}, which differs by {effect}."
        if row["effect"] == 0:
            return f"{arm} and {base} came out exactly equal at every seed, {over}, so no interval can be given."
        return f"{arm} differs from {base} by the same {effect} at every seed, {over}, so no interval can be given."
    if low > 0 or high < 0:
        better = "better" if low > 0 else "worse"
        return f"{arm} is {better} than {base} on this task: {effect} {over}."
    least = f"{said(row['detectable'], row['share'])}{' points' if row['share'] else ''}"
    return (
        f"No difference between {arm} and {base} could be shown on this task: {effect} {over}; one of less than "
        f"{least} would often have gone unnoticed."
    )


def _because(base: str, arm: str, seeds: Sequence[int], by: Mapping[tuple[str, int], Run]) -> str:
    failed = [
        f"{name} failed at {count(n, 'seed')}"
        for name in (base, arm)
        if (n := sum((name, s) in by and by[name, s].state == "failed" for s in seeds))
    ]
    return f" ({', '.join(failed)})" if failed else ""


def _notes(arms: Sequence[str], seeds: Sequence[int], alone: Sequence[Record]) -> list[str]:
    notes = []
    if len(arms) > 2:
        notes.append(
            f"{len(arms) - 1} arms are compared with {arms[0]}; the intervals are not corrected for several "
            "comparisons, so each errs 1 time in 20 by itself."
        )
    if len(seeds) < 5:
        notes.append(
            f"{count(len(seeds), 'seed')} say little about chance: an interval from so few is wide, and trusts that "
            "the differences are spread like a normal distribution."
        )
    notes += [f"{a['arm']}, seed {f['seed']}, failed: {f['reason']}" for a in alone for f in a["failures"]]
    left = sum(len(a["unfinished"]) for a in alone)
    if left:
        notes.append(f"{count(left, 'run')} of {len(arms) * len(seeds)} {'is' if left == 1 else 'are'} not finished.")
    return notes
