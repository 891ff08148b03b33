"""Un-reduced loss terms and the one reduction.

Every reduction of DESIGN section 4 is linear in the term, so it is a matrix of weights that depends on light columns
alone and is known before any forward pass: `loss = sum(value * weight)`. Weights are made from all rows of the
update; a micro-batch takes its slice. That is why cutting the batch differently cannot change a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from trimtab.core.batch import Batch
from trimtab.core.errors import MethodError, nearest

SOURCES = ("policy", "expert", "replay", "synthetic", "teacher")
PERS = ("token", "row", "row_sum", "group", "episode", "pair", "fixed(L)")
UNITS = ("row", "group", "episode", "pair")


@dataclass(slots=True)  # not frozen: a frozen one takes four times as long to make, and a minibatch makes several
class Term:
    """An un-reduced value, `[N, T]`, or `[N]` for the whole row.

    A `metric` is reported, never summed: as its mean over decisions, or over the rows that have any.
    """

    value: Tensor
    name: str
    metric: bool = False

    def __mul__(self, factor: float | Tensor) -> Term:
        return self if self.metric else replace(self, value=self.value * factor)


@dataclass(frozen=True)
class fixed:
    """`sum(l m) / (rows L)`: a constant number of decisions per row (Dr. GRPO); `sum(l m) / L` without the mean."""

    length: float
    mean: bool = True

    def __post_init__(self) -> None:
        if not self.length > 0:
            raise MethodError(f"fixed({self.length}) must be a positive number of decisions per row")


def rows_of(batch: Batch, rows: str | tuple[str, ...] | None) -> Tensor:
    """Which rows a piece concerns, bool `[N]`: all for None, else those whose `source` has that name.

    A batch without a `source` column holds only rows of our policy.
    """
    columns = batch.columns
    any_column = next(c for c in columns.values() if isinstance(c, Tensor))
    everything = torch.ones(len(batch), dtype=torch.bool, device=any_column.device)
    if rows is None:
        return everything
    names = (rows,) if isinstance(rows, str) else rows
    for name in names:
        if name not in SOURCES:
            raise MethodError(f"rows={name!r} is no source of experience. {nearest(name, SOURCES)}")
    if "source" not in columns:
        return everything if "policy" in names else ~everything
    source = columns["source"]
    assert isinstance(source, Tensor)
    return torch.isin(source, torch.tensor([SOURCES.index(n) for n in names], device=source.device))


def some_of(batch: Batch, rows: str | tuple[str, ...] | None) -> Tensor | None:
    """`rows_of`, or None where that is every row; quick where all rows have one source."""
    source = batch.same("source") if rows is not None else None
    if rows is None or (source is not None and SOURCES[source] in ((rows,) if isinstance(rows, str) else rows)):
        return None
    chosen = rows_of(batch, rows)
    return None if bool(chosen.all()) else chosen


def mask_of(batch: Batch) -> Tensor:
    """Decisions that may learn, `[N, T]`: `keep`, else `mask`; one decision per row when there is neither."""
    for name in ("keep", "mask"):
        if name in batch.columns:
            mask = batch.columns[name]
            assert isinstance(mask, Tensor)
            return mask if mask.dim() > 1 else mask[:, None]
    return rows_of(batch, None)[:, None]


def weights(batch: Batch, options: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    """The weight of every decision in a loss's terms and in its metrics, `[2, N, T]`, from all rows of the update.

    token    m / sum(m)                            row      m / (rows * sum_t m)
    row_sum  m / rows                              fixed(L) m / (rows * L)
    group, episode, pair   m / (segments * sum of m over the segment)

    `m` is `keep`; rows outside the loss's `rows` do not count at all; rows with an empty mask count. Metrics are means
    over decisions ("token") whatever the terms' reduction, or over rows where the metric has one value a row.
    """
    every = some_of(batch, options["rows"]) is None
    keep = mask_of(batch)
    if every and options["per"] == "token" and batch.same("keep" if "keep" in batch.columns else "mask") == 1:
        return _even(keep.shape[0], keep.shape[1], dtype, keep.device)
    chosen = rows_of(batch, options["rows"])
    m = keep.to(dtype) * chosen[:, None]
    token = m / m.sum().clamp_min(1)
    return torch.stack([token if options["per"] == "token" else _weights(batch, options["per"], m, chosen), token])


@lru_cache(maxsize=64)
def _even(n: int, t: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same weight for every decision, `[2, n, t]`, held once: a sum weighted by it is a mean."""
    return torch.full((), 1 / (n * t), dtype=dtype, device=device).expand(2, n, t)


def is_even(weight: Tensor) -> bool:
    """Whether weights `[N, T]` are those of `_even`: nothing else holds one number for many places."""
    return weight.stride() == (0, 0)


def _weights(batch: Batch, per: Any, m: Tensor, chosen: Tensor) -> Tensor:
    rows = chosen.sum().clamp_min(1).to(m.dtype)
    if per == "row":
        return m / (m.sum(1, keepdim=True).clamp_min(1) * rows)
    if per == "row_sum":
        return m / rows
    if isinstance(per, fixed):
        return m / (rows * per.length if per.mean else per.length)
    if per in ("group", "episode", "pair"):
        level = batch.columns[per]
        assert isinstance(level, Tensor)
        segments = batch.guarded(None).by(per)
        count = torch.unique(level[chosen]).numel()
        return m / (segments.sum(m.sum(1)).clamp_min(1)[:, None] * max(count, 1))
    raise MethodError(f"a loss has per={per!r}. {nearest(str(per), PERS)}")


def reduce(value: Tensor, weight: Tensor, per: object) -> Tensor:
    """`sum(value * weight)`; a value of the whole row, `[N]`, is spread over its decisions.

    Spreading is the mean of the row for per="row" and the like; for "row_sum" and fixed(L) it would multiply the value
    by the row's length, so that is refused.
    """
    if value.dim() == 1:
        if per == "row_sum" or isinstance(per, fixed):
            raise MethodError(f"a term with one value per row cannot be reduced per={per!r}; use per='row'")
        weight = weight.sum(1)
    elif is_even(weight):
        return value.mean(dtype=weight.dtype)
    # Not value * weight alone: a padded decision may hold inf or nan, and 0 * inf is nan.
    return (torch.where(weight != 0, value, torch.zeros_like(value)) * weight).sum()


def units(batch: Batch, unit: str) -> Tensor:
    """What a micro-batch must not cut, as an id per row `[N]`; rows with id -1 stand alone."""
    if unit == "row":
        return torch.arange(len(batch))
    ids = batch.columns[unit]
    assert isinstance(ids, Tensor)
    ids = ids.cpu()
    alone = -2 - torch.arange(len(ids))
    return torch.unique(torch.where(ids < 0, alone, ids), return_inverse=True)[1]


def split(ids: Tensor, size: int | None, generator: torch.Generator | None = None) -> list[Tensor]:
    """Cut rows into index tensors of about `size` rows, never through a unit; shuffled when a generator is given."""
    n = len(ids)
    if size is None or size >= n:
        return [torch.arange(n)]
    count = int(ids.max()) + 1
    order = torch.randperm(count, generator=generator) if generator is not None else torch.arange(count)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(count))
    rows = torch.argsort(place[ids], stable=True)
    if count == n:
        return list(rows.split(size))
    parts: list[list[Tensor]] = [[]]
    filled = 0
    for one in rows.split(torch.bincount(place[ids], minlength=count).tolist()):
        if filled and filled + len(one) > size:
            parts.append([])
            filled = 0
        parts[-1].append(one)
        filled += len(one)
    return [torch.cat(p) for p in parts]
