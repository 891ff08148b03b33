"""Slow, literal, loop-only transcriptions of the cards' equations, one turn each, on the toy tokens.

A twin gets the batch as it was collected, the starting table of logits and the learning rate; it makes every update
with plain gradient descent and returns the final table. Nothing of trimtab's stages is used here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.golden import aepo_twin, capo_twin, hapo_twin, rec_twin, remix_twin, subnetwork_twin

PASSES = 2
LR = 0.5


def logp(table: Tensor, batch: Any, i: int, t: int) -> Tensor:
    row = table[int(batch.prompt[i, 0]), t]
    total = sum(torch.exp(x) for x in row)
    return row[int(batch.action[i, t])] - torch.log(total)  # type: ignore[arg-type]


def entropy(table: Tensor, batch: Any, i: int, t: int) -> float:
    row = table[int(batch.prompt[i, 0]), t].tolist()
    total = sum(math.exp(x) for x in row)
    return -sum(math.exp(x) / total * (x - math.log(total)) for x in row)


def rows_of(batch: Any, source: int = 0) -> list[int]:
    return [i for i in range(len(batch)) if int(batch.source[i]) == source]


def decisions(batch: Any, i: int) -> list[int]:
    return [t for t in range(batch.mask.shape[1]) if bool(batch.mask[i, t])]


def scores(batch: Any) -> dict[int, float]:
    return {i: sum(float(batch.reward[i, t]) for t in decisions(batch, i)) for i in rows_of(batch)}


def group_members(batch: Any, i: int) -> list[int]:
    return [j for j in rows_of(batch) if int(batch.group[j]) == int(batch.group[i])]


def credit(batch: Any, kind: str, eps: float = 1e-4, r: dict[int, float] | None = None) -> dict[int, float]:
    """kind: "mean", "loo" or "std" (card `_baselines-language`: REINFORCE with baseline, RLOO, GRPO with ddof 1)."""
    r, made = scores(batch) if r is None else r, {}
    for i in r:
        members = group_members(batch, i)
        n = len(members)
        mu = sum(r[j] for j in members) / n
        if kind == "mean":
            made[i] = r[i] - mu
        elif kind == "loo":
            made[i] = r[i] - (sum(r[j] for j in members) - r[i]) / (n - 1) if n > 1 else 0.0
        else:
            s = math.sqrt(sum((r[j] - mu) ** 2 for j in members) / (n - 1)) if n > 1 else 0.0
            made[i] = (r[i] - mu) / (s + eps)
    return made


def descend(table: Tensor, loss_of: Callable[[Tensor], Tensor], passes: int) -> Tensor:
    for _ in range(passes):
        leaf = table.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss_of(leaf), leaf)
        table = table - LR * grad
    return table


def reinforce(batch: Any, start: Tensor, kind: str = "mean", a: dict[int, float] | None = None) -> Tensor:
    a = credit(batch, kind) if a is None else a

    def loss(table: Tensor) -> Tensor:
        total, count = table.new_zeros(()), 0
        for i in rows_of(batch):
            for t in decisions(batch, i):
                total, count = total - a[i] * logp(table, batch, i, t), count + 1
        return total / count

    return descend(start, loss, 1)


def rloo(batch: Any, start: Tensor) -> Tensor:
    return reinforce(batch, start, "loo")


def sft(batch: Any, start: Tensor) -> Tensor:
    def loss(table: Tensor) -> Tensor:
        total, count = table.new_zeros(()), 0
        for i in rows_of(batch, 1):
            for t in decisions(batch, i):
                total, count = total - logp(table, batch, i, t), count + 1
        return total / count

    return descend(start, loss, 1)


def clipped(a: float, r: Tensor, low: float, high: float) -> Tensor:
    inside = torch.clamp(r, low, high)
    return -torch.minimum(r * a, inside * a)


def grpo(
    batch: Any, start: Tensor, *, per: str = "token", kl: float = 0.0, bounds: Callable[..., Any] | None = None,
    keep: Callable[..., Any] | None = None, mu: float = 0.0, phi: bool = True,
    a: dict[int, float] | None = None, clip: tuple[float, float] = (0.8, 1.2), dual: float | None = None,
    sequence: bool = False, length: float = 0.0,
) -> Tensor:  # fmt: skip
    """GRPO; with `bounds` BAPO, with `keep` D3S, with `mu` CHORD, with `a` another credit, with `sequence` GSPO.

    per: "token", "row", "row_sum", or "fixed" with `length` (Dr. GRPO).
    """
    a = credit(batch, "std") if a is None else a
    old = {(i, t): float(logp(start, batch, i, t)) for i in rows_of(batch) for t in decisions(batch, i)}
    kept = keep(batch, a, start) if keep else {(i, t) for i, t in old}

    def loss(table: Tensor) -> Tensor:
        low, high = bounds(batch, a, old, kept, table) if bounds else clip
        total, count, penalties = table.new_zeros(()), 0, table.new_zeros(())
        row_means = []
        for i in rows_of(batch):
            row, n = table.new_zeros(()), 0
            drift = [logp(table, batch, i, t) - old[i, t] for t in decisions(batch, i)]
            for t in decisions(batch, i):
                if (i, t) not in kept:
                    continue
                now = logp(table, batch, i, t)
                r = torch.exp(torch.clamp(now - old[i, t], -20, 20))
                if sequence:
                    r = torch.exp(sum(drift) / len(drift))  # type: ignore[arg-type]
                value = clipped(a[i], r, low, high)
                if dual is not None and a[i] < 0:
                    value = torch.minimum(value, torch.as_tensor(-dual * a[i]))
                d = old[i, t] - now  # the reference is the start, where the old policy stands too
                value = value + kl * (torch.exp(d) - d - 1)
                row, n = row + value, n + 1
            total, count = total + row, count + n
            row_means.append(row / max(n, 1))
        rows = len(row_means)
        made = {
            "token": total / count, "row": sum(row_means) / rows, "row_sum": total / rows,
            "fixed": total / (rows * (length or 1.0)),
        }[per]  # fmt: skip
        if mu:
            n = 0
            for i in rows_of(batch, 1):
                for t in decisions(batch, i):
                    now = logp(table, batch, i, t)
                    p = float(torch.exp(now.detach()))
                    weight = p * (1 - p) if phi else 1.0
                    penalties, n = penalties - weight * now, n + 1
            made = (1 - mu) * made + mu * penalties / n
        return made

    return descend(start, loss, PASSES)


def bapo_bounds(
    batch: Any, a: dict[int, float], old: Any, kept: Any, table: Tensor, *, target: float = 0.4,
    low: tuple[float, float, float] = (0.6, 0.9, 0.02), high: tuple[float, float, float] = (1.2, 3.0, 0.05),
    ratio: bool = False, low_first: bool = False, weighted: bool = True,
) -> tuple[float, float]:  # fmt: skip
    """BAPO's bounds: by default as its paper has them (fraction, high first, weighted by the rollout probability)."""

    def phi(at_low: float, at_high: float) -> float:
        positive = negative = 0.0
        for i, t in kept:
            r = float(torch.exp(logp(table.detach(), batch, i, t) - old[i, t]))
            w = math.exp(float(batch.logp_behavior[i, t])) if weighted else 1.0
            if a[i] >= 0:
                positive += w * min(r, at_high) * a[i]
            else:
                negative -= w * max(r, at_low) * a[i]
        if negative <= 0:
            return math.inf
        return positive / negative if ratio else positive / (positive + negative)

    at = {"low": low[0], "high": high[0]}
    for name, most, step in [("low", *low[1:]), ("high", *high[1:])] if low_first else [
        ("high", *high[1:]), ("low", *low[1:])
    ]:  # fmt: skip
        while phi(at["low"], at["high"]) < target - 1e-6 and at[name] < most - 1e-6:
            at[name] = min(at[name] + step, most)
    return at["low"], at["high"]


def bapo(batch: Any, start: Tensor, dual: float | None = None, **options: Any) -> Tensor:
    def bounds(*known: Any) -> tuple[float, float]:
        return bapo_bounds(*known, **options)

    return grpo(batch, start, bounds=bounds, dual=dual)


def bnpo_credit(batch: Any, strength: float = 1 / 3) -> dict[int, float]:
    """A = (R - p) / BetaPDF(p; 1 + a/3, 1 + b/3), (a, b) by the moments of the prompts' success rates."""
    r = scores(batch)
    rate = {int(batch.group[i]): sum(r[j] for j in group_members(batch, i)) / len(group_members(batch, i)) for i in r}
    p = list(rate.values())
    mu = sum(p) / len(p)
    s2 = sum((x - mu) ** 2 for x in p) / (len(p) - 1)
    alpha = beta = 1.0
    if s2 > 1e-8:
        kappa = mu * (1 - mu) / s2 - 1
        alpha, beta = max(1.0, 1 + strength * kappa * mu), max(1.0, 1 + strength * kappa * (1 - mu))
    area = math.gamma(alpha) * math.gamma(beta) / math.gamma(alpha + beta)
    made = {}
    for i in r:
        x = rate[int(batch.group[i])]
        density = x ** (alpha - 1) * (1 - x) ** (beta - 1) / area
        made[i] = (r[i] - x) * (min(1 / density, 1e6) if density > 0 else 1e6)
    return made


def bnpo(batch: Any, start: Tensor, strength: float = 1 / 3) -> Tensor:
    return grpo(batch, start, a=bnpo_credit(batch, strength))


def dr_grpo(batch: Any, start: Tensor, length: float = 7.0) -> Tensor:
    return grpo(batch, start, a=credit(batch, "mean"), per="fixed", length=length)


def gspo(batch: Any, start: Tensor) -> Tensor:
    return grpo(batch, start, per="row", clip=(1 - 3e-4, 1 + 4e-4), sequence=True)


def dapo(batch: Any, start: Tensor, limit: int = 4, buffer: float = 0.5, penalty: float = 0.5) -> Tensor:
    """The batch has live groups only; its rewards are the environment's, and the punishment is added here."""
    r = {}
    for i, score in scores(batch).items():
        length = len(decisions(batch, i))
        r[i] = score + penalty * min(0.0, ((limit - buffer * limit) - length) / (buffer * limit))
    return grpo(batch, start, a=credit(batch, "std", r=r), clip=(0.8, 1.28))


def gpg(batch: Any, start: Tensor, kind: str = "valid") -> Tensor:
    a, r = credit(batch, "mean"), scores(batch)
    dead = [i for i in r if all(r[j] == r[i] for j in group_members(batch, i))]
    factor = {"valid": len(r) / max(1, len(r) - len(dead)),
              "nonzero": len(r) / max(1, sum(x != 0 for x in r.values()))}[kind]  # fmt: skip
    return reinforce(batch, start, a={i: factor * x for i, x in a.items()})


def rloo_trl(batch: Any, start: Tensor, reference: Tensor, kl: float = 0.05) -> Tensor:
    """Leave-one-out on rewards less the KL to the reference, and the clipped ratio of whole sequences."""
    r = {}
    for i, score in scores(batch).items():
        r[i] = score
        for t in decisions(batch, i):
            r[i] -= kl * float(logp(start, batch, i, t) - logp(reference, batch, i, t))
    a = credit(batch, "loo", r=r)
    old = {i: sum(float(logp(start, batch, i, t)) for t in decisions(batch, i)) for i in rows_of(batch)}

    def loss(table: Tensor) -> Tensor:
        total = table.new_zeros(())
        for i in rows_of(batch):
            now = sum(logp(table, batch, i, t) for t in decisions(batch, i))
            total = total + clipped(a[i], torch.exp(now - old[i]), 0.8, 1.2)  # type: ignore[arg-type]
        return total / len(rows_of(batch))

    return descend(start, loss, PASSES)


def dpo(batch: Any, start: Tensor, beta: float = 0.1, shape: str = "sigmoid", smoothing: float = 0.0) -> Tensor:
    """One turn from the reference itself."""

    def loss(table: Tensor) -> Tensor:
        total, pairs = table.new_zeros(()), sorted({int(p) for p in batch.pair})
        for pair in pairs:
            h: dict[bool, Any] = {}
            for i in range(len(batch)):
                if int(batch.pair[i]) == pair:
                    places = decisions(batch, i)
                    drift = sum(logp(table, batch, i, t) - float(logp(start, batch, i, t)) for t in places)
                    h[bool(batch.preferred[i])] = drift / len(places) if shape == "ipo" else drift
            d = h[True] - h[False]
            if shape == "sigmoid":
                total = total - (1 - smoothing) * torch.log(1 / (1 + torch.exp(-beta * d)))
                total = total - smoothing * torch.log(1 / (1 + torch.exp(beta * d)))
            elif shape == "hinge":
                total = total + torch.clamp(1 - beta * d, min=0)
            else:
                total = total + (d - 1 / (2 * beta)) ** 2
        return total / len(pairs)

    return descend(start, loss, 1)


def chord(batch: Any, start: Tensor) -> Tensor:
    return grpo(batch, start, mu=0.1)


def d3s_rows(a: dict[int, float], n: int) -> float:
    """The largest variance of any `n` advantages, by looking at every subset."""
    best = 0.0
    for chosen in itertools.combinations(a.values(), n):
        mean = sum(chosen) / n
        best = max(best, sum((x - mean) ** 2 for x in chosen) / n)
    return best


SHARE, TOKENS = 0.5, 0.4


def d3s_keep(batch: Any, a: dict[int, float], table: Tensor, share: float, tokens: float) -> set[tuple[int, int]]:
    """The subset of rows of largest variance, by looking at every one; of its tokens the largest |A| H."""

    def variance(chosen: tuple[int, ...]) -> float:
        mean = sum(a[i] for i in chosen) / len(chosen)
        return sum((a[i] - mean) ** 2 for i in chosen) / len(chosen)

    rows = max(itertools.combinations(a, max(2, round(share * len(a)))), key=variance)
    places = [(i, t) for i in rows for t in decisions(batch, i)]
    places.sort(key=lambda p: -abs(a[p[0]]) * entropy(table, batch, *p))
    return set(places[: max(1, round(tokens * len(places)))])


def d3s(batch: Any, start: Tensor, share: float = SHARE, tokens: float = TOKENS) -> Tensor:
    return grpo(batch, start, keep=lambda batch, a, table: d3s_keep(batch, a, table, share, tokens))


TWINS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "reinforce": reinforce,
    "rloo": rloo,
    "grpo": grpo,
    "sft": sft,
    "bapo": bapo,
    "bnpo": bnpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "gspo": gspo,
    "gpg": gpg,
    "dpo": dpo,
    "chord": chord,
    "d3s": d3s,
    "remix": lambda batch, start: remix_twin.remix(batch, start),
    "rec": lambda batch, start: rec_twin.rec(batch, start),
    "aepo": lambda batch, start: aepo_twin.aepo(batch, start, batch),
    "capo": lambda batch, start: capo_twin.capo(batch, start),
    "hapo": lambda batch, start: hapo_twin.hapo(batch, start),
    "subnetwork": lambda batch, start: subnetwork_twin.everything(batch, start),
}
