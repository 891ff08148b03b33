"""The part of a batch that a language model has to read to evaluate it: each distinct row once, no idle columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.core.batch import Batch
from trimtab.core.errors import TrimtabError


class PolicyError(TrimtabError):
    """A policy cannot be loaded, or is asked for what it cannot give."""


@dataclass
class Reading:
    """What a policy's layers have read: `tokens`, and the `places` they took with padding. Add up until reset."""

    tokens: int = 0
    places: int = 0

    def count(self, tokens: int, places: int) -> None:
        self.tokens += tokens
        self.places += places

    @property
    def padding(self) -> float:
        """Share of the places that were padding, 0 when nothing was read."""
        return 1 - self.tokens / max(self.places, 1) if self.places else 0.0


@dataclass(frozen=True)
class View:
    """`u` distinct rows that hold a decision, `P` prompt places that any of them uses, `last` decision places likewise.

    prompt, attend `[u, P]`; said (tokens), picked (which of them are decisions) `[u, last]`; inverse 1 / temperature
    `[u]`, None when all are 1. rows `[n]` are the batch's rows that hold a decision, owner `[n]` their place among the
    distinct ones, shape `(N, T)` the batch's.
    """

    prompt: Tensor
    attend: Tensor
    said: Tensor
    picked: Tensor
    inverse: Tensor | None
    rows: Tensor
    owner: Tensor
    shape: tuple[int, int]

    @staticmethod
    def of(batch: Batch, mask: Tensor, wide: torch.dtype) -> View | None:
        """The view of a batch, None when it holds no decision. Raises `PolicyError` as `evaluate` says."""
        rows = mask.any(1).nonzero().squeeze(1)
        if len(rows) == 0:
            return None
        device = mask.device
        attend = batch["prompt_mask"].to(device).bool()[rows]
        if not attend.any(1).all():
            raise PolicyError("a row has an empty prompt; the first decision needs at least one token before it")
        first, last = int(attend.any(0).nonzero().min()), int(mask.any(0).nonzero().max()) + 1
        attend, picked = attend[:, first:], mask[rows, :last]
        needed = picked.flip(1).cummax(1).values.flip(1)  # what follows a row's last decision changes nothing
        prompt = batch["prompt"].to(device)[rows, first:].masked_fill(~attend, 0)
        said = batch["action"].to(device)[rows, :last].masked_fill(~needed, 0)
        temperature = _temperature(batch, wide, device)
        scale = torch.ones(len(rows), device=device, dtype=wide) if temperature is None else temperature[rows]
        # Samples of one prompt are often equal, more so the longer it trains: the same words need one reading.
        key = torch.cat([prompt, attend, said, picked, scale.double().view(torch.long)[:, None]], 1)
        _, owner = key.unique(dim=0, return_inverse=True)
        u = int(owner.max()) + 1
        one = torch.full((u,), len(rows), device=device).scatter_reduce_(
            0, owner, torch.arange(len(rows), device=device), "amin"
        )
        inverse = None if temperature is None else 1 / scale[one]
        shape = (mask.shape[0], mask.shape[1])
        return View(prompt[one], attend[one], said[one], picked[one], inverse, rows, owner, shape)

    @property
    def action(self) -> Tensor:
        """Response tokens that are read: nothing follows the last one."""
        return self.said[:, :-1]

    @property
    def lengths(self) -> Tensor:
        """How many response tokens each row reads, `[u]`: the last decision is predicted, not read."""
        place = torch.arange(1, self.picked.shape[1] + 1, device=self.picked.device)
        return (place * self.picked).amax(1) - 1

    @property
    def ids(self) -> Tensor:
        return torch.cat([self.prompt, self.action], 1)

    @property
    def attend_all(self) -> Tensor:
        return torch.cat([self.attend, torch.ones_like(self.action, dtype=torch.bool)], 1)

    @property
    def tokens(self) -> Tensor:
        """The `M` decisions of the distinct rows."""
        return self.said[self.picked]

    @property
    def scale(self) -> Tensor | None:
        """What their logits are multiplied by, `[M]`."""
        return None if self.inverse is None else self.inverse[:, None].expand(self.picked.shape)[self.picked]

    def spread(self, values: Tensor) -> Tensor:
        """Values of the `M` decisions, `[M, ...]`, back to the batch, `[N, T, ...]`; 0 elsewhere."""
        tail = values.shape[1:]
        where = self.picked.reshape(*self.picked.shape, *[1] * len(tail))
        distinct = values.new_zeros(*self.picked.shape, *tail).masked_scatter(where, values)
        wide = F.pad(distinct[self.owner], (*[0, 0] * len(tail), 0, self.shape[1] - self.picked.shape[1]))
        return values.new_zeros(*self.shape, *tail).index_copy(0, self.rows, wide)


def _temperature(batch: Batch, wide: torch.dtype, device: torch.device) -> Tensor | None:
    """The temperature column `[N]`; None when it is absent or all 1."""
    if "temperature" not in batch:
        return None
    temperature = batch["temperature"].to(device, wide)
    if not (temperature > 0).all():
        raise PolicyError("the temperature column has a value that is not positive; greedy rows are evaluated at 1")
    return None if (temperature == 1).all() else temperature
