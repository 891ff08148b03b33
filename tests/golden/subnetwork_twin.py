"""Masked fine-tuning, weight by weight: GRPO's loss, AdamW as its paper writes it, and a mask (card `subnetworks`, D).

g <- g min(1, clip / (|g| + 1e-6)), |g| over all weights; g <- m g; AdamW on g; what the mask leaves out stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor

B1, B2, EPS = 0.9, 0.999, 1e-4


@dataclass
class Masked:
    """lr, decay, clip: of AdamW. mask: places that are trained. moments: place -> (first, second); grown by use."""

    lr: float
    decay: float
    clip: float
    mask: set[tuple[int, ...]]
    moments: dict[tuple[int, ...], tuple[float, float]] = field(default_factory=dict)
    steps: int = 0

    def step(self, table: Tensor, grad: Tensor) -> Tensor:
        places = list(product(*map(range, table.shape)))
        norm = math.sqrt(sum(float(grad[p]) ** 2 for p in places))
        scale = min(1.0, self.clip / (norm + 1e-6))
        self.steps += 1
        made = table.clone()
        for p in places:
            if p not in self.mask:
                continue
            g = scale * float(grad[p])
            first, second = self.moments.get(p, (0.0, 0.0))
            first, second = B1 * first + (1 - B1) * g, B2 * second + (1 - B2) * g * g
            self.moments[p] = (first, second)
            ahead = first / (1 - B1**self.steps)
            size = math.sqrt(second / (1 - B2**self.steps)) + EPS
            made[p] = float(table[p]) * (1 - self.lr * self.decay) - self.lr * ahead / size
        return made


def subnetwork(batch: Any, start: Tensor, optimizer: Masked, loss_of: Callable[..., Tensor], passes: int) -> Tensor:
    """`passes` masked steps on one batch. loss_of: `(batch, start, table) -> loss`, GRPO's."""
    table = start
    for _ in range(passes):
        leaf = table.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss_of(batch, start, leaf), leaf)
        table = optimizer.step(table, grad)
    return table


def grpo_loss(batch: Any, start: Tensor, table: Tensor) -> Tensor:
    """GRPO's loss over the tokens of all rows, clipped to [0.8, 1.2], credit divided by the group's deviation."""
    from tests.golden import twins

    a = twins.credit(batch, "std")
    total, count = table.new_zeros(()), 0
    for i in twins.rows_of(batch):
        for t in twins.decisions(batch, i):
            ratio = torch.exp(twins.logp(table, batch, i, t) - float(twins.logp(start, batch, i, t)))
            total, count = total + twins.clipped(a[i], ratio, 0.8, 1.2), count + 1
    return total / count


def everything(batch: Any, start: Tensor) -> Tensor:
    """With every weight in the mask it is the base, here by plain gradient descent."""
    from tests.golden import twins

    return twins.grpo(batch, start)
