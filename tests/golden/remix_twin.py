"""A slow, literal transcription of ReMix (card `remix`) on the toy tokens: one turn, all its passes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.golden import twins

PASSES = 2


def credit(batch: Any, learning: list[int], eps: float = 1e-4) -> dict[int, float]:
    """GRPO's, over each row's own group, replayed or fresh."""
    r = {i: sum(float(batch.reward[i, t]) for t in twins.decisions(batch, i)) for i in learning}
    made = {}
    for i in learning:
        members = [j for j in learning if int(batch.group[j]) == int(batch.group[i])]
        mean = sum(r[j] for j in members) / len(members)
        s = math.sqrt(sum((r[j] - mean) ** 2 for j in members) / (len(members) - 1)) if len(members) > 1 else 0.0
        made[i] = (r[i] - mean) / (s + eps)
    return made


def remix(
    batch: Any, start: Tensor, reference: Tensor | None = None, previous: Tensor | None = None, *, weight: float = 1.0,
    kl: float = 1e-3, eps: float = 0.2, passes: int = PASSES,
) -> Tensor:  # fmt: skip
    """start: pi_k. reference, previous: the two anchors (both pi_k where none is given). weight: lambda(t)."""
    anchors = [
        (weight, start if reference is None else reference),
        (1 - weight, start if previous is None else previous),
    ]
    learning = [i for i in range(len(batch)) if int(batch.source[i]) in (0, 2)]
    a = credit(batch, learning)
    places = [(i, t) for i in learning for t in twins.decisions(batch, i)]
    k = {p: float(twins.logp(start, batch, *p)) for p in places}
    b = {p: float(batch.logp_behavior[p]) if int(batch.source[p[0]]) == 2 else k[p] for p in places}
    table = start
    for _ in range(passes):
        leaf = table.clone().requires_grad_()
        total = leaf.new_zeros(())
        for i, t in places:
            now = twins.logp(leaf, batch, i, t)
            r, c = torch.exp(now - b[i, t]), math.exp(k[i, t] - b[i, t])
            total = total + twins.clipped(a[i], r, max(c - eps, 0.0), c + eps)
            for share, anchor in anchors:
                d = float(twins.logp(anchor, batch, i, t)) - now
                total = total + kl * share * (torch.exp(d) - d - 1)
        (grad,) = torch.autograd.grad(total / len(places), leaf)
        table = table - twins.LR * grad
    return table
