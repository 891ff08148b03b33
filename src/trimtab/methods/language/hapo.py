"""HAPO: the entropy of each token decides its temperature, its clip range and how much of the advantage it gets.

The signal h of a decision with entropy H, among the decisions of a batch, is 0 at a quantile of log H:

    d = log max(H, 1e-8) - quantile(log H),     h = d / max(d) for d > 0,  d / |min(d)| for d <= 0,     in [-1, 1]

so that c H^k in the place of H changes nothing. Four parts read it, each of which can be left out:

    temperature  T_t = T (1 + swing h)  of each draw, h by the quantile and range of the batch before
    credit       A_i = (R_i - mu) / (sigma + 1e-6), mu and sigma over the tokens of the group, not over its rows
    bound        eps_low (1 - a h) where h <= 0,  eps_high (1 + a h) where h > 0
    weight       A (1 + b h) where h > 0 and the ratio has left (1 - eps_low / 2, 1 + eps_high / 2), or where h <= 0
                 and it has not; A elsewhere

Where paper, released code and reason differ:

- sign: released code and the paper's equation 6 divide the low half by min(d) < 0, which makes the surest token +1 and
  h >= 0 everywhere, against the paper's own range and case split; the low branches then never act. The default is
  "signed"; "released" and the preset "official_code" have the other;
- the released statistics are those of each micro-batch, here of all rows of the update (or of the batch);
- the paper's temperature is neither scaled nor clamped, and swings by 0.1; here as in the code, by 0.05;
- the code takes the sampler's entropy from raw logits, here it is from logits over the temperature, as in training;
- the code has no importance weight for the temperature: neither has this. `logp_behavior` is of what was drawn from,
  `logp_old` and the ratio are at T, and `sampler_gap` shows the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.core.batch import Batch
from trimtab.core.errors import MethodError, nearest
from trimtab.core.kit import Kit
from trimtab.core.method import Method
from trimtab.core.piece import piece
from trimtab.core.registry import Neutral, method
from trimtab.core.terms import rows_of
from trimtab.methods.language.dapo import dapo
from trimtab.policies.adapted import AdaptedPolicy, entropy_of
from trimtab.stages.credit import centred, spread
from trimtab.stages.surrogate import Bound, Now

SIGNS = ("signed", "released")
MOMENTS = ("now", "old")
FLOOR, DRAWN_FLOOR = 1e-8, 1e-6  # of the entropy, in training and while drawing
NARROW = 1e-8  # a range below this is no range: every signal is then about 0
LARGEST = 5.0  # a group with an advantage this large falls back to GRPO's


class Range(NamedTuple):
    """Where log-entropies lie: their quantile, and how far they reach above and below it; nats of nats."""

    pivot: float
    above: float
    below: float


def range_of(entropy: Tensor, pivot: float) -> Range:
    """The range of entropies `[n]`, n >= 1; the quantile is an element, `sorted[round(pivot (n - 1))]`."""
    log = entropy.clamp_min(FLOOR).log()
    middle = log.kthvalue(1 + round(pivot * (len(log) - 1))).values
    d = log - middle
    return Range(float(middle), max(float(d.max()), NARROW), max(float(-d.min()), NARROW))


def signal_of(entropy: Tensor, known: Range, sign: str, floor: float = FLOOR) -> Tensor:
    """The signal h in [-1, 1] of entropies, elementwise; in [0, 1] with the released sign."""
    d = entropy.clamp_min(floor).log() - known.pivot
    low = d / known.below
    return torch.where(d > 0, d / known.above, -low if sign == "released" else low).clamp(-1, 1)


def _signal(batch: Batch, entropy: Tensor, pivot: float, sign: str) -> tuple[Tensor, Range | None]:
    """The signal of each of our policy's decisions, `[N, T]`, 0 elsewhere; and their range, None without any."""
    mine = batch.mask.bool() & rows_of(batch, "policy")[:, None]
    if not bool(mine.any()):
        return torch.zeros_like(entropy), None
    known = range_of(entropy[mine], pivot)
    return torch.where(mine, signal_of(entropy, known, sign), 0.0), known


def _signal_sane(options: Mapping[str, Any]) -> str | None:
    if options["sign"] not in SIGNS:
        return f"sign={options['sign']!r} is not known. {nearest(str(options['sign']), SIGNS)}"
    pivot = options.get("pivot", 0.5)
    return None if 0 <= pivot <= 1 else f"pivot={pivot} must be in [0, 1]: the quantile of the entropy where h is 0"


def _strength_sane(options: Mapping[str, Any]) -> str | None:
    value = options["strength"]
    if isinstance(value, (int, float)) and not 0 <= value <= 1:
        return f"strength={value} must be in [0, 1]; above 1 a bound or an advantage could change its sign"
    return None


@piece("annotate", at="update", reads=("mask",), writes=("entropy_signal",), wants=("entropy",), validate=_signal_sane)
def entropy_signal(kit: Kit, batch: Batch, now: Now, *, pivot: float = 0.8, sign: str = "signed") -> Batch:
    """`entropy_signal` [N, T] in [-1, 1], by the current policy's entropies and their range over the update."""
    h, _ = _signal(batch, now["entropy"], pivot, sign)
    kit.log("signal_below", ((h < 0) & batch.mask).double().sum() / batch.mask.sum().clamp_min(1))
    return batch.put(entropy_signal=h)


def nothing_seen(kit: Any, options: Mapping[str, Any]) -> dict[str, float]:
    """The range of a batch's log-entropies, before there is one."""
    return {}


@piece("annotate", reads=("action", "mask"), writes=("entropy_signal",), state={"range": nothing_seen},
       validate=_signal_sane)  # fmt: skip
def entropy_at_start(kit: Kit, batch: Batch, *, pivot: float = 0.8, sign: str = "signed") -> Batch:
    """`entropy_signal` as the policy saw the whole batch before its updates; keeps the range for the next draws."""
    h, known = _signal(batch, kit.evaluate("policy", batch, {"entropy"})["entropy"], pivot, sign)
    if known is not None:
        kit.state["range"] = known._asdict()
    return batch.put(entropy_signal=h)


def _swing_sane(options: Mapping[str, Any]) -> str | None:
    swing = options["swing"]
    if isinstance(swing, (int, float)) and not 0 <= swing < 1:
        return f"swing={swing} must be in [0, 1): the temperature lies in [T (1 - swing), T (1 + swing)]"
    return _signal_sane(options)


@piece("act", state={"range": nothing_seen}, validate=_swing_sane)
def adaptive_temperature(kit: Kit, actor: Any, *, swing: float = 0.05, sign: str = "signed") -> Any:
    """Decisions are drawn at `T (1 + swing h)`, h of each by the range of the batch before; at T in the first batch."""
    if not kit.state["range"]:
        return actor
    known = Range(**kit.state["range"])

    def factor(logits: Tensor) -> Tensor:
        return 1 + swing * signal_of(entropy_of(logits), known, sign, DRAWN_FLOOR)

    return AdaptedPolicy(actor, factor)


@piece("credit", reads=("reward", "group", "mask"), writes=("advantage",))
def token_average(kit: Kit, batch: Batch) -> Batch:
    """`A_i = (R_i - mu) / (sigma + 1e-6)`, mean and population std over all *tokens* of the group; they sum to 0.

    A group with an `|A| >= 5` gets GRPO's instead, over rows with the unbiased std. All-equal groups and groups of one
    get exactly 0.
    """
    score, group = batch.score(), batch.by("group")
    length = batch.mask.sum(1).to(score.dtype)
    tokens = group.sum(length).clamp_min(1)
    centre = score - group.sum(score * length) / tokens
    credit = centre / ((group.sum(centre.square() * length) / tokens).sqrt() + 1e-6)
    large = group.max(credit.abs() * (length > 0)) >= LARGEST
    rows = centred(score, group) / (group.std(score) + 1e-6)
    kit.log("fallback", large.double().mean())
    return spread(batch, torch.where(large, rows, credit).masked_fill(group.same(score), 0.0))


@piece("part", reads=("entropy_signal",), validate=_strength_sane)
def widened(
    batch: Batch, now: Now, ratio: Tensor, *, inner: Callable[..., Bound], strength: float = 1.0
) -> Bound:  # fmt: skip
    """A wrap: more room below for sure decisions, `eps_low (1 - s h)`, above for unsure ones, `eps_high (1 + s h)`."""
    low, high = inner(batch, now, ratio)
    h = batch.entropy_signal
    return Bound(1 - (1 - low) * (1 - strength * h.clamp(max=0)), 1 + (high - 1) * (1 + strength * h.clamp_min(0)))


@piece("part", reads=("entropy_signal",), validate=_strength_sane)
def redistributed(batch: Batch, now: Now, ratio: Tensor, bound: Bound, *, strength: float = 1.0) -> Tensor:
    """`1 + s h` for unsure decisions that moved and sure ones that did not, else 1; moved is half of the bound."""
    h = batch.entropy_signal
    still = (ratio > 1 - (1 - bound.low) / 2) & (ratio < 1 + (bound.high - 1) / 2)
    return torch.where(torch.where(h > 0, ~still, still), 1 + strength * h, 1.0)


@method(
    world="language",
    title="From Uniform to Heterogeneous: Tailoring Policy Optimization to Every Token's Nature (HAPO)",
    arxiv="2509.16591",
    base=dapo,
    case="text",
    neutral=Neutral(
        {"swing": 0.0, "token_credit": False, "bound": 0.0, "redistribute": 0.0},
        level="exact",
        why="the signal is still made, and multiplied by 0 wherever it is read",
    ),
    presets={"official_code": {"sign": "released", "clip_high": 0.2, "dual": 10.0}},
    confusable="other papers abbreviate themselves HAPO too: history-aware and hindsight policy optimization.",
)
def hapo(
    base: Method,
    *,
    swing: float | None = 0.05,
    token_credit: bool = True,
    bound: float | None = 1.0,
    redistribute: float | None = 1.0,
    pivot: float = 0.8,
    sign: str = "signed",
    entropy: str = "now",
    clip_low: float | None = None,
    clip_high: float | None = None,
    dual: float | None = None,
) -> Method:
    """Edits to dapo: temperature, credit, bound and weight of each token follow its entropy signal h in [-1, 1].

    h is 0 at the `pivot` quantile of log-entropy, 1 at the least sure token, -1 at the surest. None leaves a part out,
    so that another method's may stand there; 0 keeps it without effect.

    swing: T (1 + swing h) while sampling, [0, 1). token_credit: normalise the reward over the tokens of a group rather
    than over its rows. bound: h widens the clip, up for unsure tokens and down for sure ones, by this share in [0, 1].
    redistribute: A (1 + redistribute h) for unsure tokens that have moved and sure ones that have not, [0, 1]. sign:
    "signed" as the paper describes h, or "released" as its code and equation 6 have it, where h is never negative.
    entropy: "now", of the current policy at each update as released, or "old", of the policy at the start of the batch,
    for one forward pass a batch instead of one an update. clip_low, clip_high, dual: as in dapo; None leaves its own.

    The released scripts clip at 0.2 on both sides, with a dual clip at 10 (preset "official_code"); their flags for
    dynamic sampling are read by nobody, so `hapo(preset="official_code")+dapo(batches=0)` is that run. As released the
    sampler's statistics are passed under a name that nothing takes, so the adaptive temperature cannot have run
    unmodified. With one update a batch the ratio is 1: sure tokens are damped, unsure ones are not amplified, and the
    bound is inert; the paper has 16.
    """
    if entropy not in MOMENTS:
        raise MethodError(f"hapo has entropy={entropy!r}. {nearest(entropy, MOMENTS)}")
    made = base.swap("credit", token_average()) if token_credit else base
    for path, value in (("bound.low", clip_low), ("bound.high", clip_high), ("shape.dual", dual)):
        made = made if value is None else made.swap(f"surrogate.{path}", value)
    signalled = bound is not None or redistribute is not None
    if swing is not None or (signalled and entropy == "old"):
        made = made.then(entropy_at_start(pivot=pivot, sign=sign))
    if signalled and entropy == "now":
        made = made.then(entropy_signal(pivot=pivot, sign=sign), track=made.tracks[0].name)
    if swing is not None:
        made = made.then(adaptive_temperature(swing=swing, sign=sign))
    if bound is not None:
        made = made.wrap("surrogate.bound", widened(strength=bound))
    return made if redistribute is None else made.swap("surrogate.weight", redistributed(strength=redistribute))
