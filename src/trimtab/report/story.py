"""What a run achieved, in words: the headline of the page and its first facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from trimtab.report.intervals import sign_test
from trimtab.report.keys import look_up
from trimtab.report.words import Words, count, duration, interval, is_number, number, percent, words_of

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """One evaluation: its mean, interval (None where unknown), number of problems and turn."""

    mean: float
    low: float | None
    high: float | None
    n: int | None
    turn: float | None
    right: tuple[int, ...] = ()  # how many answers to each problem were right, where that was recorded


@dataclass(frozen=True)
class Story:
    """The headline (numbers marked `**so**`), a remark under it, and the evaluations it compares."""

    headline: str
    remark: str
    before: Point | None
    after: Point | None
    share: bool
    measure: str


def tell(config: Record, history: Sequence[Record], evaluations: Sequence[Record]) -> Story:
    """The story of a run, from as much of its record as there is."""
    points = [p for p in map(_point, evaluations) if p is not None]
    words = words_of(config.get("world"))
    share = words.shares and bool(points) and all(0 <= p.mean <= 1 for p in points)
    measure = _measure(points, evaluations, share)
    remark = _progress(config, history)
    if len(points) >= 2:
        before, after = points[0], points[-1]
        verb, doubt = _verb(before, after, words)
        where = f"{measure} on {_problems(after.n, words)}"
        spent = _spent([r for r in evaluations if is_number(r.get("mean"))][-1:])
        text = f"{where} {verb} from {_say(before, share)} to {_say(after, share)} {spent}."
        said = [doubt, _passes(evaluations), remark]
        return Story(_capital(text), " ".join(filter(None, said)), before, after, share, measure)
    if points:
        text = f"{measure} on {_problems(points[0].n, words)} was {_say(points[0], share)} before training."
        more = "It has not been evaluated since." if history else "No turn has been recorded yet."
        if history:
            text = f"{text} {_training(history, words)}"
        return Story(_capital(text), " ".join(filter(None, [more, remark])), points[0], None, share, measure)
    none = "No held-out evaluation was recorded, so this says nothing about problems it did not train on."
    text = _training(history, words)
    if not text:
        text, none = (
            "This run has recorded nothing yet." if not history else f"Ran {_spent(history)}, without a reward.",
            "",
        )
    return Story(text, " ".join(filter(None, [none, remark])), None, None, share, measure)


def target(config: Record) -> tuple[float, str] | None:
    """How long the run was to be, `(n, unit)`, from `until` (a number of turns, or `{unit: n}`)."""
    until = config.get("until", config.get("turns"))
    if is_number(until):
        return float(until), "turns"
    if isinstance(until, Mapping):
        for unit, n in until.items():
            if is_number(n):
                return float(n), str(unit)
    return None


def facts(config: Record, history: Sequence[Record]) -> list[tuple[str, str]]:
    """Short labels and values for the top of the page; what the record lacks is left out."""
    last = history[-1] if history else {}
    out = [(key, _named(config.get(key))) for key in ("method", "policy", "seed")]
    for key in ("turn", "updates", "rows", "decisions"):
        if is_number(last.get(key)):
            out.append(("turns" if key == "turn" else key, f"{int(last[key]):,}"))
    if is_number(last.get("seconds")):
        out.append(("training time", duration(last["seconds"])))
    out.append(("environment", _named(config.get("environment"))))
    policy = config.get("policy")
    if isinstance(policy, Mapping) and isinstance(policy.get("start"), Mapping):
        out.append(("began with", f"{policy['start'].get('said', '')} Digest {policy['start'].get('digest', '')}."))
    return [(label, value) for label, value in out if value]


def _named(value: Any) -> str:
    if isinstance(value, Mapping):
        for key in ("name", "spec", "source"):
            if value.get(key):
                return str(value[key])
        return ""
    return "" if value is None or isinstance(value, list) else str(value)


def _point(record: Record) -> Point | None:
    if not is_number(record.get("mean")):
        return None
    low, high, n, turn = (record.get(k) if is_number(record.get(k)) else None for k in ("low", "high", "n", "turn"))
    right = record.get("right")
    known = tuple(right) if isinstance(right, list) and all(isinstance(r, int) and r >= 0 for r in right) else ()
    return Point(float(record["mean"]), low, high, None if n is None else int(n), turn, known)


def _measure(points: Sequence[Point], evaluations: Sequence[Record], share: bool) -> str:
    last = evaluations[-1] if evaluations else {}
    if isinstance(last.get("measure"), str) and last["measure"]:
        return str(last["measure"])
    # Every mean a whole number of problems: rewards were right or wrong, and their mean is an accuracy.
    whole = all(p.n and abs(p.mean * p.n - round(p.mean * p.n)) < 1e-6 for p in points)
    name = "accuracy" if share and whole else "mean reward"
    greedy = last.get("greedy") is True or last.get("temperature") == 0
    return f"greedy {name}" if greedy else name


def _verb(before: Point, after: Point, words: Words) -> tuple[str, str]:
    if before.right and len(before.right) == len(after.right):
        return _paired(before.right, after.right)
    if None in (before.low, before.high, after.low, after.high):
        return "went", ""
    if after.low > before.high:  # type: ignore[operator]
        return "rose", ""
    if after.high < before.low:  # type: ignore[operator]
        return "fell", ""
    return "went", f"The intervals overlap: these {words.problem}s are too few to tell a change from chance."


def _paired(before: tuple[int, ...], after: tuple[int, ...]) -> tuple[str, str]:
    """The same problems before and after: what counts are those that changed."""
    gained = sum(a > b for b, a in zip(before, after))
    lost = sum(a < b for b, a in zip(before, after))
    p = sign_test(gained, lost)
    once = max(*before, *after) <= 1
    up, down = ("turned right", "turned wrong") if once else ("were right more often", "less often")
    said = f"Of the same problems {gained} {up} and {lost} {down} (exact sign test, p = {p:.2g})."
    if p < 0.05:
        return ("rose" if gained > lost else "fell"), said
    return "went", f"{said} These problems are too few to tell a change from chance."


def _passes(evaluations: Sequence[Record]) -> str:
    """pass@k before and after, for every k of both."""
    found = [r["pass_at"] for r in evaluations if isinstance(r.get("pass_at"), Mapping)]
    first, last = (found[0], found[-1]) if len(found) > 1 else ({}, {})
    said = [f"pass@{k} {_passed(first[k])} -> {_passed(last[k])}" for k in last if k in first]
    return f"Chance that one of k answers is right: {', '.join(said)}." if said else ""


def _passed(one: Mapping[str, Any]) -> str:
    return f"{percent(one['mean'])} {interval(one.get('low'), one.get('high'), True)}".rstrip()


def _say(point: Point, share: bool) -> str:
    value = percent(point.mean) if share else number(point.mean)
    return f"**{value}** {interval(point.low, point.high, share)}".rstrip()


def _problems(n: int | None, words: Words) -> str:
    return f"held-out {words.problem}s" if n is None else count(n, f"held-out {words.problem}")


def _training(history: Sequence[Record], words: Words) -> str:
    rewards = [r for r in (look_up(record, "reward") for record in history) if r is not None]
    if not rewards:
        return ""
    few = max(1, min(5, len(rewards) // 2))
    first, last = fmean(rewards[:few]), fmean(rewards[-few:])
    spent = _spent(history)
    if len(rewards) == 1:
        return f"The {words.reward} while training was **{number(first)}** in its first turn."
    said = f"**{number(first)}** to **{number(last)}** (means of {count(few, 'turn')} at either end)"
    return f"The {words.reward} while training went from {said} {spent}."


def _spent(records: Sequence[Record]) -> str:
    turns = [r["turn"] for r in records if is_number(r.get("turn"))]
    seconds = [r["seconds"] for r in records if is_number(r.get("seconds"))]
    parts = [f"in {count(int(max(turns)), 'turn')}" if turns else "in this run"]
    if seconds and max(seconds) > 0:
        parts.append(duration(max(seconds)))
    return ", ".join(parts)


def _progress(config: Record, history: Sequence[Record]) -> str:
    goal = target(config)
    if goal is None or not history:
        return ""
    n, unit = goal
    last = history[-1]
    done = last.get(unit, last.get(unit.rstrip("s")))
    if not is_number(done) or done >= n:
        return ""
    return f"This is not the end of the run: {number(done)} of {number(n)} {unit} are recorded so far."


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
