"""The kit: what every piece is handed, and the debug mode that holds pieces to their declarations."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.batch import Batch, Guard
from trimtab.core.errors import MethodError, PurityError, nearest
from trimtab.core.leaves import parameters_of
from trimtab.core.piece import Piece
from trimtab.core.state import Clock, State
from trimtab.core.stopwatch import count_rows, phase, timed
from trimtab.core.terms import some_of, split

_ROW = "_row"  # which row of the whole batch a row is, while a piece sees those of some sources


class Own(MutableMapping[str, Any]):
    """The state that one piece declared; reading or writing any other key raises."""

    def __init__(self, store: dict[str, Any], scope: str, piece: Piece) -> None:
        self._store, self._scope, self._piece = store, scope, piece

    def _key(self, key: str) -> str:
        if key not in self._piece.state:
            raise PurityError(
                f"{self._piece.name} uses state {key!r} without declaring it. {nearest(key, self._piece.state)}"
            )
        return f"{self._scope}/{key}"

    def __getitem__(self, key: str) -> Any:
        return self._store[self._key(key)]

    def __setitem__(self, key: str, value: Any) -> None:
        self._store[self._key(key)] = value

    def __delitem__(self, key: str) -> None:
        raise PurityError(f"{self._piece.name} may change its state {key!r}, not remove it")

    def __iter__(self) -> Iterator[str]:
        return iter(self._piece.state)

    def __len__(self) -> int:
        return len(self._piece.state)


class Kit:
    """Handed to every piece.

    models: networks and copies by name. environment: what answers decisions. clock: turns, updates, decisions, rows,
    progress. state: what this piece declared. memory: rows per forward pass (None: all at once). single: whether this
    batch gives exactly one gradient, so that the policy being trained is still the one at the start of the update.
    """

    def __init__(self, state: State, method: Any, memory: int | None, debug: bool) -> None:
        self._tree = state
        self._once: dict[int, Any] = {}
        self._ahead: dict[str, tuple[list[tuple[Tensor, int]], dict[str, Any], dict[str, Tensor]]] = {}
        self._logs: list[tuple[str, Any]] = []
        self.method, self.memory, self.debug = method, memory, debug
        self.models: Mapping[str, nn.Module] = state.lookup()
        self.environment: Any = state.environment
        self.clock: Clock = state.clock
        self._trained: dict[str, dict[str, Tensor]] = {}
        self._decided: list[int] = []  # shared by the kits that `of` hands out, like the logs
        self.single = True
        self.preparing = True
        self.scope = ""
        self.model = "policy"
        self.state: MutableMapping[str, Any] = {}

    def of(self, piece: Piece) -> Kit:
        """The same kit, showing this piece's own state."""
        if not piece.state:
            return self
        other = object.__new__(Kit)
        other.__dict__.update(self.__dict__, state=Own(self._tree.pieces, self.scope, piece))
        return other

    def trained(self, name: str) -> dict[str, Tensor]:
        """The parameters of a model that are trained, by name; looked up once a turn."""
        if name not in self._trained:
            named = parameters_of(self.models[name])
            self._trained[name] = {n: p for n, p in named.items() if p.requires_grad}
        return self._trained[name]

    def rng(self, name: str) -> torch.Generator:
        """A named random stream of the run; it is saved, and it does not depend on any other stream."""
        return self._tree.stream(f"{self.scope}/{name}" if self.scope else name)

    def playing(self, environment: Any, *, quietly: bool = False) -> Kit:
        """The same kit with another environment; `quietly`, what is logged is dropped. For a collect inside another."""
        other = copy.copy(self)
        other.environment = environment
        other._logs = [] if quietly else self._logs
        return other

    def decided(self, count: int) -> None:
        """Say how many decisions were made for this batch, when it holds others too (replayed or offline rows)."""
        self._decided.append(count)

    def counted(self, collect: Callable[[], Batch]) -> Batch:
        """Run a collect and say how many decisions it cost, unless it says so itself: a wrap may drop its rows."""
        before = len(self._decided)
        batch = collect()
        if len(self._decided) == before:
            self.decided(batch.decisions)
        return batch

    def decisions(self, batch: Batch) -> int:
        """How many decisions this batch cost: as said by its collect pieces, else those of our policy in it."""
        return sum(self._decided) if self._decided else batch.decisions

    def log(self, name: str, value: float | Tensor) -> None:
        """Record a number; several of one turn are averaged. Tensors are read once, at the end of the turn."""
        self._logs.append((name, value.detach() if isinstance(value, Tensor) and value.requires_grad else value))

    def once(self, piece: Piece, compute: Callable[[], Any]) -> Any:
        """The value of an update-scope part: computed while preparing, from all rows of the update; then constant."""
        key = id(piece)
        if key not in self._once:
            if not self.preparing:
                raise MethodError(f"{piece.name} is an update-scope part, but its loss was not prepared on all rows")
            made = compute()
            for value in made if isinstance(made, tuple) else (made,):
                if isinstance(value, Tensor) and value.dim() > 0:
                    raise MethodError(
                        f"{piece.name} is an update-scope part and gave a tensor of shape {list(value.shape)}; it is "
                        f"computed once for all rows and gives numbers. Values per row belong into a column."
                    )
            self._once[key] = made
        return self._once[key]

    def actor(self, name: str = "policy") -> Any:
        """The model that decides, inside the method's `act` wraps."""
        actor: Any = self.models[name]
        shared = copy.copy(self)
        shared.scope = ""  # the wraps are shared pieces: their state and streams are not those of a track that asks
        for p in self.method.pieces:
            if p.stage == "act":
                actor = p(shared, actor)
        return actor

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What happens inside leaves no trace in the run: no random number is used up, nothing is logged or counted.

        Random streams (the global ones too) and the state of `act` wraps are afterwards as they were before. For what
        only looks, such as an evaluation amid training. Models and the environment are not guarded.
        """
        tree = self._tree
        streams = {name: stream.get_state() for name, stream in tree.streams.items()}
        everywhere = tree.everywhere.state_dict()
        acting = {f"/{key}" for p in self.method.pieces if p.stage == "act" for q in p.walk() for key in q.state}
        held = {key: copy.deepcopy(tree.pieces[key]) for key in acting}
        logs, decided = len(self._logs), len(self._decided)
        try:
            yield
        finally:
            for name in [n for n in tree.streams if n not in streams]:
                del tree.streams[name]
            for name, state in streams.items():
                tree.streams[name].set_state(state)
            tree.everywhere.load_state_dict(everywhere)
            tree.pieces.update(held)
            del self._logs[logs:], self._decided[decided:]

    @timed("evaluate")
    @torch.no_grad()
    def evaluate(self, name: str, batch: Batch, want: frozenset[str] | set[str], unit: Tensor | None = None) -> Any:
        """`models[name].evaluate(batch, want)` without gradient, `memory` rows at a time. Columns come back by name."""
        model: Any = self.models[name]
        plain = batch.guarded(None)
        count_rows(plain)
        if self.memory is None or self.memory >= len(batch):
            return model.evaluate(plain, want)
        parts = split(torch.arange(len(batch)) if unit is None else unit, self.memory)
        outs = [model.evaluate(plain.take(part), want) for part in parts]
        order = torch.argsort(torch.cat(parts))
        return {k: torch.cat([o[k] for o in outs]).index_select(0, order.to(outs[0][k].device)) for k in outs[0]}

    def evaluate_ahead(self, name: str, batch: Batch, want: frozenset[str]) -> Any:
        """`evaluate` for update-scope pieces: where a track is about to take one gradient of the same forward pass, and
        all rows fit at once, its graph is kept, and that track does not make it again (`taken_ahead`)."""
        clock, wanted = self.clock, frozenset[str]()
        for track in self.method.tracks:
            due = track.on == "update" and clock.updates % track.every == 0
            if due and track.trains == name and self.scope in ("", track.name) and track.update.core.one_gradient:
                wanted = track.losses.wants
                break
        if not wanted or not wanted <= want or (self.memory is not None and self.memory < len(batch)):
            return self.evaluate(name, batch, want)
        model: Any = self.models[name]
        plain = batch.guarded(None)
        with phase("evaluate"), torch.enable_grad():
            count_rows(plain)
            made = model.evaluate(plain, want)
        self._ahead[name] = ([(p, p._version) for p in parameters_of(model).values()], dict(plain.columns), made)
        return {k: v.detach() for k, v in made.items()}

    def is_ahead(self, name: str) -> bool:
        """Whether `evaluate_ahead` kept a forward pass of this model that nobody has taken."""
        return name in self._ahead

    def taken_ahead(self, name: str, batch: Batch, want: frozenset[str]) -> dict[str, Tensor] | None:
        """What `evaluate_ahead` kept, with its graph, once: of these parameters and, column by column, these rows."""
        if name not in self._ahead:
            return None
        parameters, columns, made = self._ahead.pop(name)
        same = all(p._version == v for p, v in parameters) and all(
            batch.columns.get(k) is v for k, v in columns.items()
        )
        return made if same and want <= made.keys() else None

    # -- running pieces -----------------------------------------------------------------------------------------
    @torch.no_grad()
    def annotate(self, piece: Piece, batch: Batch, *now: Any) -> Batch:
        """Run an annotate, credit, select or probe piece on the rows it concerns, without gradient.

        Rows it does not concern keep what a column held, and get zeros in a new one; no select drops them.
        """
        self._once.clear()  # an update-scope part of this piece sees the rows that the piece sees
        self.preparing = True
        reserved = piece.core.options
        chosen = some_of(batch, reserved["rows"]) if piece.stage in ("credit", "select") else None
        if chosen is None:
            return self._guarded(piece, batch, *now)
        concerned = chosen.nonzero().squeeze(1)
        made = batch.take(concerned).put(**{_ROW: concerned})
        if len(made):
            made = self._guarded(piece, made, *({k: v[chosen] for k, v in values.items()} for values in now))
            if len(made) != len(concerned):  # a select that drops rows: those of other sources stay, behind its own
                rows = made.columns.get(_ROW)
                if piece.stage != "select" or not isinstance(rows, Tensor):
                    raise MethodError(f"{piece.name} ({piece.stage}) gives {len(made)} rows for {len(concerned)}")
                batch = batch.take(torch.cat([rows, (~chosen).nonzero().squeeze(1)]))
                concerned = torch.arange(len(rows), device=rows.device)
        spread: dict[str, Any] = {}
        for name in piece.union("writes"):
            if len(made) and name not in made.columns:  # it declared a column that it had no need to write
                continue
            new = made.columns.get(name, batch.columns["mask"])
            assert isinstance(new, Tensor)
            dtype = new.dtype if len(made) else torch.get_default_dtype()
            old = batch.columns.get(name, new.new_zeros(len(batch), *new.shape[1:], dtype=dtype))
            assert isinstance(old, Tensor)
            spread[name] = old.index_copy(0, concerned, new.to(old.dtype)) if len(made) else old
        return batch.put(**spread)

    def _guarded(self, piece: Piece, batch: Batch, *more: Any) -> Batch:
        if not self.debug:
            plain: Batch = piece(self, batch, *more)
            return plain
        before = self._versions()
        guard = Guard(piece.name, piece.union("reads"), piece.union("writes"))
        made: Batch = piece(self, batch.guarded(guard), *more)
        self.unchanged(piece, before)
        return made if piece.stage == "probe" else made.guarded(None)

    def _versions(self) -> dict[str, int]:
        return {n: sum(t._version for t in (*m.parameters(), *m.buffers())) for n, m in self.models.items()}

    def unchanged(self, piece: Piece, before: dict[str, int]) -> None:
        """Debug mode: only `update` pieces may change parameters."""
        changed = [name for name, version in self._versions().items() if before[name] != version]
        if changed:
            raise PurityError(f"{piece.name} is a {piece.stage} piece but changed the parameters of {changed}")

    def drain(self) -> dict[str, float]:
        """All numbers recorded since the last drain, averaged by name; one transfer from the device."""
        logs, self._logs[:] = list(self._logs), []
        if not logs:
            return {}
        values: list[Any] = [v for _, v in logs]
        alike: dict[Any, list[int]] = {}
        for i, v in enumerate(values):
            if isinstance(v, Tensor):
                alike.setdefault((v.dtype, v.device), []).append(i)
        for places in alike.values():
            read = torch.stack([values[i] for i in places]).double().tolist()
            for i, number in zip(places, read):
                values[i] = number
        sums: dict[str, list[float]] = {}
        for (name, _), v in zip(logs, values):
            sums.setdefault(name, []).append(float(v))
        return {name: sum(v) / len(v) for name, v in sums.items()}
