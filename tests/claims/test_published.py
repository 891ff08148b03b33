"""What docs/results/claims says: the rows are whole, the verdicts follow from them, the page counts them rightly."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from trimtab.claims import claims, find_claim
from trimtab.claims.core import verdict
from trimtab.claims.statistics import Effect, paired_effect

FOLDER = Path(__file__).parents[2] / "docs" / "results" / "claims"


def rows(name: str) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = json.loads((FOLDER / f"{name}.json").read_text())
    return made


@pytest.mark.parametrize("name", claims())
def test_published_rows_are_of_the_claim_and_their_verdicts_follow(name: str) -> None:
    claim = find_claim(name)
    for scope, study in (("mechanism", claim.mechanism), ("full", claim.full)):
        mine = [r for r in rows(name) if r["scope"] == scope]
        assert [(r["claim"], r["metric"]) for r in mine] == [(p.says, p.metric) for p in study.parts]
        for r, part in zip(mine, study.parts):
            assert {arm: a["role"] for arm, a in r["arms"].items()} == part.arms()
            values = [r["arms"][arm]["values"] for arm in (part.method, part.baseline)]
            effect = paired_effect(*values, part.kind)
            assert (r["effect"], r["low"], r["high"]) == pytest.approx((effect.value, effect.low, effect.high))
            low, high = (math.inf * s if x is None else x for s, x in zip((-1, 1), r["region"]))
            assert (low, high) == part.region
            assert r["verdict"] == verdict(Effect(r["effect"], r["low"], r["high"], 0.0, ""), part.region)
            assert r["seeds"] == study.seeds >= 5
            for arm, a in r["arms"].items():
                assert a["what"] == study.arms[arm].what
                assert len(a["values"]) == r["seeds"]
                assert all(map(math.isfinite, a["values"]))
                assert a["mean"] == pytest.approx(sum(a["values"]) / len(a["values"]))


@pytest.mark.parametrize("name", claims())
def test_the_page_counts_verdicts_rightly(name: str) -> None:
    found, full = ([r["verdict"] for r in rows(name) if r["scope"] == scope] for scope in ("mechanism", "full"))
    (line,) = [x for x in (FOLDER / "README.md").read_text().splitlines() if x.startswith(f"| [{name}]")]
    said = [int(n) for n in re.findall(r"\| (\d+)", line)]
    assert said == [found.count(v) for v in ("holds", "does not hold", "inconclusive")]
    on_tiny = {v: int(n) for v, n in re.findall(r"(holds|does not hold|inconclusive): (\d+)", line.split("|")[-2])}
    assert on_tiny == {v: full.count(v) for v in on_tiny}
    assert sum(on_tiny.values()) == len(full)
    assert full, "an effect that was not measured"
