"""Comparisons on several tasks, put together: scales, interquartile means, chances; against loops and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from trimtab.report.across import across, table_rows
from trimtab.report.paired import PRIMARY
from trimtab.report.reliable import improvement

SCORES = {
    "hop": {"a": [100.0, 200.0, 300.0, 200.0], "b": [300.0, 500.0, 100.0, 400.0]},
    "run": {"a": [5.0, 4.0, 6.0, 5.0], "b": [5.0, 9.0, 7.0, 4.5]},
}
START = {"hop": 0.0, "run": 1.0}


def found(scores: Any = SCORES, start: Any = START, notes: Any = None) -> dict[str, dict[str, Any]]:
    return {
        task: {
            "runs": [
                {"arm": arm, "seed": k, "state": "finished", "values": {PRIMARY: x}, "start": start[task]}
                for arm, mine in arms.items()
                for k, x in enumerate(mine)
                if x is not None
            ],
            "notes": (notes or {}).get(task, []),
        }
        for task, arms in scores.items()
    }


def by_hand(scores: dict[str, list[float]], low: dict[str, float], high: dict[str, float]) -> float:
    flat = sorted((x - low[t]) / (high[t] - low[t]) for t, mine in scores.items() for x in mine)
    cut = len(flat) // 4
    middle = flat[cut : len(flat) - cut]
    return sum(middle) / len(middle)


def test_scores_are_normalised_by_the_first_arm_and_summarised_over_tasks_and_seeds() -> None:
    made = across("a", ["a", "b"], found(), {})
    assert [(s["low"], s["high"]) for s in made["normalised"]] == [(0.0, 200.0), (1.0, 5.0)]
    assert all(s["by"] == "a, before and after training" for s in made["normalised"])
    low, high = {"hop": 0.0, "run": 1.0}, {"hop": 200.0, "run": 5.0}
    for arm, row in zip("ab", made["aggregate"]):
        mine = {task: arms[arm] for task, arms in SCORES.items()}
        assert row["iqm"] == pytest.approx(by_hand(mine, low, high))
        assert row["low"] <= row["iqm"] <= row["high"]
        assert row["n"] == 4
    assert made["aggregate"][0]["mean"] == pytest.approx(1.0)
    x, y = (np.array([SCORES[t][arm] for t in SCORES]).T for arm in "ba")
    assert made["aggregate"][1]["improvement"]["value"] == improvement(x, y)
    assert "improvement" not in made["aggregate"][0]
    assert made["conclusions"][0].startswith("No difference between b and a could be shown on these tasks: a run of it")


def test_given_scores_are_the_scale_and_the_chance_needs_none() -> None:
    given = across("a", ["a", "b"], found(), {"hop": (0.0, 1000.0)})
    assert [s["by"] for s in given["normalised"]] == ["given", "a, before and after training"]
    low, high = {"hop": 0.0, "run": 1.0}, {"hop": 1000.0, "run": 5.0}
    mine = {task: arms["b"] for task, arms in SCORES.items()}
    assert given["aggregate"][1]["iqm"] == pytest.approx(by_hand(mine, low, high))
    usual = across("a", ["a", "b"], found(), {})
    assert given["aggregate"][1]["improvement"] == usual["aggregate"][1]["improvement"]


def test_a_first_arm_that_learned_nothing_gives_no_scale() -> None:
    made = across("a", ["a", "b"], found(start={"hop": 250.0, "run": 1.0}), {})
    assert made["aggregate"][1]["iqm"] is None
    assert table_rows(made["aggregate"])[1][1:3] == ["no scale", "no scale"]
    assert 0 <= made["aggregate"][1]["improvement"]["value"] <= 1
    (note,) = made["notes"]
    assert "a ended at 200 on hop, not above the 250 of its policies before training" in note
    assert "--reference 'hop=LOW,HIGH'" in note
    (note,) = across("a", ["a", "b"], found(start={"hop": 180.0, "run": 1.0}), {})["notes"]
    assert note.startswith("The scale of hop is uncertain: a gained 20 [")


def test_only_seeds_that_finished_every_task_are_used() -> None:
    scores = {**SCORES, "run": {"a": SCORES["run"]["a"], "b": [5.0, None, 7.0, 4.5]}}
    made = across("a", ["a", "b"], found(scores), {})
    assert [r["n"] for r in made["aggregate"]] == [4, 3]
    x = np.array([[300.0, 5.0], [100.0, 7.0], [400.0, 4.5]])
    assert made["aggregate"][1]["improvement"]["value"] == improvement(x, np.array([*SCORES_A]))
    none = across("a", ["a", "b"], found({**SCORES, "run": {"a": SCORES["run"]["a"], "b": [None] * 4}}), {})
    assert [r["arm"] for r in none["aggregate"]] == ["a"]
    assert none["conclusions"] == [
        "b cannot be compared with a over 2 tasks: one of them finished no seed on all of them."
    ]


SCORES_A = list(zip(SCORES["hop"]["a"], SCORES["run"]["a"]))


def test_a_clear_difference_is_a_sentence_and_notes_are_said_once() -> None:
    scores = {t: {"a": [1.0, 2.0, 3.0], "b": [7.0, 8.0, 9.0]} for t in ("hop", "run")}
    both = {"hop": ["few", "odd"], "run": ["few"]}
    made = across("a", ["a", "b"], found(scores, {"hop": 0.0, "run": 0.0}, both), {"hop": (0, 1), "run": (0, 1)})
    (said,) = made["conclusions"]
    assert said.startswith(
        "b is better than a on these tasks: a run of it ends above one of a with a chance of 100% [100, 100] over 2 "
        "tasks and 3 seeds, as far from 50% as luck alone brings it in 0."
    )
    assert made["aggregate"][1]["improvement"]["luck"] == pytest.approx(2 / 400, abs=0.003)
    few = {t: {arm: mine[:2] for arm, mine in arms.items()} for t, arms in scores.items()}
    made_of_few = across("a", ["a", "b"], found(few, {"hop": 0.0, "run": 0.0}), {"hop": (0, 1), "run": (0, 1)})
    (said,) = made_of_few["conclusions"]  # the interval has no width, and luck does it 1 time in 18
    assert said.startswith("No difference between b and a could be shown on these tasks: a run of it ends above")
    assert made["notes"] == ["few", "hop: odd"]
