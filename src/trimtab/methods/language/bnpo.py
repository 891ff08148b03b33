"""BNPO: the advantage is divided by a Beta density of the prompt's own success rate, refitted to every batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.core.batch import Batch
from trimtab.core.errors import MethodError
from trimtab.core.kit import Kit
from trimtab.core.method import Method
from trimtab.core.piece import Piece, piece
from trimtab.core.registry import Neutral, method
from trimtab.methods.language.bases import grpo
from trimtab.stages.credit import centred, spread

FLAT = 1e-8  # below this variance the success rates say nothing about a law they follow


def beta_law(p: Tensor, strength: float) -> tuple[float, float]:
    """`(alpha, beta)` of the density that BNPO divides by, from the success rates of a batch's prompts, `[B]`.

        mu = mean(p),  s2 = var(p, ddof=1),  kappa = mu (1 - mu) / s2 - 1,  a = kappa mu,  b = kappa (1 - mu)
        alpha = max(1, 1 + strength a),  beta = max(1, 1 + strength b)

    One prompt, or rates that are all equal (`s2 <= 1e-8`), give (1, 1): the density is 1 and nothing is divided.
    """
    if len(p) < 2:
        return 1.0, 1.0
    mu, s2 = float(p.mean()), float(p.var(correction=1))
    if s2 <= FLAT:
        return 1.0, 1.0
    kappa = mu * (1 - mu) / s2 - 1
    return max(1.0, 1 + strength * kappa * mu), max(1.0, 1 + strength * kappa * (1 - mu))


def inverse_density(p: Tensor, alpha: float, beta: float, most: float) -> Tensor:
    """`min(1 / BetaPDF(p; alpha, beta), most)`, elementwise; `0 log 0` is 0, so it is 1 for alpha = beta = 1."""
    normaliser = math.lgamma(alpha) + math.lgamma(beta) - math.lgamma(alpha + beta)
    log_density = torch.special.xlogy(alpha - 1, p) + torch.special.xlogy(beta - 1, 1 - p) - normaliser
    return (-log_density).exp().clamp(max=most)


def _sane(options: Mapping[str, Any]) -> str | None:
    if not options["upper"] > options["lower"]:
        return f"upper={options['upper']} must be above lower={options['lower']}: rewards are mapped to [0, 1]"
    if (options["alpha"] is None) != (options["beta"] is None):
        return "alpha and beta are fixed together or fitted together; give both or neither"
    for name in ("alpha", "beta"):
        if options[name] is not None and not options[name] >= 1:
            return f"{name}={options[name]} is below 1, which would make the density U-shaped; give at least 1"
    if options["strength"] < 0 or options["most"] <= 0:
        return f"strength={options['strength']} must be at least 0 and most={options['most']} above 0"
    return None


def _priced(method: Method, piece: Piece) -> str | None:
    """A `fits`: what wraps take off a reward lies in the range too, which is known before the first reward."""
    taken = sum(p.options["penalty"] for p in method.get("credit").stack() if p.name == "overlong")
    if not taken or piece.options["lower"] <= -taken:
        return None
    return (
        f"bnpo reads rewards in [{piece.options['lower']}, {piece.options['upper']}], and the price on overlong "
        f"responses takes up to {taken} off them. Say so, bnpo(lower={-taken}) where they are at least 0, or take the "
        f"price off, dapo(penalty=0.0)"
    )


@piece("credit", reads=("reward", "group", "mask"), writes=("advantage",), validate=_sane, fits=_priced)
def beta_normalised(
    kit: Kit,
    batch: Batch,
    *,
    strength: float = 1 / 3,
    alpha: float | None = None,
    beta: float | None = None,
    lower: float = 0.0,
    upper: float = 1.0,
    most: float = 1e6,
) -> Batch:
    """`A_i = w(p_g) (R_i - p_g)`, `w(p) = min(1 / BetaPDF(p; alpha, beta), most)`, `p_g` the group's mean reward.

    Rewards are mapped from [lower, upper] to [0, 1] first. alpha, beta: fitted to the batch (see `beta_law`), or fixed.
    All-equal groups and groups of one get exactly 0, and a group of one has no vote in the fit.
    Raises MethodError for a reward outside [lower, upper].
    """
    score, group = batch.score(), batch.by("group")
    outside = (score < lower) | (score > upper)
    if bool(outside.any()):
        raise MethodError(
            f"bnpo reads rewards in [{lower}, {upper}] and got {float(score[outside][0])}. Say what range this "
            f"environment pays in: bnpo(lower=..., upper=...)."
        )
    score = (score - lower) / (upper - lower)
    p = group.mean(score).clamp(0, 1)
    law = (alpha, beta) if alpha is not None and beta is not None else beta_law(
        group.distinct(p)[group.counts > 1], strength
    )  # fmt: skip
    kit.log("beta_alpha", law[0])
    kit.log("beta_beta", law[1])
    # The weight is finite before it meets a zero: a group that is all right has density 0 and no signal.
    return spread(batch, inverse_density(p, *law, most) * centred(score, group))


@method(
    world="language",
    title="BNPO: Beta Normalization Policy Optimization",
    arxiv="2506.02864",
    base=grpo,
    case="text",
    neutral=Neutral(
        {"alpha": 1.0, "beta": 1.0},
        level="exact",
        base_options={"scale": "none"},
        why="a flat density divides nothing, and what is left is the centred reward",
    ),
    presets={"official_code": {"per": "row_sum"}, "capped": {"most": 10.0}},
    confusable="loss_type='bnpo' of TRL, ms-swift and Unsloth is a token mean over the local batch, without any Beta "
    "density; here that is per='token'.",
)
def bnpo(
    base: Method,
    *,
    strength: float = 1 / 3,
    alpha: float | None = None,
    beta: float | None = None,
    lower: float = 0.0,
    upper: float = 1.0,
    most: float = 1e6,
    per: str | None = None,
) -> Method:
    """Edits to grpo: the credit is divided by a Beta density fitted to the batch instead of by the group's std.

    `A_i = (R_i - p_g) / BetaPDF(p_g; 1 + a/3, 1 + b/3)`, where Beta(a, b) has the mean and the variance of the batch's
    success rates `p_g`. REINFORCE with baseline is the density (1, 1); GRPO (population std) is (3/2, 3/2) up to the
    factor pi/8. Among Beta densities this one makes the second moment of the advantage least.

    strength: 1/3 in the paper, 0 divides nothing. alpha, beta: fix the density, both >= 1. lower, upper: the range of
    rewards. most: largest weight; 1e6 as released, "capped" has 10, which matters when success rates are nearly equal.
    per: another reduction than the base's; the released run has "row_sum" (preset "official_code"), whose gradient
    grows with the length of responses. The released code gives a group of one the rate 0 and its reward as advantage;
    here it gets 0. Where it would divide 0 by 0 (equal rates), the density is flat here. Several rewards with a density
    each (an option of the release, off in its run) are not offered: an environment gives one reward.
    """
    credit = beta_normalised(strength=strength, alpha=alpha, beta=beta, lower=lower, upper=upper, most=most)
    made = base.swap("credit", credit)
    return made if per is None else made.swap("surrogate.per", per)
