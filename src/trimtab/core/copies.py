"""Declared copies: every frozen relative of a model, kept by one mechanism.

A copy is refreshed at fixed moments of the clock and is part of the state tree. `collect`, `act`, terms and evaluation
read it from `kit.models` under the name it was declared with.
"""

from __future__ import annotations

import copy as copying
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.errors import MethodError
from trimtab.core.leaves import buffers_of, parameters_of
from trimtab.core.piece import Schedule


@dataclass(frozen=True)
class Copy:
    """How a copy follows its source. Make one with the functions below.

    kind: its rule. source: the model it follows. moment: when it is refreshed: "begin" of the run, start of a "turn",
    "after" an update of the source, "end" of a turn, entry of a "phase".
    """

    kind: str
    source: str
    moment: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def follows(self) -> str:
        """The model after whose updates it is refreshed."""
        after: str = self.options.get("after") or self.source
        return after

    def __str__(self) -> str:
        inside = "".join(f", {k}={v!r}" for k, v in self.options.items())
        return f"{self.kind}({self.source!r}{inside})"


def frozen(source: str) -> Copy:
    """The model as it was when the run began: the reference of a KL penalty."""
    return Copy("frozen", source, "begin")


def polyak(source: str, tau: float, after: str | None = None) -> Copy:
    """`copy <- (1 - tau) copy + tau source` after each update of the source; tau in (0, 1].

    after: another model, after whose updates it is done instead: a critic's target that moves when the actor does.
    """
    if not 0 < tau <= 1:
        raise MethodError(f"polyak tau={tau} is outside (0, 1]")
    return Copy("polyak", source, "after", {"tau": tau, **({} if after in (None, source) else {"after": after})})


def ema(source: str, decay: float) -> Copy:
    """`copy <- decay copy + (1 - decay) source` after each update; decay in [0, 1)."""
    return polyak(source, 1 - decay)


def every(source: str, n: int) -> Copy:
    """A hard copy after each n-th update of the source."""
    if n < 1:
        raise MethodError(f"every(n={n}) needs n >= 1")
    return Copy("every", source, "after", {"n": n})


def previous(source: str, by: str = "update") -> Copy:
    """The source before its latest update: theta_{t-1} all through update t, theta_t after it.

    by: "turn" takes the source at the start of the turn before this one instead; in the first turn they are equal.
    """
    if by not in ("update", "turn"):
        raise MethodError(f"previous(by={by!r}): by is 'update' or 'turn'")
    return Copy("previous", source, "after") if by == "update" else Copy("previous", source, "turn", {"by": by})


def at_phase(source: str) -> Copy:
    """The source as it was when the current phase was entered."""
    return Copy("at_phase", source, "phase")


def pool(source: str, k: int, every: int) -> Copy:
    """The last `k` snapshots, one each `every` turns; each turn the copy holds one of them, drawn uniformly."""
    if k < 1 or every < 1:
        raise MethodError(f"pool(k={k}, every={every}) needs both >= 1")
    return Copy("pool", source, "turn", {"k": k, "every": every})


def best(source: str, metric: str) -> Copy:
    """The source at the end of the turn whose logged `metric` was highest so far.

    The metric must be of the updated source, as a probe's is: what collect logs belongs to the one before.
    """
    return Copy("best", source, "end", {"metric": metric})


def mix(a: str, b: str, q: float | Schedule | str) -> Copy:
    """`q a + (1 - q) b`, made anew at the start of each turn. `q` may lie outside [0, 1] (a lookahead point),
    be a schedule, or be "uniform": drawn from U[0, 1] each turn."""
    if isinstance(q, str) and q != "uniform":
        raise MethodError(f"mix(q={q!r}): q is a number, a schedule, or 'uniform'")
    return Copy("mix", a, "turn", {"b": b, "q": q})


@dataclass
class Kept:
    """A copy in a run: its frozen module, and what its rule must remember."""

    name: str
    rule: Copy
    module: nn.Module
    memory: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def _mine(self) -> tuple[list[Tensor], list[Tensor]]:
        """Its parameters and buffers: nobody but this copy has the module, so they stay what they are."""
        return list(parameters_of(self.module).values()), list(buffers_of(self.module).values())

    @classmethod
    def of(cls, name: str, rule: Copy, source: nn.Module) -> Kept:
        module = copying.deepcopy(source).requires_grad_(False)
        return cls(name, rule, module, {"count": 0})

    def restart(self, source: nn.Module) -> None:
        """Be the source as it is now, remembering nothing."""
        self._blend(source, 1.0)
        self.memory = {"count": 0}

    def state_dict(self) -> dict[str, Any]:
        return {"module": self.module.state_dict(), "memory": self.memory}

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        self.module.load_state_dict(tree["module"])
        self.memory = tree["memory"]

    def refresh(self, models: dict[str, nn.Module], kit: Any, logs: dict[str, float] | None = None) -> None:
        """Apply the rule once; the loop calls this at the rule's moment."""
        source, o, memory = models[self.rule.source], self.rule.options, self.memory
        memory["count"] += 1
        kind = self.rule.kind
        if kind == "polyak":
            self._blend(source, o["tau"])
        elif kind == "every":
            if memory["count"] % o["n"] == 0:
                self._blend(source, 1.0)
        elif kind == "mix":
            q = o["q"]
            if q == "uniform":
                q = float(torch.rand((), generator=kit.rng(f"mix/{self.name}"), dtype=torch.float64))
            elif isinstance(q, Schedule):
                q = q(kit.clock)
            memory["q"] = q
            self._blend(models[o["b"]], 1.0)
            self._blend(source, q)
        elif kind == "pool":
            snapshots = memory.setdefault("snapshots", [])
            if (memory["count"] - 1) % o["every"] == 0:
                snapshots.append({k: v.detach().clone() for k, v in source.state_dict().items()})
                del snapshots[: -o["k"]]
            pick = int(torch.randint(len(snapshots), (), generator=kit.rng(f"pool/{self.name}")))
            self.module.load_state_dict(snapshots[pick])
        elif kind == "best":
            value = (logs or {}).get(o["metric"])
            if value is None:
                raise MethodError(f"best({o['metric']!r}): this run logs no such number; it logs {sorted(logs or {})}")
            if value > memory.get("best", float("-inf")):
                memory["best"] = value
                self._blend(source, 1.0)
        elif kind == "previous":
            if "pending" in memory:
                self.module.load_state_dict(memory["pending"])
            memory["pending"] = {k: v.detach().clone() for k, v in source.state_dict().items()}
        else:  # frozen, at_phase: a plain copy at their moment
            self._blend(source, 1.0)

    @torch.no_grad()
    def _blend(self, source: nn.Module, weight: float) -> None:
        """module <- (1 - weight) module + weight source; weight 1 is an exact copy. Buffers are always copied."""
        if source is self.module:
            return
        (mine, buffers), theirs = self._mine, list[Tensor](parameters_of(source).values())
        if weight == 1.0:
            torch._foreach_copy_(mine, theirs)
        else:
            torch._foreach_lerp_(mine, theirs, weight)
        for mine_b, theirs_b in zip(buffers, buffers_of(source).values()) if buffers else ():
            mine_b.copy_(theirs_b)
