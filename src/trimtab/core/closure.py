"""What an update piece is given: loss and gradient on any rows, at any parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.batch import Batch, Guard
from trimtab.core.errors import MethodError, NonFiniteError
from trimtab.core.kit import Kit
from trimtab.core.leaves import parameters_of
from trimtab.core.method import Track
from trimtab.core.piece import Piece
from trimtab.core.stopwatch import count, count_rows, phase, timed
from trimtab.core.terms import Term, is_even, reduce, some_of, split, units, weights
from trimtab.native.dense import DenseKernels

Params = Mapping[str, Tensor]
_ENGINE: Any = torch.autograd.Variable._execution_engine


@dataclass(frozen=True)
class Gradient:
    """loss: 0-d. grads: one tensor per trained parameter, by name. terms: the reduced value of every term."""

    loss: Tensor
    grads: dict[str, Tensor]
    terms: dict[str, Tensor]

    @cached_property
    def norm(self) -> Tensor:
        """Global l2 norm over all parameters, 0-d."""
        grads = list(self.grads.values())
        made = DenseKernels.norm(grads)
        return torch.nn.utils.get_total_norm(grads) if made is None else made


@dataclass(slots=True)  # see `Term`
class Weighted:
    """An un-reduced term with its weights: `sum()` is its share of the loss."""

    value: Tensor
    weight: Tensor
    per: Any
    metric: bool

    def sum(self) -> Tensor:
        return reduce(self.value, self.weight, self.per)


class Closure:
    """Loss and gradient of one track on the rows of one update.

    Gradients are taken for the track's own parameters only. `where` is a long index or bool mask into those rows; the
    totals are then those of the chosen rows. `params` replaces the trained parameters by name.
    """

    def __init__(self, kit: Kit, track: Track, batch: Batch) -> None:
        self.kit, self.track, self.batch = kit, track, batch
        self.model: nn.Module = kit.models[track.trains]
        known = track.losses
        self.losses, self.wants, self._unit, self._idle = known.pieces, known.wants, known.unit, known.idle
        self._ready: tuple[int, dict[str, Tensor]] | None = None
        self._short = False  # whether a policy's short cut to its gradient may be taken
        self._back: tuple[dict[str, Tensor], Any] | None = None  # what it took: results, and the way back
        self._replaced = 0  # how many contexts have put other parameters in their place
        if known.scoped:
            self._prepare(list(known.scoped))

    def anew(self, rows: Batch) -> Closure:
        """The same track on other rows."""
        return Closure(self.kit, self.track, rows)

    @property
    def params(self) -> dict[str, Tensor]:
        """The trained parameters, by name."""
        if self._replaced:
            return {n: p for n, p in parameters_of(self.model).items() if p.requires_grad}
        return dict(self.kit.trained(self.track.trains))

    def __call__(
        self, params: Params | None = None, where: Tensor | None = None, create_graph: bool = False
    ) -> Gradient:
        """Loss and gradient, summed over micro-batches. Raises NonFiniteError, naming the term, if it is not finite."""
        sums: dict[str, Tensor] = {}
        summed: dict[str, None] = {}  # the names of terms that are no metrics, in order
        weighed: dict[str, Tensor] = {}  # of metrics: the weight of the decisions that were looked at
        with self._at(params) as at:
            mine = list(at.values())
            loss: Tensor | None = None
            self._short = params is None and not create_graph
            grads = [torch.zeros_like(p) for p in mine] if create_graph else []
            for terms in self._micro(where):
                summed |= {name: None for name, t in terms.items() if not t.metric}
                values = {name: t.sum() for name, t in terms.items()}
                totals: dict[int, Tensor] = {}  # metrics of one loss share their weights
                for name, v in values.items():
                    v = v.detach() if v.requires_grad else v
                    sums[name] = sums[name] + v if name in sums else v
                    weight = terms[name].weight
                    if terms[name].metric and not is_even(weight):  # a metric of even weights is a mean already
                        total = totals[id(weight)] if id(weight) in totals else weight.sum()
                        totals[id(weight)] = total
                        weighed[name] = weighed[name] + total if name in weighed else total
                added = [v for name, v in values.items() if not terms[name].metric]
                if not added:
                    continue
                value = sum(added[1:], added[0])
                share = value if create_graph else value.detach()
                loss = share if loss is None else loss + share
                if not value.requires_grad:  # nothing to learn from these rows
                    continue
                with phase("backward"):
                    new = self._gradient(value, mine, create_graph)
                if create_graph:
                    grads = [g + n for g, n in zip(grads, new)]
                elif grads:
                    torch._foreach_add_(grads, new)
                else:
                    grads = new
            grads = grads or [torch.zeros_like(p) for p in mine]  # every row was skipped: exactly zero
            self._short = False
            floor = {id(w): w.clamp_min(1e-30) for w in weighed.values()}
            reported = {n: v / floor[id(weighed[n])] if n in weighed else v for n, v in sums.items()}
            made = Gradient(mine[0].new_zeros(()) if loss is None else loss, dict(zip(at, grads)), reported)
        if not create_graph:
            self._finite(made, list(summed))
        return made

    def _gradient(self, value: Tensor, mine: list[Tensor], create_graph: bool) -> list[Tensor]:
        back, self._back = self._back, None
        if create_graph:
            return list(torch.autograd.grad(value, mine, create_graph=True, materialize_grads=True))
        if back is None:
            return _slopes(value, mine)
        results, pull = back
        slopes = dict(zip(results, _slopes(value, list(results.values()))))
        with torch.no_grad():
            made: list[Tensor] = pull(slopes)
        return made

    def micro(self, params: Params | None = None, where: Tensor | None = None) -> Iterator[dict[str, Weighted]]:
        """The un-reduced terms with graph, `memory` rows at a time; the weights are those of all chosen rows.

        To differentiate twice, give `params` leaves of your own that require a gradient.
        """
        with self._at(params):
            yield from self._micro(where)

    def terms(self, params: Params | None = None, where: Tensor | None = None) -> dict[str, Weighted]:
        """The un-reduced terms on all chosen rows at once, with graph, whatever `memory` is (see `micro`)."""
        rows = self._rows(where)
        with self._at(params):
            return self._terms(rows, self._weights(rows))

    def share(self, part: Tensor) -> dict[str, Weighted]:
        """The un-reduced terms of some rows, a long index in ascending order, weighed as their share of all rows.

        For a loop that cuts the update itself: sums over disjoint parts add up to the loss of the whole.
        """
        return self._part(self.batch, self._weights(self.batch), part)

    # -- inside -------------------------------------------------------------------------------------------------
    def _rows(self, where: Tensor | None) -> Batch:
        return self.batch if where is None else self.batch.take(where)

    def _weights(self, rows: Batch) -> list[Tensor]:
        """For each loss, `[2, N, T]`: the weights of its terms, and those of its metrics (a mean over decisions)."""
        double = next(iter(self.params.values())).dtype == torch.float64
        dtype = torch.float64 if double else torch.float32
        made: dict[Any, Tensor] = {}
        for p in self.losses:
            o = p.core.options
            key = (o["rows"], o["per"])
            if key not in made:
                made[key] = weights(rows, o, dtype)
        return [made[p.core.options["rows"], p.core.options["per"]] for p in self.losses]

    def _micro(self, where: Tensor | None) -> Iterator[dict[str, Weighted]]:
        rows = self._rows(where)
        scale = self._weights(rows)
        live = self._live(rows)
        memory = self._at_once(rows)
        if live is None and (memory is None or memory >= len(rows)):
            yield self._terms(rows, scale)
            return
        parts = split(units(rows, self._unit), memory) if live is None else self._live_parts(rows, live, memory)
        for part in parts:
            yield self._part(rows, scale, part)

    def _part(self, rows: Batch, scale: list[Tensor], part: Tensor) -> dict[str, Weighted]:
        if len(part) == len(rows):
            return self._terms(rows, scale)
        return self._terms(rows.take(part), [w.index_select(1, part.to(w.device)) for w in scale])

    def _at_once(self, rows: Batch) -> int | None:
        """Rows of one forward and backward pass: what the caller said, else what the model reads well at once.

        A forward that is there already, of all rows, is not made again in parts.
        """
        if self.kit.memory is not None or self._ready is not None or self.kit.is_ahead(self.track.trains):
            return self.kit.memory
        model: Any = self.model
        most: int | None = model.rows_at_once(rows) if hasattr(model, "rows_at_once") else None
        if most is not None:
            count(asked=1.0, at_once=most)
        return most

    def _live(self, rows: Batch) -> Tensor | None:
        """Rows that can have a gradient, or None for all: a loss may declare where it is exactly zero (`idle`).

        A wrap may add to what it surrounds, so it must declare that too.
        """
        if self._idle is None:
            return None
        dead = torch.stack([test(rows.guarded(None)) for test in self._idle]).all(0)
        return None if not bool(dead.any()) else ~dead

    def _live_parts(self, rows: Batch, live: Tensor, memory: int | None) -> list[Tensor]:
        ids = units(rows, self._unit)
        whole = torch.zeros(int(ids.max()) + 1, dtype=torch.bool).index_fill_(0, ids[live.cpu()], True)[ids]
        index = whole.nonzero().squeeze(1)
        if not len(index):
            return []
        return [index[part] for part in split(torch.unique(ids[index], return_inverse=True)[1], memory)]

    @timed("forward")
    def _terms(self, rows: Batch, scale: list[Tensor]) -> dict[str, Weighted]:
        plain = rows.guarded(None)
        count_rows(plain)
        now = self._now(rows)
        made: dict[str, Weighted] = {}
        views: dict[int, tuple[Tensor, ...]] = {}
        for p, weight in zip(self.losses, scale):
            per, chosen = p.core.options["per"], some_of(plain, p.core.options["rows"])
            whole = chosen is None
            cuts = views.get(id(weight)) or views.setdefault(id(weight), weight.unbind(0))
            for term in self._run(p, plain, now, chosen):
                if term.name in made:
                    raise MethodError(f"two terms are called {term.name!r}; names must differ within a track")
                cut = cuts[1 if term.metric else 0]
                cut = cut if whole else cut[chosen]
                if term.metric and term.value.dim() == 1:  # each row counts once, however long it is
                    cut = (cut.sum(1, keepdim=True) > 0).to(cut.dtype)
                if term.value.shape != cut.shape[: max(term.value.dim(), 1)]:
                    raise MethodError(
                        f"term {term.name!r} has shape {list(term.value.shape)}; a term is un-reduced, one value per "
                        f"decision {list(cut.shape)} or per row {[len(cut)]}"
                    )
                made[term.name] = Weighted(term.value, cut, "token" if term.metric else per, term.metric)
        return made

    def _now(self, rows: Batch) -> dict[str, Tensor]:
        """What the losses want of the model on these rows, with gradient."""
        if not self.wants:
            return {}
        ready, self._ready = self._ready, None
        if ready is not None and rows is self.batch and ready[0] == self._version():
            return ready[1]  # the forward that prepared the update-scope parts
        ahead = None if self._replaced else self.kit.taken_ahead(self.track.trains, rows, self.wants)
        if ahead is not None:
            return ahead  # the forward that an update-scope piece wanted
        model: Any = self.model
        short = model.pullback(rows.guarded(None), self.wants) if self._short and hasattr(model, "pullback") else None
        if short is None:
            return model.evaluate(rows.guarded(None), self.wants)
        self._back = ({name: made.requires_grad_() for name, made in short[0].items()}, short[1])
        return self._back[0]

    def _version(self) -> int:
        """Changes whenever a trained parameter is written or replaced."""
        return hash(tuple((id(p), p._version) for p in parameters_of(self.model).values()))

    def _run(self, p: Piece, rows: Batch, now: dict[str, Tensor], chosen: Tensor | None) -> list[Term]:
        """The terms of one loss on the rows it concerns; others may hold nan where they lack a column."""
        if chosen is not None:
            if not bool(chosen.any()):
                return []
            rows, now = rows.take(chosen), {k: v[chosen] for k, v in now.items()}
        if not self.kit.debug:
            return _listed(p(self.kit, rows, now))
        guard = Guard(p.name, p.union("reads") | {"mask", "keep", "source"}, p.union("writes"))
        before = self.kit._versions()
        made = _listed(p(self.kit, rows.guarded(guard), now))
        self.kit.unchanged(p, before)
        return made

    def _prepare(self, scoped: list[Piece]) -> None:
        """Run update-scope parts once on all rows, without gradient; afterwards they are constants.

        When all rows fit into memory at once, the forward made here serves the first gradient too.
        """
        now: dict[str, Tensor] = {}
        if self.wants and (self.kit.memory is None or self.kit.memory >= len(self.batch)):
            with phase("forward"):
                with_graph = self._now(self.batch)
            self._ready = (self._version(), with_graph)
            now = {k: v.detach() for k, v in with_graph.items()}
        elif self.wants:
            now = self.kit.evaluate(self.track.trains, self.batch, self.wants, units(self.batch, self._unit))
        self.kit._once.clear()
        self.kit.preparing = True
        rows = self.batch.guarded(None)
        with torch.no_grad():
            for p in scoped:
                self._run(p, rows, now, some_of(rows, p.core.options["rows"]))
        self.kit.preparing = False

    @contextmanager
    def _at(self, params: Params | None) -> Iterator[dict[str, Tensor]]:
        """The trained parameters, or others put in their place for the time being (tied weights included)."""
        mine = self.params
        if params is None:
            yield mine
            return
        if set(params) != set(mine):
            raise ValueError(f"params must be exactly the trained ones; differs in {sorted(set(params) ^ set(mine))}")
        names = {id(p): n for n, p in mine.items()}
        places = [
            (module, leaf, names[id(p)], p)
            for module in self.model.modules()
            for leaf, p in module._parameters.items()
            if p is not None and id(p) in names
        ]
        leaves = {n: p if p.requires_grad else p.detach().requires_grad_() for n, p in params.items()}
        self._replaced += 1
        try:
            for module, leaf, name, _ in places:
                module._parameters[leaf] = leaves[name]  # type: ignore[assignment]
            yield leaves
        finally:
            self._replaced -= 1
            for module, leaf, _, old in places:
                module._parameters[leaf] = old

    def _finite(self, made: Gradient, summed: list[str]) -> None:
        if math.isfinite(float((made.loss + made.norm).detach())):
            return
        bad = [name for name in summed if not torch.isfinite(made.terms[name])]
        what = f"the value of term {bad[0]!r}" if bad else f"the gradient of {summed}"
        raise NonFiniteError(
            f"{what} in track {self.track.name!r} is not finite at update {self.kit.clock.updates}; no parameter was "
            f"changed. A nan or infinite reward, advantage or log-probability in its columns gives this, and so does "
            f"a learning rate that is too large: look at the columns of step.batch, or lower the rate."
        )


def _slopes(value: Tensor, of: list[Tensor]) -> list[Tensor]:
    """`autograd.grad` of a number, zeros where it does not depend: what that calls, for its checks take longer than a
    small graph."""
    start = torch.ones_like(value)
    found = _ENGINE.run_backward((value,), (start,), False, False, tuple(of), True, accumulate_grad=False)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(of, found)]


def _listed(made: Any) -> list[Term]:
    return [made] if isinstance(made, Term) else list(made)
