"""Credit by what was paid: sums of rewards from a decision to the end of its row, which holds one whole episode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.core.batch import Batch
from trimtab.core.kit import Kit
from trimtab.core.piece import piece


def nothing_seen(kit: Any, options: Mapping[str, Any]) -> Tensor:
    """The mean return to go from each decision: of none so far, float64 `[0]`."""
    return torch.zeros(0, dtype=torch.float64)


def _sane(options: Mapping[str, Any]) -> str | None:
    if not 0 <= options["discount"] <= 1:
        return f"discount={options['discount']} must be in [0, 1]"
    memory = options["baseline"]
    return None if memory is None or 0 <= memory < 1 else f"baseline={memory} must be in [0, 1), or None for none"


@piece("credit", reads=("reward", "mask"), writes=("advantage",), state={"baseline": nothing_seen}, validate=_sane)
def reward_to_go(
    kit: Kit, batch: Batch, *, discount: float = 0.99, from_start: bool = True, baseline: float | None = None
) -> Batch:
    """`Psi_h = sum_{t >= h} discount^t r_t - b_h`, `[N, T]`, over rows that are whole episodes (GPOMDP).

    from_start: discounted from the start of the episode, which is the gradient of `E sum_t discount^t r_t`; otherwise
    from the decision itself, `discount^(t - h)`, as most implementations have it. baseline: `b_h` is a running mean of
    earlier batches at the same place h, `b <- baseline b + (1 - baseline) mean`, so the gradient stays unbiased; None
    for none. An episode that was cut by a limit counts as it was.
    """
    mask = batch.mask
    time = torch.arange(mask.shape[1], dtype=batch.reward.dtype, device=mask.device)
    if from_start:
        to_go = ((discount**time * batch.reward) * mask).flip(1).cumsum(1).flip(1)
    else:
        to_go = torch.zeros_like(batch.reward)
        later = batch.reward.new_zeros(len(batch))
        for h in range(mask.shape[1] - 1, -1, -1):
            later = batch.reward[:, h] * mask[:, h] + discount * later
            to_go[:, h] = later
    if baseline is not None:
        known, to_go = kit.state["baseline"], to_go.clone()
        kit.state["baseline"] = _renewed(known, to_go, mask, baseline)
        held = min(len(known), to_go.shape[1])
        to_go[:, :held] -= known[:held].to(to_go.dtype)
    return batch.put(advantage=to_go * mask)


def _renewed(known: Tensor, to_go: Tensor, mask: Tensor, memory: float) -> Tensor:
    """The running means after this batch; a place that was never seen before starts with the batch's own mean."""
    count = mask.sum(0)
    seen = count > 0
    mean = (to_go * mask).sum(0).double() / count.clamp_min(1)
    width = max(len(known), len(mean))
    made = torch.zeros(width, dtype=torch.float64)
    made[: len(known)] = known
    old = torch.arange(len(mean)) < len(known)
    blend = torch.where(old, memory * made[: len(mean)] + (1 - memory) * mean, mean)
    made[: len(mean)] = torch.where(seen, blend, made[: len(mean)])
    return made
