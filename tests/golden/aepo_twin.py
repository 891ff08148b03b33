"""AEPO's literal twin: temperature and number by the controller, credit, replacement, and GRPO's loss on both."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tests.golden import twins


def entropy(everything: Any) -> float:
    """Of the policy that drew: the mean of -log pi over the batch's own draws."""
    own = [(i, t) for i in twins.rows_of(everything) if not bool(everything.tempered[i])
           for t in twins.decisions(everything, i)]  # fmt: skip
    return -sum(float(everything.logp_behavior[i, t]) for i, t in own) / len(own)


def number(h: float, target: float, samples: int) -> tuple[bool, int]:
    """Whether the re-rolls are hot, and how many of them are asked for."""
    return (True, samples) if h <= target else (False, samples // 2)


def credit(everything: Any, select: str) -> dict[int, float]:
    """Of every row: GRPO's for the batch's own, 1 or 0 for re-rolls."""
    r, a = twins.scores(everything), twins.credit(everything, "std")
    made = {}
    for i in r:
        if bool(everything.tempered[i]):
            made[i] = 1.0 if (r[i] > 0 if select == "reward" else a[i] > 0.05) else 0.0
        else:
            made[i] = a[i]
    return made


def mixed_first(everything: Any, a: dict[int, float], k: int) -> list[int]:
    """The rows learned from when the first ones are replaced."""
    kept = [i for i in a if bool(everything.tempered[i]) and a[i] > 0]
    own = [i for i in a if not bool(everything.tempered[i])]
    k = min(k, len(kept))
    return kept[:k] + own[k:]


def aepo(batch: Any, start: Tensor, everything: Any, select: str = "reward", dual: float | None = None) -> Tensor:
    """All updates of one batch, whose rows are those learned from; `everything` holds the replaced ones too."""
    a, r = credit(everything, select), twins.scores(everything)
    mine = {}
    for i, score in twins.scores(batch).items():
        alike = [j for j in r if int(everything.group[j]) == int(batch.group[i]) and r[j] == score]
        mine[i] = a[alike[0]]
    return twins.grpo(batch, start, a=mine, dual=dual)
