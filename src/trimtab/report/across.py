"""What several comparisons, one a task, say together: scores on one scale, summarised over tasks and seeds.

As in Agarwal et al. 2021 (arXiv 2108.13264): the interquartile mean over all tasks and seeds, the chance that a run of
one method ends above one of another, averaged over tasks, and intervals from a bootstrap that draws seeds within tasks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from trimtab.report.intervals import paired_interval
from trimtab.report.paired import PRIMARY
from trimtab.report.reliable import improvement_interval, iqm_interval, luck
from trimtab.report.words import count, interval, number, percent

Found = Mapping[str, Any]
Scale = tuple[float, float]
HEADS = ["arm", "interquartile mean, normalised", "mean, normalised", "chance to beat the first", "seeds"]


def across(base: str, arms: Sequence[str], found: Mapping[str, Found], given: Mapping[str, Scale]) -> dict[str, Any]:
    """`normalised` (the scale of each task), `aggregate` (a row an arm), `conclusions` and `notes`.

    found: by task, what its comparison found; the first of the arms is the base. given: by task, the scores that are 0
    and 1. Else 0 is the mean of the base's policies before training, and 1 that of its runs at their end:
    `(x - low) / (high - low)`. The chance needs no scale. Only seeds that an arm finished on every task are used.
    """
    scales, notes = [], []
    for task, one in found.items():
        scale, said = _scale(base, task, one, given.get(task))
        scales.append(scale)
        notes += said
    known = all(s["low"] is not None for s in scales)
    scores = {arm: _scores(arm, found) for arm in arms}
    rows = [_row(arm, base, scores, scales if known else None) for arm in arms if scores[arm]]
    return {
        "normalised": scales,
        "aggregate": rows,
        "conclusions": [_conclusion(base, arm, rows, len(found)) for arm in arms[1:]],
        "notes": [*notes, *_notes(found)],
    }


def _scale(base: str, task: str, found: Found, given: Scale | None) -> tuple[dict[str, Any], list[str]]:
    """What is 0 and what is 1 on a task, by whom; and what there is to say about that."""
    if given is not None:
        return {"task": task, "low": given[0], "high": given[1], "by": "given"}, []
    ended = [r for r in found["runs"] if r["arm"] == base and r["state"] == "finished"]
    pairs = [(r["start"], r["values"][PRIMARY]) for r in ended if r["start"] is not None and PRIMARY in r["values"]]
    nothing = {"task": task, "low": None, "high": None, "by": f"{base}, before and after training"}
    if not pairs:
        return nothing, [f"No run of {base} finished on {task}, so there is no scale for it."]
    low, high = (fmean(side) for side in zip(*pairs))
    way_out = f"--reference '{task}=LOW,HIGH' says which scores are 0 and 1"
    if not high > low:
        said = f"{base} ended at {number(high)} on {task}, not above the {number(low)} of its policies before training"
        return nothing, [f"{said}, so scores there have no scale; {way_out}."]
    gain, least, most = paired_interval([after - before for before, after in pairs])
    made = {**nothing, "low": low, "high": high}
    if math.isfinite(least) and least <= 0:
        said = f"{base} gained {number(gain)} {interval(least, most)} on {task}, which may be nothing"
        return made, [f"The scale of {task} is uncertain: {said}; {way_out}."]
    return made, []


def _scores(arm: str, found: Mapping[str, Found]) -> list[list[float]]:
    """`[seeds, tasks]`: raw scores of the seeds that the arm finished on every task."""
    by_task = []
    for one in found.values():
        mine = [r for r in one["runs"] if r["arm"] == arm and r["state"] == "finished" and PRIMARY in r["values"]]
        by_task.append({r["seed"]: float(r["values"][PRIMARY]) for r in mine})
    whole = [seed for seed in by_task[0] if all(seed in task for task in by_task)]
    return [[task[seed] for task in by_task] for seed in whole]


def _row(
    arm: str, base: str, scores: Mapping[str, list[list[float]]], scales: Sequence[Mapping[str, Any]] | None
) -> dict[str, Any]:
    row: dict[str, Any] = {"arm": arm, "n": len(scores[arm]), "iqm": None, "low": None, "high": None, "mean": None}
    if scales is not None:
        scaled = [[(x - s["low"]) / (s["high"] - s["low"]) for x, s in zip(seed, scales)] for seed in scores[arm]]
        value, low, high = iqm_interval(scaled)
        row |= {
            "iqm": value,
            "low": _known(low),
            "high": _known(high),
            "mean": fmean(x for seed in scaled for x in seed),
        }
    if arm != base and scores[base]:
        value, low, high = improvement_interval(scores[arm], scores[base])
        p = luck(scores[arm], scores[base])
        row["improvement"] = {"value": value, "low": _known(low), "high": _known(high), "luck": p}
    return row


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


# -- words -----------------------------------------------------------------------------------------------------------


def chance(row: Mapping[str, Any]) -> str:
    """`83% [70, 96]` of a row; "-" of the base."""
    found = row.get("improvement")
    return f"{percent(found['value'])} {interval(found['low'], found['high'], True)}".rstrip() if found else "-"


def scaled(row: Mapping[str, Any]) -> str:
    """`1.4 [0.9, 1.8]` of a row, or that there is no scale."""
    if row["iqm"] is None:
        return "no scale"
    return f"{row['iqm']:.2f}" + ("" if row["low"] is None else f" [{row['low']:.2f}, {row['high']:.2f}]")


def table_rows(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The aggregate as text, under HEADS."""
    means = ["no scale" if r["mean"] is None else f"{r['mean']:.2f}" for r in rows]
    return [[r["arm"], scaled(r), mean, chance(r), str(r["n"])] for r, mean in zip(rows, means)]


def scale_rows(scales: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Which score is 0 and which is 1, by task."""
    ends = [["unknown" if s[end] is None else number(s[end]) for end in ("low", "high")] for s in scales]
    return [[s["task"], *end, s["by"]] for s, end in zip(scales, ends)]


def _conclusion(base: str, arm: str, rows: Sequence[Mapping[str, Any]], tasks: int) -> str:
    """One sentence that a reader may repeat about an arm, over all tasks."""
    mine = next((r for r in rows if r["arm"] == arm and "improvement" in r), None)
    if mine is None:
        return f"{arm} cannot be compared with {base} over {tasks} tasks: one of them finished no seed on all of them."
    found, over = mine["improvement"], f"{tasks} tasks and {count(mine['n'], 'seed')}"
    said = f"a run of it ends above one of {base} with a chance of {chance(mine)} over {over}"
    if found["low"] is None:
        return f"Nothing can be concluded about {arm} against {base} from one seed; {said}."
    said += f", as far from 50% as luck alone brings it in {percent(found['luck'])} of such comparisons"
    if found["luck"] < 0.05 and (found["low"] > 0.5 or found["high"] < 0.5):
        return f"{arm} is {'better' if found['low'] > 0.5 else 'worse'} than {base} on these tasks: {said}."
    return f"No difference between {arm} and {base} could be shown on these tasks: {said}."


def _notes(found: Mapping[str, Found]) -> list[str]:
    """The notes of each comparison; those that all of them make once."""
    texts = dict.fromkeys(note for one in found.values() for note in one["notes"])
    made = []
    for text in texts:
        where = [task for task, one in found.items() if text in one["notes"]]
        made += [text] if len(where) == len(found) else [f"{task}: {text}" for task in where]
    return made
