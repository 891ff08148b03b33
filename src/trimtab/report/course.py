"""The course of a run: what was recorded, as series by short name, ready to be judged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, pvariance
from typing import Any

from trimtab.report.keys import failure_kinds, short
from trimtab.report.words import is_number

RECENT = 5  # records averaged to say "now"
SURE = 2.0  # standard errors by which two means must differ, to be called different

Series = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Finding:
    """What a rule saw. turn: where it began, None where that cannot be said. numbers: those of the sentence."""

    kind: str
    sentence: str
    turn: float | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        turn = int(self.turn) if self.turn is not None and self.turn == int(self.turn) else self.turn
        return {"kind": self.kind, "turn": turn, "sentence": self.sentence, "numbers": dict(self.numbers)}


class Course:
    """Series of `(turn, value)` by short name (see `keys`), grown record by record.

    lost: numbers that were not finite, by turn. kinds: failures of the whole run. evaluations: `(turn, mean, standard
    error or None)` of every evaluation of held-out problems. Anything else in a record is passed over.
    """

    def __init__(self) -> None:
        self._series: dict[str, list[tuple[float, float]]] = {}
        self.lost: list[tuple[float, Mapping[str, Any]]] = []
        self.kinds: dict[str, float] = {}
        self.evaluations: list[tuple[float, float, float | None]] = []
        self.rows: float | None = None
        self._updates: list[tuple[float, float]] = []
        self._count = 0

    @classmethod
    def of(cls, history: Iterable[Mapping[str, Any]], evaluations: Iterable[Mapping[str, Any]] = ()) -> Course:
        """From the records of `metrics.jsonl` and `eval.jsonl`."""
        made = cls()
        for record in history:
            made.add(record)
        for record in evaluations:
            if is_number(record.get("mean")):
                made.evaluated(record.get("turn"), record["mean"], record.get("low"), record.get("high"))
        return made

    def __len__(self) -> int:
        return self._count

    def add(self, record: Mapping[str, Any]) -> None:
        """One more record."""
        self._count += 1
        turn = float(record["turn"]) if is_number(record.get("turn")) else float(self._count)
        for name, value in short(record).items():
            self._series.setdefault(name, []).append((turn, value))
        lost = record.get("not_finite")
        if isinstance(lost, Mapping) and lost:
            self.lost.append((turn, lost))
        for kind, n in failure_kinds(record).items():
            self.kinds[kind] = self.kinds.get(kind, 0.0) + n
        self.rows = record["rows"] if is_number(record.get("rows")) else self.rows
        if is_number(record.get("updates")):
            self._updates = [*self._updates[:1], (turn, float(record["updates"]))]

    def evaluated(self, turn: Any, mean: float, low: Any = None, high: Any = None) -> None:
        """One more evaluation, with the ends of its 95% interval where they are known."""
        known = is_number(low) and is_number(high)
        at = float(turn) if is_number(turn) else (self.evaluations[-1][0] if self.evaluations else 0.0)
        self.evaluations.append((at, float(mean), (high - low) / (2 * 1.96) if known else None))

    def series(self, name: str) -> Series:
        """`(turn, value)` of the records that hold it."""
        return self._series.get(name, ())

    def values(self, name: str) -> list[float]:
        return [value for _, value in self.series(name)]

    def now(self, name: str) -> float | None:
        """The mean of the last 5 records that hold it; None where there are fewer."""
        values = self.values(name)
        return fmean(values[-RECENT:]) if len(values) >= RECENT else None

    def start(self, name: str) -> float | None:
        """The mean of the first 5."""
        values = self.values(name)
        return fmean(values[:RECENT]) if len(values) >= RECENT else None

    def means(self, name: str) -> Series:
        """`(turn, mean of the 5 records up to it)`."""
        series, values = self.series(name), self.values(name)
        return [(series[i][0], fmean(values[i + 1 - RECENT : i + 1])) for i in range(RECENT - 1, len(series))]

    def since(self, name: str, wrong: Callable[[float], bool]) -> float | None:
        """The turn since which the mean of the last 5 records was wrong without a break; None if it is not now."""
        series = self.series(name)
        values = [value for _, value in series]
        at = len(values)
        while at >= RECENT and wrong(fmean(values[at - RECENT : at])):
            at -= 1
        return series[at][0] if at < len(values) else None

    def updates_a_turn(self) -> float | None:
        """How many updates a turn makes, on average; None where that is not recorded."""
        if len(self._updates) < 2 or self._updates[1][0] <= self._updates[0][0]:
            return None
        (t0, u0), (t1, u1) = self._updates
        return (u1 - u0) / (t1 - t0)

    def shares(self) -> bool:
        """Whether every reward so far lies in [0, 1]."""
        return all(0 <= value <= 1 for value in self.values("reward"))


def rose(before: Sequence[float], after: Sequence[float], sure: float = SURE) -> bool:
    """Whether the second mean is above the first by more than 2 (`sure`) standard errors of their difference."""
    if len(before) < 2 or len(after) < 2:
        return False
    error = (pvariance(before) / (len(before) - 1) + pvariance(after) / (len(after) - 1)) ** 0.5
    return fmean(after) - fmean(before) > sure * error


def still_rises(values: Sequence[float]) -> tuple[float, float] | None:
    """The means of the last quarter and of the one before it, where the later is above the earlier (see `rose`)."""
    quarter = max(RECENT, len(values) // 4)
    before, after = values[-2 * quarter : -quarter], values[-quarter:]
    return (fmean(before), fmean(after)) if len(before) == quarter and rose(before, after) else None


def gained(values: Sequence[float]) -> bool:
    """Whether the last values, 10 at most, are above the first ones (see `rose`)."""
    few = min(len(values) // 2, 2 * RECENT)
    return rose(values[:few], values[-few:]) if few else False
