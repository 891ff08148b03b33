"""Rules about the steps: what was learned from, how far each step went, what held it.

Each rule looks at a course and gives a finding or None. `docs/diagnosis.md` has them in words.
"""

from __future__ import annotations

from statistics import median

from trimtab.report.course import RECENT, Course, Finding, gained
from trimtab.report.words import count, is_number, number, percent

GAP = 0.1  # nats a decision between sampler and trainer, in the mean
GROWTH = 2.0  # times its start, to say that something grows
NORM_FACTOR = 10.0  # times its running median
NORM_WINDOW = 50  # records of that median
KL_REFERENCE = 1.0  # nats a decision
KL_OLD = 0.1  # nats a decision
CLIP = 0.5  # share of decisions
ONE_SIDED = 0.1  # share of decisions clipped, before sides are compared
OTHER_SIDE = 0.05  # of those, at most so many on the other side
NEVER = 20  # records without any clipped decision


def not_finite(course: Course) -> Finding | None:
    """A number of a record was nan or infinite."""
    if not course.lost:
        return None
    turn, where = course.lost[0]
    key, value = next(iter(where.items()))
    return Finding(
        "not-finite",
        f"{key} was {value} in turn {number(turn)} ({count(len(course.lost), 'turn')} with such a number): lower the "
        "learning rate, or clip the gradient norm harder, and check the rewards of that turn.",
        turn,
        {"turns": len(course.lost)},
    )


def failures(course: Course) -> Finding | None:
    """Responses could not be scored."""
    total = sum(course.values("failures"))
    if total <= 0:
        return None
    named = ", ".join(f"{kind} {number(n)}" for kind, n in sorted(course.kinds.items(), key=lambda x: -x[1]) if n)
    share = f" ({percent(total / course.rows)} of all)" if is_number(course.rows) and course.rows >= total else ""
    detail = f": {named}" if named else ""
    return Finding(
        "failures",
        f"{count(int(total), 'response')} could not be scored{share}{detail}. They carry no reward, which is not a "
        "reward of 0; read the failed transcripts and repair the scorer or the prompt.",
        next(turn for turn, value in course.series("failures") if value > 0),
        {"responses": total},
    )


def gap(course: Course) -> Finding | None:
    """Sampler and trainer disagree."""
    turn, now = course.since("gap", lambda mean: mean > GAP), course.now("gap")
    if turn is None or now is None:
        return None
    start = course.start("gap") or 0.0
    grows = f", and it grows ({number(start)} at the start)" if now > GROWTH * start else ""
    far = course.values("gap_max")
    largest = f", at most by {number(max(far[-RECENT:]))}" if far else ""
    return Finding(
        "gap",
        f"The sampler's and the trainer's log-probabilities differ by {number(now)} nats a decision in the mean"
        f"{largest} (above {GAP} since turn {number(turn)}{grows}): the rows are not from the policy that the update "
        "takes them to be from. Give the sampler the trainer's weights and number format, or learn from newer rows.",
        turn,
        {"gap": now, "start": start},
    )


def grad_norm(course: Course) -> Finding | None:
    """The gradient norm has a peak."""
    worst: tuple[float, float, float] | None = None
    peaks = 0
    values: list[float] = []
    for turn, norm in course.series("grad_norm"):
        if not norm:  # 0 where every group was dead: such turns say nothing about what is usual
            continue
        usual = median(values[-NORM_WINDOW:]) if len(values) >= RECENT else 0.0
        if usual > 0 and norm > NORM_FACTOR * usual:
            peaks += 1
            if worst is None or norm / usual > worst[1] / worst[2]:
                worst = (turn, norm, usual)
        values.append(norm)
    if worst is None:
        return None
    turn, norm, usual = worst
    times = number(float(f"{norm / usual:.2g}"))
    more = "" if peaks == 1 else f"; {peaks} turns were above {NORM_FACTOR:.0f} times"
    return Finding(
        "grad-norm",
        f"The gradient norm reached {number(norm)} in turn {number(turn)}, {times} times its running median "
        f"of {number(usual)}{more}. Clip the gradient norm nearer its median, or lower the learning rate.",
        turn,
        {"norm": norm, "usual": usual, "peaks": peaks},
    )


def kl(course: Course) -> Finding | None:
    """The policy goes too far from where a batch's updates began, or from the reference."""
    old = _far(course, "kl_old", KL_OLD, "the policy that sampled its batch", "take fewer passes, or a smaller lr")
    return old or _far(course, "kl", KL_REFERENCE, "the reference", "raise the price of the KL (kl), or lower the lr")


def _far(course: Course, name: str, limit: float, whence: str, advice: str) -> Finding | None:
    """At any time: a step that went too far is not undone by later ones that do not."""
    means = course.means(name)
    first = next((turn for turn, mean in means if mean > limit), None)
    if first is None:
        return None
    worst, now = max(means, key=lambda m: m[1]), means[-1][1]
    return Finding(
        "kl",
        f"The policy went {number(worst[1])} nats a decision from {whence} at turn {number(worst[0])} (above {limit} "
        f"first at turn {number(first)}; now {number(now)}): its steps go too far; {advice}.",
        first,
        {name: worst[1], "now": now},
    )


def clipped(course: Course) -> Finding | None:
    """Nearly everything is clipped."""
    turn, now = course.since("clip", lambda mean: mean > CLIP), course.now("clip")
    if turn is None or now is None:
        return None
    return Finding(
        "clip",
        f"{percent(now)} of decisions were clipped (above {percent(CLIP)} since turn {number(turn)}): more than half "
        "of the batch teaches nothing. Take fewer passes over a batch, a smaller learning rate, or wider bounds.",
        turn,
        {"clip": now},
    )


def one_sided(course: Course) -> Finding | None:
    """One bound does all the clipping."""
    low, high = course.now("clip_low"), course.now("clip_high")
    if low is None or high is None or low + high <= ONE_SIDED or min(low, high) >= OTHER_SIDE * (low + high):
        return None
    upper = high > low
    what = (
        f"{percent(high)} of decisions are held by the upper bound and {percent(low)} by the lower: good decisions "
        "that were rare are kept rare, and the entropy falls. Raise surrogate.bound.high, or take fewer passes."
        if upper
        else f"{percent(low)} of decisions are held by the lower bound and {percent(high)} by the upper: the update is "
        "mostly about making decisions rarer. Take fewer passes, or a method that weighs the sides (bapo)."
    )
    return Finding("one-sided", f"Clipping is one-sided: {what}", None, {"clip_low": low, "clip_high": high})


def never_clipped(course: Course) -> Finding | None:
    """Several updates a batch, and the bound never held a decision, while the reward stands still."""
    values, updates = course.values("clip"), course.updates_a_turn()
    if updates is None or updates < 2 or len(values) < NEVER or max(values) > 0 or gained(course.values("reward")):
        return None
    return Finding(
        "never-clipped",
        f"No decision was clipped in {count(len(values), 'record')}, although each batch gives {number(updates)} "
        "updates, and the reward does not rise: the steps are so small that the bound is never met. Raise update.lr, "
        "or take more passes.",
        None,
        {"records": len(values), "updates": updates},
    )
