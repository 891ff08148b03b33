"""Keys and values of rows that share their prompts: a prompt's are held once, a row's own are what it has said."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

# Keys or values are widened so many at a time (1 MiB in float32): larger temporaries cost more than the products.
NUMBERS_AT_ONCE = 2**18
# Places are a multiple of so many: a line of memory in bfloat16.
STEP = 32


def settle(before: Tensor) -> Tensor:
    """Where each of `n` successors goes so that the places `[0, n)` are filled and as few as possible move.

    before: sorted long `[n]`, each one's present place; one may come several times. Long `[n]`.
    """
    n = len(before)
    stays = before < n
    stays[1:] &= before[1:] != before[:-1]
    free = torch.ones(n, dtype=torch.bool, device=before.device)
    free[before[stays]] = False
    place = before.clone()
    place[~stays] = free.nonzero().squeeze(1)
    return place


class SharedCache:
    """The cache of a decoder whose rows come in groups that share a prompt.

    shape: layers, key heads, width of a head. prompts, rows: how many are live at most. length: the longest prompt.
    room: the most tokens a row appends. wide: the dtype attention is computed in; `dtype` is that of what is held.

    Prompts stand at the left of their places. What rows say goes round in a ring: the token appended at time `t` stands
    in column `t % room` of every row, whenever the row began, so that a step writes one slice.
    """

    def __init__(
        self, shape: tuple[int, int, int], prompts: int, rows: int, length: int, room: int, dtype: torch.dtype,
        wide: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        layers, heads, width = shape

        def held(*sizes: int) -> Tensor:
            count = layers * heads * math.prod(sizes)
            # Compiled kernels read STEP numbers at a time, so some behind the last.
            return torch.empty(count + STEP, dtype=dtype, device=device)[:count].view(
                layers, sizes[0], heads, *sizes[1:]
            )

        # Keys lie on their side: a row of scores is then a sum of rows.
        length, places = (math.ceil(size / STEP) * STEP for size in (length, room))
        self.prompt_keys, self.prompt_values = held(prompts, width, length), held(prompts, length, width)
        self.said_keys, self.said_values = held(rows, width, places), held(rows, places, width)
        # Where each layer's begin in memory, for compiled kernels.
        tensors = (self.prompt_keys, self.prompt_values, self.said_keys, self.said_values)
        self.places = [tuple(held[i].data_ptr() for held in tensors) for i in range(layers)]
        self.wide, self.room, self.time = wide, room, 0
        none = torch.empty(0, dtype=torch.long, device=device)
        self.lengths = none  # [G], of each live prompt
        self.owner, self.born = none, none  # [n], each row's prompt and the time of its first token
        self._arrange()

    @property
    def place(self) -> Tensor:
        """How many tokens each row has before the next one, `[n]`."""
        return self.lengths[self.owner] + self.time - self.born

    def add(self, lengths: Tensor, width: int) -> slice:
        """New prompts, a row each, whose keys and values of `width` places are written next; their slots."""
        held, rows, m = len(self.lengths), len(self.owner), len(lengths)
        new = torch.arange(m, device=lengths.device)
        self.lengths = torch.cat([self.lengths, lengths])
        self.owner = torch.cat([self.owner, held + new])
        self.born = torch.cat([self.born, new * 0 + self.time])
        # Hidden places have weight 0, and 0 times what memory held before may be nan.
        self.prompt_keys[:, held : held + m, ..., width:] = self.prompt_values[:, held : held + m, :, width:] = 0
        reach = slice(0, self._reach)
        self.said_keys[:, rows : rows + m, ..., reach] = self.said_values[:, rows : rows + m, :, reach] = 0
        self._arrange()
        return slice(held, held + m)

    def read(self, layer: int, slots: slice, keys: Tensor, values: Tensor) -> None:
        """Keep keys and values `[m, H, t, w]` of new prompts, whose slots `add` gave."""
        t = keys.shape[2]
        self.prompt_keys[layer, slots, :, :, :t], self.prompt_values[layer, slots, :, :t] = keys.mT, values

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, a long index `[n]` into the present ones. Only those that change place are copied."""
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero().squeeze(1)
        if len(moved):
            reach = slice(0, self._reach)
            self.said_keys[:, moved, ..., reach] = self.said_keys[:, rows[moved], ..., reach]
            self.said_values[:, moved, :, reach] = self.said_values[:, rows[moved], :, reach]
        self.owner, self.born = self.owner[rows], self.born[rows]
        live = self.owner.unique()
        if len(live) < len(self.lengths):
            place = settle(live)
            gone = (place != live).nonzero().squeeze(1)
            if len(gone):
                for held in (self.prompt_keys, self.prompt_values):
                    held[:, place[gone]] = held[:, live[gone]]
            now = torch.empty_like(self.lengths)
            now[live] = place
            self.owner = now[self.owner]
            self.lengths = self.lengths[live[place.argsort()]]
        self._arrange()

    @property
    def _reach(self) -> int:
        """Columns of the ring that have been written."""
        return min(self.time, self.room)

    def _arrange(self) -> None:
        """What does not change from step to step: which rows belong to each prompt, and which places are hidden."""
        self.table: Tensor | None = None  # [G, R], rows of each prompt; filled up with row 0, which is then not read
        n, held = len(self.owner), len(self.lengths)
        line = torch.arange(n, device=self.owner.device)
        if not torch.equal(self.owner, line):
            order = self.owner.argsort(stable=True)
            counts = self.owner.bincount(minlength=held)
            at = torch.empty_like(line)
            at[order] = line - (counts.cumsum(0) - counts)[self.owner[order]]
            self.table = line.new_zeros(held, int(counts.max()) if n else 0)
            self.table[self.owner, at] = line
            self.at = at
        self.longest = int(self.lengths.max()) if held else 0
        self.prompt_views = _views(self.prompt_keys[:, :held], self.prompt_values[:, :held], slice(0, self.longest))
        beyond = torch.arange(self.longest, device=self.owner.device) >= self.lengths[:, None]
        self.prompt_bias = self._bias(beyond)
        self.oldest = int(self.born.min()) if n else self.time
        self.even = bool((self.born == self.oldest).all())

    def _bias(self, hidden: Tensor) -> Tensor | None:
        if not bool(hidden.any()):
            return None
        zero = torch.zeros(hidden.shape, dtype=self.wide, device=hidden.device)
        return zero.masked_fill_(hidden, -torch.inf)[:, None, None]

    def begin(self) -> None:
        """Before a step's first layer: the column it writes, and those it reads."""
        self.column = self.time % self.room
        first = self.column - (self.time - self.oldest)
        # A window that goes round is the whole ring.
        window = slice(first, self.column + 1) if first >= 0 else slice(0, self.room)
        keys, values = (held[:, : len(self.owner)] for held in (self.said_keys, self.said_values))
        self.written = list(zip(keys[..., self.column].unbind(), values[:, :, :, self.column].unbind()))
        self.said_views = _views(keys, values, window)
        self.said_bias = None
        if not self.even or first < 0:
            columns = torch.arange(window.start, window.stop, device=self.born.device)
            age = (self.column - columns) % self.room
            self.said_bias = self._bias(age > (self.time - self.born)[:, None])

    def end(self) -> None:
        """After a step's last layer."""
        self.time += 1

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Append this step's key and value `[n, H, w]`; attention of the scaled query `[n, H, g, w]`, like the query.

        One softmax over both parts: `softmax([Q K_prompt', Q K_said']) [V_prompt; V_said]`. All rows of a prompt are
        one product with its keys and one with its values.
        """
        n, heads, groups, _ = query.shape
        (prompt_keys, prompt_values), (keys, values) = self.prompt_views[layer], self.said_views[layer]
        for column, new in zip(self.written[layer], (key, value)):
            column.copy_(new)
        own = _scores(query.flatten(0, 1), keys).view(n, heads, groups, -1)
        if self.said_bias is not None:
            own += self.said_bias
        by_prompt = self._by_prompt(query)
        shared = _scores(by_prompt.flatten(0, 1), prompt_keys).view(*by_prompt.shape[:3], -1)
        if self.prompt_bias is not None:
            shared += self.prompt_bias
        p = torch.cat([shared, self._by_prompt(own)], -1).softmax(-1)
        shared, own = p.split([self.longest, own.shape[-1]], -1)
        out = _mixed(shared.flatten(0, 1), prompt_values).view(*by_prompt.shape)
        said = _mixed(self._by_row(own, groups).flatten(0, 1), values).view(n, heads, groups, -1)
        return self._by_row(out, groups) + said

    def _by_prompt(self, x: Tensor) -> Tensor:
        """`[n, H, g, w]` to `[G, H, R g, w]`."""
        return x if self.table is None else x[self.table].transpose(1, 2).flatten(2, 3)

    def _by_row(self, x: Tensor, groups: int) -> Tensor:
        """`[G, H, R g, w]` to `[n, H, g, w]`."""
        return x if self.table is None else x.unflatten(2, (-1, groups)).transpose(1, 2)[self.owner, self.at]


def _views(keys: Tensor, values: Tensor, places: slice) -> list[tuple[Tensor, Tensor]]:
    """Keys `[B H, w, t]` and values `[B H, t, w]` of every layer at these places."""
    some = keys[..., places].flatten(1, 2), values[..., places, :].flatten(1, 2)
    return list(zip(*(held.unbind() for held in some)))


def _scores(query: Tensor, keys: Tensor) -> Tensor:
    """`q k`, `[b, r, t]` of `[b, r, w]` and `[b, w, t]`, in the dtype of the query."""
    parts = [q.bmm(k) for q, k in _widened(query, keys)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _mixed(weights: Tensor, values: Tensor) -> Tensor:
    """`p v`, `[b, r, w]` of `[b, r, t]` and `[b, t, w]`, in the dtype of the weights."""
    parts = [p.bmm(v) for p, v in _widened(weights, values)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _widened(x: Tensor, held: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """Both in the dtype of `x`, so many batches at a time that the wide copies stay small."""
    if held.dtype == x.dtype or held.numel() <= NUMBERS_AT_ONCE:
        return [(x, held.to(x.dtype))]
    at_once = max(1, NUMBERS_AT_ONCE // held[0].numel())
    return ((some, wide.to(x.dtype)) for some, wide in zip(x.split(at_once), held.split(at_once)))
