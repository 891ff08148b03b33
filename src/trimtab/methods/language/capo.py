"""CAPO: decisions whose own update would move the policy or the objective too far are left out of the update.

Before each update, from the current policy's last hidden states x and its K most probable tokens, a second-order model
of the last layer predicts for every decision, as if its gradient alone made the step (see `stages/curvature.py`):

    m_F   the change of the policy,      (lr d)^2 / 2                                    kept where m_F < fisher
    m_H   the change of the objective,   lr A d + lr^2 A (d^2 - Var_pi(u)) / 2           and |m_H| < hessian

with a model of the optimiser that lives across updates: Adam's moments of each vocabulary row, or plain gradient steps.
The loss is the base's; only `keep` shrinks, so its denominators are those of what is kept.

Where paper, released code and reason differ:

- thresholds scale with the step size, |x|^2, the advantage and K, and do not carry over between models. By default they
  are calibrated: the largest, over the first `warmup` updates, of a percentile of m_F and |m_H| among decisions with an
  advantage; nothing is left out until then. The released numbers are presets, each for the base it was tuned on:
  "official_code" on grpo, "dr_capo" on dr_grpo, "rein_capo" on REINFORCE without a baseline;
- g is not divided by the number of decisions, as released, though the optimiser sees the loss's mean: with plain
  gradient steps m_F is too large by that number squared. `normalise` multiplies g by the decision's weight in the loss;
- a sampled token outside of the top K has v = -pi in the code; here it takes the place of the least probable;
- the KxK Fisher matrix of the code is never made; rejection of whole rows and batches (off there) is not offered;
- x is divided by the temperature of the row, so that the model is exact where the temperature is not 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.core.batch import Batch
from trimtab.core.errors import MethodError, nearest
from trimtab.core.kit import Kit
from trimtab.core.method import Method
from trimtab.core.piece import Piece, Schedule, piece
from trimtab.core.registry import Neutral, method
from trimtab.core.terms import mask_of, weights
from trimtab.methods.language.bases import grpo
from trimtab.policies.readout import TOP
from trimtab.stages.around import text_only
from trimtab.stages.curvature import Adam, Decisions, Moments, as_state, decisions, effect, learned, predicted
from trimtab.stages.surrogate import Now

MODELS = ("auto", "adam", "sgd")


def nothing_learned(kit: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The moments of the modelled optimiser before its first update."""
    return {}


def uncalibrated(kit: Any, options: Mapping[str, Any]) -> dict[str, float]:
    """How many updates were seen, and the largest percentiles in them."""
    return {"updates": 0, "fisher": 0.0, "hessian": 0.0}


def _sane(options: Mapping[str, Any]) -> str | None:
    for name in ("fisher", "hessian"):
        value = options[name]
        if isinstance(value, (int, float)) and not value >= 0:
            return f"{name}={value} must be a threshold of at least 0, or None to calibrate it"
    if not 0 < options["percentile"] <= 100:
        return f"percentile={options['percentile']} must be in (0, 100]"
    if options["warmup"] < 1:
        return f"warmup={options['warmup']} must be at least 1 update"
    if not 2 <= options["k"] <= TOP:
        return f"k={options['k']} must be from 2 to {TOP}, the number of most probable tokens looked at"
    if options["optimizer"] not in MODELS:
        return f"optimizer={options['optimizer']!r} is not known. {nearest(str(options['optimizer']), MODELS)}"
    return None


def _number(kit: Kit, value: Any) -> float:
    return float(value(kit.clock) if isinstance(value, Schedule) else value)


def step_size(kit: Kit, update: Piece) -> float:
    """The step size of this update: its `lr`, times the factors of `scheduled` wraps."""
    lr = _number(kit, update.find(["lr"]))
    return lr * math.prod(_number(kit, p.options["by"]) for p in update.walk() if p.name == "scheduled")


def modelled(update: Piece, optimizer: str) -> Adam | None:
    """The optimiser to model, None for plain gradient steps. Raises MethodError where "auto" meets another one."""
    name = {"adamw": "adam"}.get(update.core.name, update.core.name) if optimizer == "auto" else optimizer
    if name not in MODELS:
        raise MethodError(
            f"capo models the optimisers adamw and sgd, and this method's update is {name}; say which of the two is "
            f"nearer: capo(optimizer='sgd') or capo(optimizer='adam')"
        )
    if name == "sgd":
        return None
    known = update.core.options
    return Adam(known["betas"], known["eps"]) if update.core.name == "adamw" else Adam()


def thresholds(
    known: dict[str, float], fisher: float | None, hessian: float | None, percentile: float, warmup: int, m_f: Tensor,
    m_h: Tensor,
) -> tuple[dict[str, float], float, float]:  # fmt: skip
    """What was calibrated after this update, and the thresholds that hold in it: inf during the warm-up.

    m_f, m_h `[M]`: predictions for decisions that have an advantage.
    """
    if fisher is not None and hessian is not None:
        return known, fisher, hessian
    warm = known["updates"] < warmup
    if warm and len(m_f):
        q = percentile / 100
        known = {
            "updates": known["updates"] + 1,
            "fisher": max(known["fisher"], _percentile(m_f, q)),
            "hessian": max(known["hessian"], _percentile(m_h.abs(), q)),
        }
    found = (math.inf, math.inf) if warm else (known["fisher"], known["hessian"])
    return known, found[0] if fisher is None else fisher, found[1] if hessian is None else hessian


def _percentile(values: Tensor, q: float) -> float:
    """The element at or above a share q of the values."""
    return float(values.kthvalue(max(1, math.ceil(q * len(values)))).values)


def _fits(method: Method, piece: Piece) -> str | None:
    said = text_only("hidden states and the most probable tokens of a language model")(method, piece)
    track = next(t for t in method.tracks if any(p is piece for p in t.pieces))
    try:
        modelled(track.update, piece.options["optimizer"])
    except MethodError as unknown:
        return said or str(unknown)
    return said


@piece("select", at="update", reads=("advantage", "action", "mask", "keep"), writes=("keep",),
       wants=("logp", "hidden", "topk", "topk_ids"), state={"moments": nothing_learned, "calibration": uncalibrated},
       validate=_sane, fits=_fits)  # fmt: skip
def trust_region(
    kit: Kit,
    batch: Batch,
    now: Now,
    *,
    fisher: float | None = None,
    hessian: float | None = None,
    percentile: float = 95.0,
    warmup: int = 20,
    optimizer: str = "auto",
    symmetric: bool = True,
    normalise: bool = False,
    k: int = 50,
) -> Batch:
    """Keeps decisions with `m_F < fisher` and `|m_H| < hessian` (`0 <= m_H < hessian` unless symmetric).

    Logs the share left out, `rejected`, and among positive and negative advantages, `rejected_positive` and
    `rejected_negative`; `fisher` and `hessian`, the thresholds, once there are some.
    """
    track = kit.method.track(kit.scope)
    adam, lr = modelled(track.update, optimizer), step_size(kit, track.update)
    mine = mask_of(batch).bool()
    d = _decisions(batch, now, mine, k, _weights(track, batch, now) if normalise else None)
    saved = kit.state["moments"]
    moments = Moments(**saved) if saved else None
    m_f, m_h = predicted(d, effect(d, moments, adam or Adam()), lr)
    live = d.c != 0
    kit.state["calibration"], most_f, most_h = thresholds(
        kit.state["calibration"], fisher, hessian, percentile, warmup, m_f[live], m_h[live]
    )
    kept = (m_f < most_f) & ((m_h.abs() if symmetric else m_h) < most_h) & (symmetric | (m_h >= 0))
    if adam is not None:
        kit.state["moments"] = as_state(learned(moments, d.at(kept), adam))
    _log(kit, d.c, ~kept, {"fisher": most_f, "hessian": most_h})
    return batch.put(keep=batch.keep & mine.masked_scatter(mine, kept))


def _decisions(batch: Batch, now: Now, mine: Tensor, k: int, weight: Tensor | None) -> Decisions:
    """The M decisions that may learn, with the K tokens looked at."""
    c = batch.advantage if weight is None else batch.advantage * weight
    temperature = batch.guarded(None).get("temperature")  # not declared: there, or 1
    x = now["hidden"] if temperature is None else now["hidden"] / temperature.to(now["hidden"])[:, None, None]
    top, ids = (now[name][..., :k][mine] for name in ("topk", "topk_ids"))
    return decisions(c[mine].to(top.dtype), top, ids, batch.action[mine], now["logp"][mine].to(top.dtype), x[mine])


def _weights(track: Any, batch: Batch, now: Now) -> Tensor:
    """The weight of every decision in the loss, `[N, T]`."""
    return weights(batch.guarded(None), track.of("loss")[0].core.options, now["logp"].dtype)[0]


def _log(kit: Kit, c: Tensor, out: Tensor, levels: dict[str, float]) -> None:
    for name, among in (("", torch.ones_like(out)), ("_positive", c > 0), ("_negative", c < 0)):
        kit.log(f"rejected{name}", (out & among).double().sum() / among.sum().clamp_min(1))
    for name, value in levels.items():
        if math.isfinite(value):
            kit.log(name, value)


@method(
    world="language",
    title="CAPO: Stabilizing Policy Gradients for Sample-Efficient RL in LLM Reasoning",
    arxiv="2510.00819",
    base=grpo,
    case="text",
    neutral=Neutral(
        {"fisher": math.inf, "hessian": math.inf}, level="exact", why="everything is predicted and nothing left out"
    ),
    presets={
        "official_code": {"fisher": 1e-4, "hessian": 0.01, "per": "row"},
        "dr_capo": {"fisher": 1e-3, "hessian": 5e-4},
        "rein_capo": {"fisher": 1e-5, "hessian": 0.1},
    },
    confusable="CAPO is also the name of an unrelated paper on credit assignment.",
)
def capo(
    base: Method,
    *,
    fisher: float | None = None,
    hessian: float | None = None,
    percentile: float | None = None,
    warmup: int | None = None,
    optimizer: str = "auto",
    symmetric: bool = True,
    normalise: bool = False,
    k: int = 50,
    per: str | None = None,
) -> Method:
    """Edits to grpo: tokens whose own step would change policy or objective too much are masked, update by update.

    fisher, hessian: thresholds of the predicted changes, at least 0; None calibrates. percentile: of the predictions
    in the warm-up, (0, 100], 95 if left out. warmup: updates without a threshold, 20 if left out; longer than a warm-up
    of the learning rate, since predictions grow with it. optimizer: what is modelled, "auto" for the method's own,
    "adam" or "sgd". symmetric: bound |m_H|, as all recipes do; without, 0 <= m_H. normalise: predict from the gradient
    as the loss weighs it. k: most probable tokens looked at, 2 to 50. per: another reduction than the base's; released
    is "row" for grpo.

    Costs a forward pass without gradient per update. `capo+dr_grpo`, `capo+reinforce`, `capo+bapo` work as `capo+grpo`.
    """
    given = {name: v for name, v in (("percentile", percentile), ("warmup", warmup)) if v is not None}
    if given and fisher is not None and hessian is not None:
        raise MethodError(
            f"capo has {next(iter(given))}={next(iter(given.values()))}, and both thresholds are given, so nothing is "
            f"calibrated and it would be ignored. Leave it out, or leave out fisher or hessian."
        )
    # Whoever is given credit is judged.
    region = trust_region(fisher=fisher, hessian=hessian, optimizer=optimizer, symmetric=symmetric,
                          normalise=normalise, k=k, rows=base.get("credit.rows"), **given)  # fmt: skip
    made = base.then(region, track=base.tracks[0].name)
    return made if per is None else made.swap("surrogate.per", per)
