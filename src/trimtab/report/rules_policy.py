"""Rules about the policy: whether it still explores, whether it still has something to learn from, whether it gains.

Each rule looks at a course and gives a finding or None. `docs/diagnosis.md` has them in words.
"""

from __future__ import annotations

import itertools
from statistics import fmean

from trimtab.report.course import RECENT, Course, Finding, gained, rose, still_rises
from trimtab.report.words import number, percent

ENTROPY_SHARE = 0.05  # of its start
SOLVED = 0.95  # a mean reward, of rewards in [0, 1]: little is left to explore for
NOISE_FACTOR = 2.0  # times the entropy's start
NOISE_LEAST = 0.5  # nats above it
WIDTH_FACTOR = 5.0  # times the start of the width of the actions
DEAD_SHARE = 0.8  # of groups
MOSTLY = 0.9  # of the dead groups are right, or wrong
EASY, HARD = 0.9, 0.1  # mean rewards at which dead groups are taken for right, or wrong, where that was not recorded
TRUNCATED = 0.5  # of responses
HELD_OUT_FIRST = 2.0  # standard errors below the evaluation before training
HELD_OUT_BEST = 3.0  # and below the best one since: it was chosen among many
FELL_SHARE = 0.5  # of what the reward had gained
FELL_SURE = 4.0  # standard errors: the best window was chosen among many
VALUE_RECORDS = 20  # a critic may begin as it likes


def entropy(course: Course) -> Finding | None:
    """The entropy collapsed while the reward still rises."""
    start, rewards = course.start("entropy"), course.values("reward")
    if start is None or start <= 0 or len(course.values("entropy")) < 2 * RECENT:
        return None
    turn, now = course.since("entropy", lambda mean: mean < ENTROPY_SHARE * start), course.now("entropy")
    rise = still_rises(rewards)
    if turn is None or now is None or rise is None or not gained(rewards) or (course.shares() and rise[1] > SOLVED):
        return None
    return Finding(
        "entropy",
        f"Entropy fell below {percent(ENTROPY_SHARE)} of its start at turn {number(turn)} (now {number(now)} nats, "
        f"{percent(now / start)} of {number(start)}) while the reward still rises ({number(rise[0])} to "
        f"{number(rise[1])}): the policy hardly explores any more. {_pushed(course, turn)}Try a higher temperature, a "
        "wider upper clip bound, or a smaller learning rate.",
        turn,
        {"entropy": now, "start": start},
    )


def _pushed(course: Course, turn: float) -> str:
    """Which side of the advantages pushed the entropy down until then."""
    sides = [[v for t, v in course.series(f"push_{side}") if t <= turn] for side in ("positive", "negative")]
    if not all(sides):
        return ""
    positive, negative = map(fmean, sides)
    if min(positive, negative) >= 0:
        return ""
    if positive <= negative:
        return "Advantages above 0 pushed it down, on decisions that were likely already. "
    return "Advantages below 0 pushed it down, on decisions that were unlikely already. "


def noise(course: Course) -> Finding | None:
    """The entropy rises out of bounds, and nothing is gained by it."""
    values = course.values("entropy")
    if len(values) < 2 * RECENT:
        return None
    start = values[0]  # a few steps can be enough
    limit = max(NOISE_FACTOR * start, start + NOISE_LEAST)
    turn, now = course.since("entropy", lambda mean: mean > limit), course.now("entropy")
    if turn is None or now is None or gained(course.values("reward")):
        return None
    return Finding(
        "noise",
        f"Entropy rose to {number(now)} nats from {number(start)} at the start (above {number(limit)} since turn "
        f"{number(turn)}), and the reward does not rise with it: the policy turns into noise. Lower update.lr, go back "
        "to a checkpoint before it, or price the KL to the start (kl).",
        turn,
        {"entropy": now, "start": start},
    )


def width(course: Course) -> Finding | None:
    """In an environment: the actions collapsed while the return still rises, or spread while it does not."""
    name = "action_width" if course.series("action_width") else "action_entropy"
    start, returns = course.start(name), course.values("reward")
    if start is None or start <= 0 or len(course.values(name)) < 2 * RECENT:
        return None
    now, rise = course.now(name) or 0.0, still_rises(returns)
    said = "width" if name == "action_width" else "entropy"
    narrow = course.since(name, lambda mean: mean < ENTROPY_SHARE * start)
    if narrow is not None and rise is not None and gained(returns):
        return Finding(
            "width",
            f"The {said} of the actions fell below {percent(ENTROPY_SHARE)} of its start at turn {number(narrow)} (now "
            f"{number(now)}, {percent(now / start)} of {number(start)}) while the return still rises "
            f"({number(rise[0])} to {number(rise[1])}): the policy hardly explores any more. Raise entropy_coef, or "
            "lower update.lr.",
            narrow,
            {name: now, "start": start},
        )
    wide = course.since(name, lambda mean: mean > WIDTH_FACTOR * start)
    if wide is not None and name == "action_width" and not gained(returns):
        return Finding(
            "width",
            f"The width of the actions grew to {number(now)} from {number(start)} at the start (above "
            f"{WIDTH_FACTOR:.0f} times that since turn {number(wide)}), and the return does not rise with it: the "
            "policy turns into noise. Lower entropy_coef, or update.lr.",
            wide,
            {name: now, "start": start},
        )
    return None


def dead(course: Course) -> Finding | None:
    """Nearly all groups got one reward for all of their responses."""
    turn, now = course.since("dead", lambda mean: mean > DEAD_SHARE), course.now("dead")
    if turn is None or now is None:
        return None
    known = [share for share in (course.now("dead_right"), course.now("dead_wrong")) if share is not None]
    if len(known) == 2:
        right, wrong = known
        apart = f" ({percent(right)} all right, {percent(wrong)} all wrong)"
    else:  # an older record, or rewards made elsewhere: their mean tells
        level, apart = course.now("reward"), ""
        right = now if level is not None and level > EASY else 0.0
        wrong = now if level is not None and level < HARD else 0.0
    if right >= MOSTLY * now:
        advice = "almost every response is right, so the problems have become too easy: stop here, or give harder ones"
    elif wrong >= MOSTLY * now and course.values("dead")[0] <= DEAD_SHARE:
        advice = (
            "almost every response is wrong, and it was not so at the start, so the policy has collapsed: go back to a "
            "checkpoint before it, and lower update.lr"
        )
    elif wrong >= MOSTLY * now:
        advice = "almost every response is wrong, so the problems are too hard: start easier, or imitate answers first"
    else:
        advice = "try larger groups, a higher temperature, or a method that drops such groups and draws others (dapo)"
    return Finding(
        "dead",
        f"{percent(now)} of groups got one reward for all their responses{apart} and teach nothing (above "
        f"{percent(DEAD_SHARE)} since turn {number(turn)}): {advice}.",
        turn,
        {"dead": now, **dict(zip(("right", "wrong"), known))},
    )


def truncated(course: Course) -> Finding | None:
    """Most responses meet the length limit."""
    turn, now = course.since("truncated", lambda mean: mean > TRUNCATED), course.now("truncated")
    if turn is None or now is None:
        return None
    return Finding(
        "truncated",
        f"{percent(now)} of responses met the length limit before they ended (above {percent(TRUNCATED)} since turn "
        f"{number(turn)}): their outcome is that of a part. Raise collect.new_tokens, or punish length (dapo).",
        turn,
        {"truncated": now},
    )


def fell(course: Course) -> Finding | None:
    """The reward lost most of what it had gained."""
    series = course.series("reward")
    window = max(2 * RECENT, len(series) // 20)
    if len(series) < 3 * window:
        return None
    values = [v for _, v in series]
    sums = [0.0, *itertools.accumulate(values)]
    means = [(sums[i + window] - sums[i]) / window for i in range(len(values) - window + 1)]
    at = max(range(len(means)), key=means.__getitem__)
    start, best, now = means[0], means[at], means[-1]
    top = values[at : at + window]
    certain = all(rose(below, top, FELL_SURE) for below in (values[:window], values[-window:]))
    if not certain or now > best - FELL_SHARE * (best - start):
        return None
    turn = series[at + window - 1][0]
    return Finding(
        "fell",
        f"The reward fell to {number(now)} from {number(best)} at turn {number(turn)} (means of {window} records; "
        f"{number(start)} at the start): most of what was gained is lost. Take the best checkpoint (trimtab export "
        "--checkpoint best), lower update.lr or take fewer passes, and look for what changed first in the curves.",
        turn,
        {"start": start, "best": best, "now": now},
    )


def held_out(course: Course) -> Finding | None:
    """The reward rises in training while held-out problems get worse."""
    seen = [e for e in course.evaluations if e[2] is not None]
    if len(seen) < 3:
        return None
    last = seen[-1]
    best = max(seen[:-1], key=lambda e: e[1])
    for reference, sure in ((seen[0], HELD_OUT_FIRST), (best, HELD_OUT_BEST)):
        error = ((reference[2] or 0.0) ** 2 + (last[2] or 0.0) ** 2) ** 0.5
        fell = reference[1] - last[1]
        rewards = course.series("reward")
        then = [v for t, v in rewards if t > reference[0]][: 2 * RECENT]
        now = [v for t, v in rewards if t <= last[0]][-2 * RECENT :]
        if fell > sure * error and fell > 0 and len(now) == len(then) == 2 * RECENT and rose(then, now):
            return Finding(
                "held-out",
                f"The mean on held-out problems fell from {number(reference[1])} at turn {number(reference[0])} to "
                f"{number(last[1])} at turn {number(last[0])}, while the reward in training rose from "
                f"{number(fmean(then))} to {number(fmean(now))}: the gain does not carry over. Take the best "
                "checkpoint (trimtab export --checkpoint best), or train on more and other problems.",
                reference[0],
                {"before": reference[1], "now": last[1]},
            )
    return None


def value(course: Course) -> Finding | None:
    """The critic is worse than a constant."""
    if len(course.values("explained")) < VALUE_RECORDS:
        return None
    turn, now = course.since("explained", lambda mean: mean < 0), course.now("explained")
    if turn is None or now is None:
        return None
    return Finding(
        "value",
        f"The value function explains {percent(now)} of the variance of its targets (below 0 since turn "
        f"{number(turn)}): it is worse than their mean, and so are the advantages made with it. Raise value_coef or "
        "the number of passes, scale the rewards, or lower gamma.",
        turn,
        {"explained_variance": now},
    )
