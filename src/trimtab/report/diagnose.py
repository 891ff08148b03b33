"""What the numbers of a run suggest, in plain sentences: what was seen, and what to try.

Rules of thumb: a sentence is a reason to look, not a verdict. Each rule, its threshold and what to try stand in
`docs/diagnosis.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from trimtab.report import rules_policy as policy
from trimtab.report import rules_steps as steps
from trimtab.report.course import RECENT, Course, Finding

Records = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Rule:
    """A named check. about: what it looks at, in words. reads: the series without which it cannot say anything."""

    kind: str
    about: str
    check: Callable[[Course], Finding | None]
    reads: tuple[str, ...] = ()


RULES = (  # gravest first
    Rule("not-finite", "numbers that are not finite", steps.not_finite),
    Rule("failures", "failures of the environment", steps.failures, ("failures",)),
    Rule("gap", "the gap between sampler and trainer", steps.gap, ("gap",)),
    Rule("grad-norm", "peaks of the gradient norm", steps.grad_norm, ("grad_norm",)),
    Rule("kl", "the KL to the old policy or the reference", steps.kl, ("kl|kl_old",)),
    Rule("noise", "entropy that rises out of bounds", policy.noise, ("entropy",)),
    Rule("fell", "a reward that fell from its best", policy.fell, ("reward",)),
    Rule("held-out", "held-out problems against the reward in training", policy.held_out, ("evaluations", "reward")),
    Rule("entropy", "collapse of the entropy", policy.entropy, ("entropy", "reward")),
    Rule("width", "the spread of the actions", policy.width, ("action_width|action_entropy", "reward")),
    Rule("value", "the explained variance of the value function", policy.value, ("explained",)),
    Rule("clip", "the clip rate", steps.clipped, ("clip",)),
    Rule("dead", "dead groups", policy.dead, ("dead",)),
    Rule("truncated", "responses at the length limit", policy.truncated, ("truncated",)),
    Rule("one-sided", "clipping on one side", steps.one_sided, ("clip_low", "clip_high")),
    Rule("never-clipped", "a bound that is never met", steps.never_clipped, ("clip", "updates")),
)


def diagnose(history: Records, evaluations: Records = ()) -> list[str]:
    """Sentences about what looks wrong in the records of `metrics.jsonl` and `eval.jsonl`, gravest first.

    Empty when nothing does. Rates are means of the last 5 records, and nothing is said of fewer.
    """
    return [found.sentence for found in findings(Course.of(history, evaluations))]


def findings(course: Course, mute: Collection[str] = ()) -> list[Finding]:
    """What every rule that is not muted sees in a course, gravest first."""
    found = [rule.check(course) for rule in RULES if rule.kind not in mute] if len(course) else []
    return [f for f in found if f is not None]


def checked(course: Course, mute: Collection[str] = ()) -> list[Rule]:
    """The rules for which the course holds enough of what they read; the others could not have said anything."""

    def there(name: str) -> bool:
        if name == "updates":
            return (course.updates_a_turn() or 0.0) >= 2
        return len(course.evaluations) >= 3 if name == "evaluations" else len(course.series(name)) >= RECENT

    able = [r for r in RULES if all(any(there(n) for n in read.split("|")) for read in r.reads)] if len(course) else []
    return [rule for rule in able if rule.kind not in mute]


def summary(course: Course, mute: Collection[str] = ()) -> dict[str, Any]:
    """For `findings.json`: `findings`, gravest first, each with kind, turn, sentence and numbers; `checked`, the kinds
    of the rules that had something to look at.
    """
    return {
        "findings": [f.record() for f in findings(course, mute)],
        "checked": [rule.kind for rule in checked(course, mute)],
    }
