"""Experience as named columns: `N` rows, each a sequence of up to `T` decisions.

A column is a tensor whose first axis is the row, or a list with one entry per row (prompts, transcripts). Columns are
never written in place: `put` returns a new batch. DESIGN section 1 names the standard columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from trimtab.core.errors import ColumnError

Column = Tensor | list[Any]

# What an added decision or a missing column holds when batches are joined. Ids use -1: "belongs to nothing".
_FILL: dict[str, Any] = {"group": -1, "episode": -1, "pair": -1, "agent": -1, "truncated": False, "terminated": False}


@dataclass(frozen=True)
class Guard:
    """Debug mode's view of a batch: the columns one piece declared. Anything else raises."""

    piece: str
    reads: frozenset[str]
    writes: frozenset[str]

    def check(self, name: str, writing: bool) -> None:
        allowed = self.writes if writing else self.reads | self.writes
        if name not in allowed:
            verb = "writes" if writing else "reads"
            raise ColumnError(
                f"{self.piece} {verb} column {name!r} without declaring it; "
                f"it declared {verb}={sorted(allowed)}. Add {name!r} to its declaration."
            )


class Picked(Mapping[str, Column]):
    """The columns of some rows of a batch, each gathered when it is first read; of a slice, looked at in place."""

    def __init__(self, source: Mapping[str, Column], rows: Tensor | slice, own: dict[str, Column]) -> None:
        self.source, self.rows, self.own = source, rows, own

    @property
    def count(self) -> int:
        return self.rows.stop - self.rows.start if isinstance(self.rows, slice) else self.rows.shape[0]

    def __getitem__(self, name: str) -> Column:
        if name not in self.own:
            self.own[name] = _gathered(self.source[name], self.rows)
        return self.own[name]

    def __contains__(self, name: object) -> bool:
        return name in self.own or name in self.source

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self.source, *self.own]))

    def __len__(self) -> int:
        return len({*self.source, *self.own})


def _gathered(column: Column, rows: Tensor | slice) -> Column:
    if isinstance(rows, slice):
        return column[rows]
    if isinstance(column, Tensor):
        return column.index_select(0, rows.to(column.device))
    return [column[i] for i in rows.tolist()]


@dataclass(frozen=True)
class Batch(Mapping[str, Column]):
    """Named columns over the same `N` rows.

    `batch["reward"]` and `batch.reward` read a column; `put` returns a new batch with more of them. A column that
    varies over decisions is `[N, T, ...]`; one that belongs to the row is `[N]`, or a list of length `N`.

    Raises `ColumnError` when a column is missing, or when a new one has another number of rows.
    """

    columns: Mapping[str, Column] = field(default_factory=dict)
    guard: Guard | None = None
    _known: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)  # see `same`

    @classmethod
    def _sound(cls, columns: Mapping[str, Column], guard: Guard | None, known: dict[str, Any]) -> Batch:
        """A batch of columns that are known to have the same rows."""
        made = object.__new__(cls)
        made.__dict__.update(columns=columns, guard=guard, _known=known)
        return made

    def __post_init__(self) -> None:
        try:
            sizes = {name: _length(column) for name, column in self.columns.items()}
        except (TypeError, IndexError) as e:
            bad = [name for name, column in self.columns.items() if getattr(column, "shape", ()) == ()]
            raise ColumnError(f"one of {bad} has no rows; a column is a tensor whose first axis is the row") from e
        if len(set(sizes.values())) > 1:
            raise ColumnError(f"columns have different numbers of rows: {sizes}; every column has one entry per row")

    # -- reading ------------------------------------------------------------------------------------------------
    def __getitem__(self, name: str) -> Any:
        if self.guard is not None:
            self.guard.check(name, writing=False)
        if name not in self.columns:
            raise ColumnError(f"no column {name!r} in this batch; it has {sorted(self.columns)}")
        return self.columns[name]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "columns":
            raise AttributeError(name)
        return self[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The column, or `default` when there is none; an undeclared one raises as ever."""
        return self[name] if name in self.columns else default

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __len__(self) -> int:
        """The number of rows `N`."""
        if isinstance(self.columns, Picked):
            return self.columns.count
        return _length(next(iter(self.columns.values()))) if self.columns else 0

    def __contains__(self, name: object) -> bool:
        return name in self.columns

    def same(self, name: str) -> Any:
        """The one value that a column holds everywhere, or None; asked of a batch once, and known of rows of it."""
        if name not in self._known:
            column = self.columns.get(name)
            if name == "keep" and column is self.columns.get("mask"):
                return self.same("mask")
            if not isinstance(column, Tensor) or not column.numel():
                return None
            first = column.flatten()[0]
            self._known[name] = first.item() if bool((column == first).all()) else None
        return self._known[name]

    def knowing(self, **values: Any) -> Batch:
        """The same batch, told the one value that each of these columns holds, so that `same` need not look."""
        return Batch._sound(self.columns, self.guard, {**self._known, **values})

    @property
    def decisions(self) -> int:
        """How many decisions our policy made: `sum(mask)` over rows whose source is the policy."""
        mask, source = self.columns.get("mask"), self.columns.get("source")
        if not isinstance(mask, Tensor):
            return len(self)
        return int((mask if not isinstance(source, Tensor) else mask[source == 0]).sum())

    # -- making others ------------------------------------------------------------------------------------------
    def put(self, **columns: Column) -> Batch:
        """A batch with these columns added or replaced. The values are used as they are, without a copy."""
        if self.guard is not None:
            for name in columns:
                self.guard.check(name, writing=True)
        n = len(self)
        if not self.columns or any(_rows_in(c) != n for c in columns.values()):
            return Batch({**self.columns, **columns}, self.guard)  # which says what is wrong, if anything is
        mine, known = self.columns, {k: v for k, v in self._known.items() if k not in columns}
        if isinstance(mine, Picked):
            return Batch._sound(Picked(mine.source, mine.rows, {**mine.own, **columns}), self.guard, known)
        return Batch._sound({**mine, **columns}, self.guard, known)

    def beside(self, **columns: Column) -> Batch:
        """Other columns of the same decisions: their `mask` comes along, with what is known of it."""
        known = {"mask": self._known["mask"]} if "mask" in self._known else {}
        return Batch._sound({**columns, "mask": self["mask"]}, None, known)

    def take(self, rows: Tensor) -> Batch:
        """The rows of a long index `[n]` or a bool mask `[N]`, in that order."""
        picked = self.pick(rows)
        return Batch._sound(dict(picked.columns), self.guard, picked._known)

    def pick(self, rows: Tensor) -> Batch:
        """`take`, but a column is gathered only when it is read: for rows that are needed shortly, such as a minibatch.

        It holds on to the batch that it was taken from.
        """
        if rows.dtype == torch.bool and len(rows) != len(self):
            raise ColumnError(f"a mask of {len(rows)} rows cannot choose from a batch of {len(self)}")
        index = rows.nonzero().squeeze(1) if rows.dtype == torch.bool else rows
        known = {k: v for k, v in self._known.items() if v is not None}
        return Batch._sound(Picked(self.columns, index, {}), self.guard, known)

    def cuts(self, lengths: Sequence[int]) -> list[Batch]:
        """So many rows after each other, in place: a column of a picked batch is gathered once for all of them."""
        known = {k: v for k, v in self._known.items() if v is not None}
        ends = list(accumulate(lengths))
        return [Batch._sound(Picked(self.columns, slice(end - n, end), {}), self.guard, dict(known))
                for n, end in zip(lengths, ends)]  # fmt: skip

    def to(self, device: torch.device | str) -> Batch:
        """The same columns on another device."""
        return Batch({k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.columns.items()}, self.guard)

    def guarded(self, guard: Guard | None) -> Batch:
        return self if guard is self.guard else Batch._sound(self.columns, guard, self._known)

    def by(self, level: str) -> Segments:
        """Helpers over the rows that share an id at this level: `batch.by("group").mean(score)`."""
        return Segments.of(self[level])

    def score(self) -> Tensor:
        """The outcome of each row, `[N]`: its reward summed over its decisions."""
        reward: Tensor = self["reward"]
        return reward if reward.dim() == 1 else reward.sum(1)

    @staticmethod
    def cat(batches: Sequence[Batch]) -> Batch:
        """Join rows. Decision axes are padded on the right to the longest `T` (prompts on the left).

        A column that one batch lacks is filled: -1 for ids, `mask` for `keep`, nan for other floats, 0 for the rest.
        Padding is zero, so that a padded decision has `mask` 0. The nan is deliberate: reading what was never
        collected must not look like a number.
        """
        batches = [b for b in batches if len(b)]
        if not batches:
            return Batch()
        names = dict.fromkeys(name for b in batches for name in b.columns)
        return Batch({name: _join(name, batches) for name in names}, batches[0].guard)


def _length(column: Column) -> int:
    return column.shape[0] if isinstance(column, Tensor) else len(column)  # `len` of a tensor takes ten times as long


def _rows_in(column: Any) -> int:
    """`_length`, or -1 of what is no column."""
    if isinstance(column, Tensor):
        return column.shape[0] if column.dim() else -1
    return len(column) if isinstance(column, list) else -1


def _join(name: str, batches: Sequence[Batch]) -> Column:
    held = [b.columns.get(name, b.columns.get("mask") if name == "keep" else None) for b in batches]
    example = next(c for c in held if c is not None)
    if isinstance(example, list):
        return [x for b, c in zip(batches, held) for x in (c if c is not None else [None] * len(b))]
    length = max((c.shape[1] for c in held if isinstance(c, Tensor) and c.dim() > 1), default=0)
    if not name.startswith("prompt") and None in held:  # who lacks the column may have the longest rows
        there = [(c.shape[1], _decisions(b)) for c, b in zip(held, batches) if isinstance(c, Tensor) and c.dim() > 1]
        if all(mine == decisions for mine, decisions in there):
            length = max(length, *(_decisions(b) for b in batches))
    parts: list[Tensor] = []
    for b, c in zip(batches, held):
        if c is None:
            shape = (len(b), length, *example.shape[2:]) if example.dim() > 1 else (len(b),)
            missing = _FILL.get(name, float("nan") if example.is_floating_point() else 0)
            c = example.new_full(shape, missing)
        elif isinstance(c, Tensor) and c.dim() > 1 and c.shape[1] < length:
            pad = c.new_zeros(c.shape[0], length - c.shape[1], *c.shape[2:])
            c = torch.cat([pad, c] if name.startswith("prompt") else [c, pad], 1)
        assert isinstance(c, Tensor)
        parts.append(c)
    return torch.cat(parts)


def _decisions(batch: Batch) -> int:
    """`T`, how many decisions a row of this batch has room for; 0 where it has no such columns."""
    mask = batch.columns.get("mask")
    return mask.shape[1] if isinstance(mask, Tensor) and mask.dim() > 1 else 0


@dataclass(frozen=True)
class Segments:
    """Statistics over rows that share an id; `[N]` in, `[N]` out unless said otherwise.

    `index[i]` numbers the segment of row `i`, `0..size-1`, in order of id.
    """

    index: Tensor
    size: int

    @classmethod
    def of(cls, ids: Tensor) -> Segments:
        unique, index = torch.unique(ids, return_inverse=True)
        return cls(index, len(unique))

    def total(self, x: Tensor) -> Tensor:
        """One sum per segment, `[size, ...]`; of a bool, how many are true."""
        x = x.long() if x.dtype == torch.bool else x
        return x.new_zeros(self.size, *x.shape[1:]).index_add_(0, self.index, x)

    @property
    def counts(self) -> Tensor:
        """Rows in each segment, long `[size]`."""
        return torch.bincount(self.index, minlength=self.size)

    def count(self) -> Tensor:
        """Rows in this row's segment, `[N]` long."""
        return self.counts[self.index]

    def sum(self, x: Tensor) -> Tensor:
        return self.total(x)[self.index]

    def mean(self, x: Tensor) -> Tensor:
        return (self.total(x) / self._along(self.counts, x))[self.index]

    def std(self, x: Tensor, ddof: int = 1) -> Tensor:
        """Standard deviation; exactly 0 where all values are equal, and for a segment of `ddof` rows or fewer."""
        # Two-pass, on deviations from one member: equal values give exactly zero, whatever their size.
        first = self.distinct(x)[self.index]
        shifted = x - first
        deviation = shifted - self.mean(shifted)
        free = self._along(self.counts - ddof, x)
        variance = self.total(deviation.square()) / free.clamp_min(1)
        return variance.masked_fill(free <= 0, 0.0).sqrt()[self.index]

    @staticmethod
    def _along(values: Tensor, x: Tensor) -> Tensor:
        """`[size]` shaped to go with `[size, ...]` of `x`."""
        return values.reshape(-1, *[1] * (x.dim() - 1))

    def max(self, x: Tensor) -> Tensor:
        return self._extreme(x, "amax")

    def min(self, x: Tensor) -> Tensor:
        return self._extreme(x, "amin")

    def _extreme(self, x: Tensor, how: str) -> Tensor:
        out = x.new_zeros(self.size).scatter_reduce_(0, self.index, x, how, include_self=False)
        return out[self.index]

    def rank(self, x: Tensor) -> Tensor:
        """Place of each row inside its segment by ascending `x`, `0..count-1`; ties keep row order."""
        order = torch.argsort(x, stable=True)
        order = order[torch.argsort(self.index[order], stable=True)]
        starts = torch.cumsum(self.counts, 0) - self.counts
        place = torch.arange(len(x), device=x.device) - starts[self.index[order]]
        return torch.empty_like(place).scatter_(0, order, place)

    def distinct(self, x: Tensor) -> Tensor:
        """One value per segment, `[size]`: that of its first row."""
        first = torch.full((self.size,), len(x), dtype=torch.long, device=x.device)
        rows = torch.arange(len(x), device=x.device)
        first.scatter_reduce_(0, self.index, rows, "amin")
        return x[first]

    def gather(self, values: Tensor) -> Tensor:
        """Hand one value per segment, `[size, ...]`, back to its rows, `[N, ...]`."""
        return values[self.index]

    def same(self, x: Tensor) -> Tensor:
        """Whether every row of this row's segment has the same value, bool `[N]`."""
        return self.max(x) == self.min(x)
