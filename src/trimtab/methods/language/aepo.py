"""AEPO: correct answers drawn hotter or colder than the policy are imitated, so that its entropy is held at a target.

A turn, on top of grpo's:

    T       high if H <= target else low                                    H the policy's entropy, nats a token
    ask     the first `share` of the batch's prompts again, at temperature T
    keep    the right answers among these; k = samples of them, or samples // 2 (floor) if H > target
    learn   with advantage 1, in the place of k of the batch's rows; through the same loss, ratio and clip

Imitating right answers of pi_T pulls the policy towards it, `E[gradient towards the logits] = pi_T - pi` where all are
right: up in entropy for T > 1, down for T < 1. They are treated as if pi had drawn them: `logp_old` is at temperature
1, whatever T was, and that mismatch is the signal. There is no coefficient: it is k over the rows of the batch.

Where paper and released code differ:

- paper: R > 0 keeps every right answer (`select="reward"`); code: advantage > 0.05 keeps those of mixed groups only,
  so prompts that are solved exert no control ("advantage");
- paper: H of the policy that draws (`measure="rollouts"`, here the mean of -log pi over this batch's own draws); code:
  that of all rows learned from in the turn before, re-rolls included, and 0 at first ("trained");
- code: the first k rows of the batch are replaced, which are answers to the very prompts that were asked again
  (`place="first"`); here k random ones ("random"). The paper's alpha is not offered beside;
- without any right re-roll the code fails; here the batch stays as it is.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from trimtab.core.batch import Batch
from trimtab.core.errors import MethodError, TrimtabWarning, nearest
from trimtab.core.kit import Kit
from trimtab.core.method import Method
from trimtab.core.piece import Schedule, piece
from trimtab.core.registry import Neutral, method
from trimtab.core.terms import mask_of
from trimtab.methods.language.bases import grpo
from trimtab.stages.again import again, has, noted
from trimtab.stages.around import outermost_adds
from trimtab.stages.surrogate import Now

CHOICES = {"select": ("reward", "advantage"), "measure": ("rollouts", "trained"), "place": ("random", "first")}
MIXED = 0.05  # the advantage above which the released code keeps a re-roll
NEARER = 0.98  # a mean gap that shrinks by less than this from one window to the next comes no nearer
CLOSE = 0.1  # of the target: that near is reached


def at_start(kit: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The controller: the entropy measured last and of how many updates, the rows to replace, and its watch."""
    return {"entropy": 0.0, "turn": -1, "updates": 0, "rows": 0, "side": 0, "turns": 0, "gap": 0.0, "before": math.inf,
            "said": False}  # fmt: skip


def watched(controller: dict[str, Any], gap: float, side: int, patience: int) -> tuple[dict[str, Any], bool]:
    """The controller after a turn on this side (1 hot, -1 cold), and whether it is held at its bound.

    Held: two windows of `patience` turns on one side, in the second of which the mean gap is no smaller (by 2%).
    """
    c = dict(controller)
    if side != c["side"]:
        c |= {"side": side, "turns": 0, "gap": 0.0, "before": math.inf}
    c["turns"], c["gap"] = c["turns"] + 1, c["gap"] + gap
    held = False
    if c["turns"] == patience:
        mean = c["gap"] / patience
        held = mean > NEARER * c["before"]
        c |= {"turns": 0, "gap": 0.0, "before": mean}
    return c, held


def _known(options: Mapping[str, Any]) -> str | None:
    for name, values in CHOICES.items():
        if name in options and options[name] not in values:
            return f"{name}={options[name]!r} is not known. {nearest(str(options[name]), values)}"
    return None


def _sane(options: Mapping[str, Any]) -> str | None:
    low, high, target = options["low"], options["high"], options["target"]
    if not 0 < low <= high < math.inf:
        return f"low={low} and high={high} must be temperatures with 0 < low <= high: hot re-rolls raise the entropy"
    if not isinstance(target, Schedule) and not 0 < target < math.inf:
        return f"target={target} must be an entropy above 0, in nats a token"
    if not 0 < options["share"] <= 1:
        return f"share={options['share']} must be in (0, 1]: the part of the prompts that is asked again"
    for name, least in (("samples", 0), ("patience", 1)):
        if options[name] < least:
            return f"{name}={options[name]} must be at least {least}"
    return _known(options)


@piece("collect", reads=("logp_behavior", "reward", "mask", "group"), writes=("tempered",),
       state={"controller": at_start}, validate=_sane, adds_rows=True,
       fits=outermost_adds("asks prompts of its batch again"))  # fmt: skip
def rerolled(
    kit: Kit,
    *,
    inner: Callable[[], Batch],
    target: float = 0.75,
    samples: int = 60,
    high: float = 1.2,
    low: float = 0.8,
    share: float = 0.25,
    measure: str = "rollouts",
    patience: int = 20,
) -> Batch:
    """A wrap: the rows of the collect inside, and its first prompts asked again hotter or colder, `tempered` [N].

    Warns once, and goes on, where the target is not reached: see `watched`. Logs `controlled_entropy`,
    `reroll_temperature`, and `held_at` (1: held at `high`, -1: at `low`, 0: not).
    Raises MethodError where the collect inside draws at another temperature than 1.
    """
    assert isinstance(inner, partial)
    collect: Any = inner.func  # a piece is handed over bound to its kit, and is asked again with another
    rows, drawn = noted(kit, collect)
    if "temperature" in rows and not bool((rows.temperature == 1).all()):
        raise MethodError(
            f"aepo measures and holds the entropy at temperature 1, and this collect draws at "
            f"{float(rows.temperature.max())}; set collect.temperature=1"
        )
    controller = kit.state["controller"]
    drawn_entropy = float(-(rows.logp_behavior * rows.mask).sum() / rows.mask.sum().clamp_min(1))
    entropy = drawn_entropy if measure == "rollouts" else controller["entropy"]
    cold = entropy > target
    controller, held = watched(controller, abs(entropy - target), -1 if cold else 1, patience)
    held = held and abs(entropy - target) > CLOSE * target
    controller["rows"] = samples // 2 if cold else samples
    if held and not controller["said"]:
        warnings.warn(_unreached(target, entropy, cold, low if cold else high, patience), TrimtabWarning, stacklevel=2)
        controller["said"] = True
    kit.state["controller"] = controller
    kit.log("controlled_entropy", entropy)
    kit.log("held_at", float(held) * (-1 if cold else 1))
    rows = rows.put(tempered=torch.zeros_like(rows.mask[:, 0], dtype=torch.bool))
    if samples == 0:
        return rows
    temperature = low if cold else high
    few = max(1, int(share * rows.by("group").size))
    once = {name: value for name, value in (("revisit", 1.0), ("batches", 0)) if has(collect, name)}
    hot = again(kit, collect, drawn[:few], prompts=few, temperature=temperature, **once)
    kit.log("reroll_temperature", temperature)
    kit.log("reroll_reward", hot.score().mean())
    if "temperature" in hot:  # they are read as the policy's own, at temperature 1
        hot = hot.put(temperature=torch.ones_like(hot.temperature))
    return Batch.cat([rows, hot.put(tempered=torch.ones_like(hot.mask[:, 0], dtype=torch.bool))])


def _unreached(target: float, entropy: float, cold: bool, bound: float, patience: int) -> str:
    name, more, other = ("low", "lower", "raise") if cold else ("high", "raise", "lower")
    return (
        f"aepo: the target entropy {target:g} is not reached: for {2 * patience} batches every re-roll was drawn at "
        f"{name}={bound:g}, its bound, and the entropy stays at {entropy:.3g} nats a token. To reach it {more} {name} "
        f"or raise samples; or {other} target. The run goes on."
    )


@piece("credit", reads=("tempered", "reward", "mask"), writes=("advantage",), validate=_known)
def imitated(batch: Batch, *, inner: Callable[[Batch], Batch], select: str = "reward") -> Batch:
    """A wrap: re-rolls get 1 where they are kept, `R > 0` or an advantage inside above 0.05, else 0."""
    advantage = inner(batch).advantage
    kept = batch.score() > 0 if select == "reward" else (advantage * batch.mask).amax(1) > MIXED
    one = (kept[:, None] & batch.mask.bool()).to(advantage.dtype)
    return batch.put(advantage=torch.where(batch.tempered[:, None], one, advantage))


@piece("select", reads=("tempered", "advantage"), state={"controller": at_start}, validate=_known)
def replaced(kit: Kit, batch: Batch, *, place: str = "random") -> Batch:
    """k kept re-rolls in the place of k rows of the batch, which keeps its size; the other re-rolls are dropped."""
    own = (~batch.tempered).nonzero().squeeze(1)
    kept = (batch.tempered & (batch.advantage > 0).any(1)).nonzero().squeeze(1)
    k = min(kit.state["controller"]["rows"], len(kept), len(own))
    kit.log("replaced", k / len(own))
    if len(own) == len(batch):
        return batch
    if place == "random":
        kept, own = (x[torch.randperm(len(x), generator=kit.rng("replaced")).to(x.device)] for x in (kept, own))
    return batch.take(torch.cat([kept[:k], own[k:].sort().values]))


@piece("annotate", at="update", reads=("mask",), wants=("logp",), state={"controller": at_start})
def trained_entropy(kit: Kit, batch: Batch, now: Now) -> Batch:
    """Keeps the mean of -log pi over the decisions that are learned from, averaged over the updates of this turn."""
    m = mask_of(batch).to(now["logp"].dtype)
    value = float(-(now["logp"] * m).sum() / m.sum().clamp_min(1))
    c = dict(kit.state["controller"])
    if c["turn"] != kit.clock.turns:
        c |= {"turn": kit.clock.turns, "updates": 0, "entropy": 0.0}
    c["entropy"] = (c["entropy"] * c["updates"] + value) / (c["updates"] + 1)
    c["updates"] += 1
    kit.state["controller"] = c
    return batch


@method(
    world="language",
    title="AEPO: Arbitrary Entropy Policy Optimization",
    arxiv="2510.08141",
    base=grpo,
    case="text",
    neutral=Neutral({"samples": 0}, level="exact", why="no row is replaced, and then nothing is asked again"),
    presets={"official_code": {"select": "advantage", "measure": "trained", "place": "first", "target": 0.5,
                               "dual": 3.0}},
)  # fmt: skip
def aepo(
    base: Method,
    *,
    target: float = 0.75,
    samples: int = 60,
    high: float = 1.2,
    low: float = 0.8,
    share: float = 0.25,
    select: str = "reward",
    measure: str = "rollouts",
    place: str = "random",
    patience: int = 20,
    dual: float | None = None,
) -> Method:
    """Edits to grpo: some prompts are asked again hotter or colder, and right answers replace rows, with advantage 1.

    T is `high` while the entropy is at most `target`, else `low`; k rows of the batch are replaced, half as many above
    the target. That holds the entropy at any target within reach, without an entropy term.

    target: nats a token at temperature 1; 0.75 is best in the paper's sweep, 0.5 in its script. samples: k; 60 of 2560
    in the paper, "as few as hold the entropy"; 0 is grpo. high, low: temperatures. share: of the prompts that are
    asked again, at least one prompt; it adds as much to the cost of sampling. select: "reward" keeps every right
    re-roll (paper), "advantage" those of mixed groups (code). measure: "rollouts" or "trained". place: "random" rows
    are replaced, or the "first" (code). patience: batches; where in two such windows the controller stood at one bound
    and the entropy came no nearer, a warning says which bound. dual: verl's dual clip, 3 in the released code.
    """
    made = base.wrap("collect", rerolled(target=target, samples=samples, high=high, low=low, share=share,
                                         measure=measure, patience=patience))  # fmt: skip
    made = made.wrap("credit", imitated(select=select)).then(replaced(place=place))
    if measure == "trained":
        made = made.then(trained_entropy())
    return made if dual is None else made.swap("surrogate.shape.dual", dual)
