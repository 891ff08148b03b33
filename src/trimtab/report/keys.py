"""What the numbers of a turn are called, in which unit, and which of them belong in one picture.

Every numeric key of a record is shown. A key is normalised (`policy/grad-norm` -> `policy_grad_norm`) and goes to the
first panel one of whose patterns matches; a key no panel claims gets a picture of its own, under its own name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from trimtab.report.words import is_number

CLOCK = frozenset({"turn", "turns", "updates", "decisions", "rows", "seconds", "time"})
REWARD = ("reward", "reward_low", "reward_high")
LOSS, GAP = "Loss", "Sampler and trainer: gap"


@dataclass(frozen=True)
class Panel:
    """One picture: its title, the unit of its axis, and the keys it shows as `(pattern, label)` in drawing order.

    share: values are in [0, 1] and shown in percent; log: the axis may be logarithmic; hint: how to read it.
    """

    title: str
    unit: str
    series: tuple[tuple[str, str], ...]
    share: bool = False
    log: bool = False
    hint: str = ""


PANELS: tuple[Panel, ...] = (
    Panel(
        "Entropy",
        "nats per decision",
        ((r"entropy(_mean)?", ""), (r"(low|min)_entropy|entropy_(low|min)", "lowest")),
        hint="How undecided the policy is. A slow fall is learning; at 0 it no longer explores.",
    ),
    Panel(
        "Entropy: where updates push it",
        "nats x advantage",
        (
            (r"entropy_push", "both"),
            (r"entropy_push_positive", "advantages above 0"),
            (r"entropy_push_negative", "advantages below 0"),
        ),
        hint="To first order: minus the covariance of log-probability and advantage, split by the advantage's sign. "
        "Below 0 the entropy falls.",
    ),
    Panel(
        "Spread of the actions",
        "width, or nats",
        ((r"action_width", "width"), (r"action_entropy", "entropy")),
        hint="How widely the policy acts: the side of the cube its actions fill, or the entropy of numbered actions.",
    ),
    Panel(
        "Clip rate",
        "% of decisions",
        (
            (r"clip(_rate|_frac|_fraction|ped)?_(low|lower|min)", "below the bound"),
            (r"clip(_rate|_frac|_fraction|ped)?_(high|upper|max)", "above the bound"),
            (r"clip(_rate|_frac|_fraction|ped)?|clip_ratio", "either side"),
        ),
        share=True,
        hint="Decisions whose gradient the bound removed. A few percent is usual; half is too much.",
    ),
    Panel(
        "Gradient norm",
        "norm before clipping",
        ((r"grad(ient)?_norm", ""),),
        log=True,
        hint="Shows that something is learned. Sudden peaks are the thing to look for.",
    ),
    Panel(
        "Dead groups",
        "% of groups",
        (
            (r"(share_of_)?dead(_groups?)?|(all_)?equal_groups?", "equal rewards"),
            (r"dead_right", "all right"),
            (r"dead_wrong", "all wrong"),
            (r"silent_groups", "equal advantages"),
        ),
        share=True,
        hint="Groups whose responses all got the same reward: they teach nothing. Right is a reward of 1 or more, "
        "wrong one of 0 or less.",
    ),
    Panel(
        "Response length",
        "decisions",
        (
            (r"(response_|completion_)?lengths?(_mean)?", "mean"),
            (r"(response_|completion_)?length_max|max_length", "longest"),
            (r"(response_|completion_)?length_min|min_length", "shortest"),
        ),
    ),
    Panel(
        "Unfinished responses",
        "% of rows",
        ((r"unfinished|truncated|cut|clipped_responses", ""),),
        share=True,
        hint="Responses that met the length limit before they ended.",
    ),
    Panel(
        GAP,
        "nats per decision",
        (
            (r"(kl_)?sampler(_gap|_trainer)?|gap|sampler_trainer_gap|kl_(behaviou?r|trainer)|mismatch", "mean"),
            (r"(sampler|mismatch)_kl", "estimate of the KL"),
            (r"(sampler|mismatch)_max", "largest"),
        ),
        log=True,
        hint="The mean difference, either way, between the log-probabilities that the sampler reported and the "
        "trainer's at the start of the update. Should stay near 0.",
    ),
    Panel("KL to the reference", "nats per decision", ((r"(kl_)?(ref|reference)(_kl)?|kl", ""),)),
    Panel(
        "Preferred responses",
        "% of pairs",
        ((r"preferred_right", ""),),
        share=True,
        hint="Pairs whose chosen response gained more over the reference than the rejected one. A half is chance.",
    ),
    Panel("KL to the old policy", "nats per decision", ((r"(approx_kl|kl_old|old_kl)", ""),), log=True),
    Panel(
        "Value: explained variance",
        "share of the targets' variance",
        ((r"explained_variance", ""),),
        hint="1 is a perfect critic; 0 one that knows the mean alone; below 0 it is worse than that.",
    ),
    Panel(
        "Importance ratio",
        "new / old probability",
        ((r"ratio(_mean)?", "mean"), (r"ratio_max", "largest"), (r"ratio_min", "smallest")),
    ),
    Panel("Spread of rewards", "standard deviation", ((r"reward_(std|spread|sd)", ""),)),
    Panel(LOSS, "loss", ((r"loss|surrogate|(policy|total)_loss", ""),)),
    Panel(
        "Failures",
        "responses per turn",
        ((r"failures?(_total)?", "all"), (r"failures?_.+", "")),
        hint="Responses the environment could not score.",
    ),
    Panel(
        "Age",
        "policy versions",
        ((r"age(_mean)?", "mean"), (r"age_max", "oldest")),
        hint="How many updates happened between sampling a row and learning from it.",
    ),
    Panel(
        "Held-out problems, while training",
        "mean and its interval",
        ((r"held_out", "mean"), (r"held_out_low", "low end"), (r"held_out_high", "high end")),
        hint="Measured by a held_out probe, in the turns in which it ran.",
    ),
    Panel("Held-out pass@k", "share of problems", ((r"held_out_pass_\d+", ""),), share=True),
    Panel("Gradients too long", "% of gradients", ((r"grad_clipped", ""),), share=True),
    Panel("Learning rate", "step size", ((r"lr|learning_rate", ""),)),
    Panel("Speed", "decisions per second", ((r"(tokens|decisions)_(per|a)_second|tokens_s|throughput", ""),)),
)

_SERIES = {panel.title: [pattern for pattern, _ in panel.series] for panel in PANELS}
# Short names that the live view and the diagnosis look up.
_KNOWN: Mapping[str, str] = {
    "reward": r"reward(_mean)?|mean_reward|return(_mean)?",
    "entropy": _SERIES["Entropy"][0],
    "clip_low": _SERIES["Clip rate"][0],
    "clip_high": _SERIES["Clip rate"][1],
    "clip": _SERIES["Clip rate"][2],
    "grad_norm": _SERIES["Gradient norm"][0],
    "dead": _SERIES["Dead groups"][0],
    "length": _SERIES["Response length"][0],
    "dead_right": _SERIES["Dead groups"][1],
    "dead_wrong": _SERIES["Dead groups"][2],
    "gap": _SERIES[GAP][0],
    "gap_kl": _SERIES[GAP][1],
    "gap_max": _SERIES[GAP][2],
    "kl": _SERIES["KL to the reference"][0],
    "kl_old": _SERIES["KL to the old policy"][0],
    "push_positive": r"entropy_push_positive",
    "push_negative": r"entropy_push_negative",
    "action_width": r"action_width",
    "action_entropy": r"action_entropy",
    "explained": _SERIES["Value: explained variance"][0],
    "truncated": _SERIES["Unfinished responses"][0],
    "failures": _SERIES["Failures"][0],
    "age": _SERIES["Age"][0],
    "speed": _SERIES["Speed"][0],
    "loss": r"(policy_|total_)?loss",
    "preferred": _SERIES["Preferred responses"][0],
}
_PREFIX = r"(?:(?:policy|probe|train|update|surrogate|credit|stats|batch|rollout|sampling)_)*"


def normal(key: str) -> str:
    """A key in one spelling: lower case, words joined by `_`."""
    return re.sub(r"[^a-z0-9]+", "_", key.lower()).strip("_")


@lru_cache(maxsize=4096)
def _matches(pattern: str, key: str) -> bool:
    return re.fullmatch(f"{_PREFIX}(?:{pattern})", normal(key)) is not None


def flat(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record, nested mappings joined by `/`, without the clock; a bool, a text or a null is none."""
    out: dict[str, float] = {}
    for key, value in record.items():
        if key in CLOCK or key == "not_finite":
            continue
        if isinstance(value, Mapping):
            out.update({f"{key}/{k}": v for k, v in flat(value).items()})
        elif is_number(value):
            out[str(key)] = float(value)
    return out


def look_up(record: Mapping[str, Any], name: str) -> float | None:
    """The value of a short name (`entropy`, `grad_norm`, `clip`, ...) in a record, whatever it is spelled like.

    `clip` is the sum of the two sides where only those are recorded; `failures` the sum over kinds.
    """
    numbers = record if name in record and is_number(record[name]) else flat(record)
    if name in numbers:
        return float(numbers[name])
    for key, value in numbers.items():
        if _matches(_KNOWN[name], key):
            return value
    if name == "clip":
        sides = [look_up(record, side) for side in ("clip_low", "clip_high")]
        return sum(x for x in sides if x is not None) if any(x is not None for x in sides) else None
    if name == "failures":
        kinds = failure_kinds(record)
        return sum(kinds.values()) if kinds else None
    return None


@lru_cache(maxsize=4096)
def _names_of(key: str) -> tuple[str, ...]:
    return tuple(name for name, pattern in _KNOWN.items() if _matches(pattern, key))


def short(record: Mapping[str, Any]) -> dict[str, float]:
    """Everything in a record that has a short name, by that name, as `look_up` finds it; `dead` is a share."""
    numbers, out = flat(record), dict[str, float]()
    for key, value in numbers.items():
        for name in _names_of(key):
            out.setdefault(name, value)
    out |= {name: numbers[name] for name in numbers.keys() & _KNOWN.keys()}
    made = {"clip": look_up(record, "clip"), "failures": look_up(record, "failures"), "dead": dead_share(record)}
    return {name: value for name, value in {**out, **made}.items() if value is not None}


def failure_kinds(record: Mapping[str, Any]) -> dict[str, float]:
    """How many responses failed in this turn, by kind: `failures: {kind: n}` or `failures/kind: n`."""
    return {
        key.split("/", 1)[1]: value
        for key, value in flat(record).items()
        if "/" in key and normal(key.split("/", 1)[0]) in ("failures", "failure")
    }


def dead_share(record: Mapping[str, Any]) -> float | None:
    """The share of groups whose rewards are all equal, in [0, 1]; above 1 it is a count, divided by `groups`."""
    dead = look_up(record, "dead")
    if dead is None or dead <= 1:
        return dead
    groups = record.get("groups")
    return dead / groups if is_number(groups) and groups >= dead else None


def arrange(records: Iterable[Mapping[str, Any]]) -> list[tuple[Panel, list[tuple[str, str]]]]:
    """Every numeric key but the reward, sorted into panels: `[(panel, [(key, label), ...]), ...]`.

    Known panels come first, in their order, each with that number of every track (`critic/grad_norm`); then one panel
    for each family of other keys (`seconds/sample` and `seconds/update` share one), in order of first appearance.
    """
    names = list(dict.fromkeys(key for record in records for key in flat(record)))
    rest = [n for n in names if not _matches(_KNOWN["reward"], n) and normal(n) not in REWARD]
    out: list[tuple[Panel, list[tuple[str, str]]]] = []
    for panel in PANELS:
        picked: list[tuple[str, str]] = []
        for pattern, label in panel.series:
            hits = [n for n in rest if _matches(pattern, n) or _matches(pattern, _tail(n))]
            tails = {_tail(n) for n in hits}
            one = len(hits) == 1 and _matches(pattern, hits[0])
            picked += [(n, label if one else _tail(n) if len(tails) == len(hits) > 1 else n) for n in hits]
            rest = [n for n in rest if n not in hits]
        if len(picked) == 1 and picked[0][1] in ("mean", "all", "equal rewards"):
            picked = [(picked[0][0], "")]
        if picked:
            out.append((panel, picked))
    families: dict[str, list[str]] = {}
    for name in rest:
        families.setdefault(name.rsplit("/", 1)[0] if "/" in name else name, []).append(name)
    for family, members in families.items():
        panel = Panel(_title(family), "value", ())
        out.append((panel, [(n, "" if len(members) == 1 else n.rsplit("/", 1)[-1]) for n in members]))
    return out


def _tail(key: str) -> str:
    """A key without the track, or the family, that it belongs to."""
    return key.rsplit("/", 1)[-1]


def _title(key: str) -> str:
    words = key.replace("_", " ").replace("/", " / ").strip()
    return words[:1].upper() + words[1:]


def column(records: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """One key over the records, nan where it is absent. `/` reaches into nested mappings."""
    return [flat(record).get(key, float("nan")) for record in records]
