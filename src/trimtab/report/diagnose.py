"""What the numbers of a run suggest, in plain sentences: what was seen, and what to try."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

from trimtab.report.keys import dead_share, failure_kinds, look_up
from trimtab.report.words import count, is_number, number, percent

History = Sequence[Mapping[str, Any]]

RECENT = 5  # turns averaged to say "now"
ENTROPY_SHARE = 0.05
DEAD_SHARE = 0.8
NORM_FACTOR = 10.0
NORM_WINDOW = 50
GAP = 0.1
CLIP = 0.5


def diagnose(history: list[dict[str, Any]]) -> list[str]:
    """Sentences about what looks wrong in the records of `metrics.jsonl`, gravest first; empty when nothing does.

    It looks for: numbers that are not finite; failures of the environment; a gap between sampler and trainer above
    0.1 nats; a gradient norm above 10 times its running median; entropy below 5% of its start while the reward still
    rises; a clip rate above 50%; more than 80% dead groups. Rates are means of the last 5 turns, and nothing is said
    of fewer. These are rules of thumb: a sentence is a reason to look, not a verdict.
    """
    return [sentence for _, sentence in findings(history)]


def findings(history: History) -> list[tuple[str, str]]:
    """As `diagnose`, with a stable kind before each sentence."""
    out = []
    for kind, check in _CHECKS.items():
        sentence = check(history) if history else None
        if sentence:
            out.append((kind, sentence))
    return out


def _series(history: History, name: str) -> list[float]:
    values = [look_up(record, name) for record in history]
    return [v for v in values if v is not None]


def _now(values: Sequence[float]) -> float:
    return fmean(values[-RECENT:])


def _not_finite(history: History) -> str | None:
    seen = [(r.get("turn", "?"), r["not_finite"]) for r in history if isinstance(r.get("not_finite"), Mapping)]
    seen = [(turn, where) for turn, where in seen if where]
    if not seen:
        return None
    turn, where = seen[0]
    key, value = next(iter(where.items()))
    return (
        f"{key} was {value} in turn {turn} ({count(len(seen), 'turn')} with such a number): lower the learning rate, "
        "or clip the gradient norm harder, and check the rewards of that turn."
    )


def _failures(history: History) -> str | None:
    total = sum(_series(history, "failures"))
    if total <= 0:
        return None
    rows = history[-1].get("rows")  # the clock: all rows so far
    kinds: dict[str, float] = {}
    for record in history:
        for kind, n in failure_kinds(record).items():
            kinds[kind] = kinds.get(kind, 0) + n
    named = ", ".join(f"{kind} {number(n)}" for kind, n in sorted(kinds.items(), key=lambda x: -x[1]) if n)
    share = f" ({percent(total / rows)} of all)" if is_number(rows) and rows >= total else ""
    detail = f": {named}" if named else ""
    return (
        f"{count(int(total), 'response')} could not be scored{share}{detail}. They carry no reward, which is not a "
        "reward of 0; read the failed transcripts and repair the scorer or the prompt."
    )


def _gap(history: History) -> str | None:
    values = _series(history, "gap")
    if len(values) < RECENT or _now(values) <= GAP:
        return None
    return (
        f"The sampler's and the trainer's log-probabilities differ by {number(_now(values))} nats a decision in the "
        f"mean (above {GAP}): the rows are not from the policy that the update takes them to be from. Give the sampler "
        "the trainer's weights and number format, or learn from newer rows."
    )


def _norm(history: History) -> str | None:
    worst: tuple[Any, float, float] | None = None
    peaks = 0
    values: list[float] = []
    for record in history:
        norm = look_up(record, "grad_norm")
        if not norm:  # 0 where every group was dead: such turns say nothing about what is usual
            continue
        usual = median(values[-NORM_WINDOW:]) if len(values) >= RECENT else 0.0
        if usual > 0 and norm > NORM_FACTOR * usual:
            peaks += 1
            if worst is None or norm / usual > worst[1] / worst[2]:
                worst = (record.get("turn", "?"), norm, usual)
        values.append(norm)
    if worst is None:
        return None
    turn, norm, usual = worst
    more = "" if peaks == 1 else f"; {peaks} turns were above {NORM_FACTOR:.0f} times"
    return (
        f"The gradient norm reached {number(norm)} in turn {turn}, {norm / usual:.0f} times its running median of "
        f"{number(usual)}{more}. Clip the gradient norm nearer its median, or lower the learning rate."
    )


def _entropy(history: History) -> str | None:
    values, reward = _series(history, "entropy"), _series(history, "reward")
    if len(values) < 2 * RECENT or len(reward) < 2 * RECENT:
        return None
    start, now = fmean(values[:RECENT]), _now(values)
    quarter = max(RECENT, len(reward) // 4)
    before, after = fmean(reward[-2 * quarter : -quarter]), fmean(reward[-quarter:])
    if start <= 0 or now >= ENTROPY_SHARE * start or after <= before:
        return None
    return (
        f"Entropy fell to {number(now)} nats, {percent(now / start)} of its start ({number(start)}), while the reward "
        f"still rises ({number(before)} to {number(after)}): the policy hardly explores any more. Try a higher "
        "temperature, a wider upper clip bound, or a smaller learning rate."
    )


def _clip(history: History) -> str | None:
    values = _series(history, "clip")
    if len(values) < RECENT or _now(values) <= CLIP:
        return None
    return (
        f"{percent(_now(values))} of decisions were clipped: more than half of the batch teaches nothing. Take fewer "
        "passes over a batch, a smaller learning rate, or wider bounds."
    )


def _dead(history: History) -> str | None:
    values = [v for v in map(dead_share, history) if v is not None]
    if len(values) < RECENT or _now(values) <= DEAD_SHARE:
        return None
    reward = _series(history, "reward")
    level = _now(reward) if reward else 0.5
    if level > 0.9:
        advice = "almost every response is right, so the problems have become too easy: stop here, or give harder ones"
    elif level < 0.1:
        advice = "almost every response is wrong, so the problems are too hard: start easier, or imitate answers first"
    else:
        advice = "try larger groups, a higher temperature, or a method that drops such groups and draws others"
    return f"{percent(_now(values))} of groups got one reward for all their responses and teach nothing: {advice}."


_CHECKS: Mapping[str, Callable[[History], str | None]] = {
    "not-finite": _not_finite,
    "failures": _failures,
    "gap": _gap,
    "grad-norm": _norm,
    "entropy": _entropy,
    "clip": _clip,
    "dead": _dead,
}
