"""One update whose rows another library's loop hands over in parts, as its micro-batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.core.batch import Batch
from trimtab.core.closure import Closure
from trimtab.core.errors import NonFiniteError
from trimtab.core.kit import Kit
from trimtab.core.loop import scoped


class Update:
    """All rows of one update, prepared once; `loss(i)` is the i-th part's share of its loss.

    The update-scope pieces and the weights of every term are made from all parts before the first loss is asked for, so
    the gradients of the shares add up to the gradient of the whole, however it was cut.

    kit: of a method with one track. parts: columns `[n_i, ...]`; rows whose column `scored` is False do not exist for
    the method.
    """

    def __init__(self, kit: Kit, parts: Sequence[Mapping[str, Tensor]]) -> None:
        (track,) = kit.method.tracks
        held = [part["scored"] for part in parts]
        scored = torch.cat(held)
        place = (scored.cumsum(0) - 1).split([len(h) for h in held])
        self.parts = [where[h] for where, h in zip(place, held)]
        self.kit, self.track = kit, track
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}  # of metrics: the weight of the decisions that were looked at
        self._closure: Closure | None = None
        if not bool(scored.any()):
            return
        rows = Batch({name: torch.cat([part[name] for part in parts]) for name in parts[0] if name != "scored"})
        rows = rows if bool(scored.all()) else rows.take(scored)
        kit.scope, kit.model = "", "policy"
        rows = scoped(kit, rows, kit.method.pieces, "policy")
        kit.scope, kit.model = track.name, track.trains
        rows = scoped(kit, rows, track.pieces, track.trains)
        self._closure = Closure(kit, track, rows)

    def loss(self, i: int) -> Tensor:
        """The share of part i, 0-d with a graph. Raises NonFiniteError, naming the term, where it is not finite."""
        anchor = next(p for p in self.kit.trained(self.track.trains).values())
        total = anchor.flatten()[0] * 0.0  # a part without a row has a gradient too: exactly zero
        if self._closure is None or not len(self.parts[i]):
            return total
        for name, term in self._closure.share(self.parts[i]).items():
            value = term.sum()
            held = value.detach()
            self._sums[name] = self._sums[name] + held if name in self._sums else held
            if term.metric:
                weight = term.weight.sum()
                self._weights[name] = self._weights[name] + weight if name in self._weights else weight
                continue
            if not bool(torch.isfinite(held)):
                raise NonFiniteError(
                    f"the value of term {name!r} in track {self.track.name!r} is not finite at update "
                    f"{self.kit.clock.updates}; no parameter was changed. A nan or infinite reward, advantage or "
                    f"log-probability gives this, and so does a learning rate that is too large."
                )
            total = total + value
        return total

    def logs(self) -> dict[str, float]:
        """What the parts have added up to: each term, each metric's mean, and what pieces have logged."""
        reported: dict[str, Any] = {
            name: total / self._weights[name].clamp_min(1e-30) if name in self._weights else total
            for name, total in self._sums.items()
        }
        return {**self.kit.drain(), **{name: float(value) for name, value in reported.items()}}
