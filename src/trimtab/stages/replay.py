"""Experience that is kept: a ring of transitions, filled by the policy and drawn from uniformly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.core.batch import Batch
from trimtab.core.chunks import AppendOnly, Saved
from trimtab.core.kit import Kit
from trimtab.core.piece import piece
from trimtab.core.stopwatch import phase
from trimtab.core.terms import SOURCES
from trimtab.stages.steps import finished

COLUMNS = ("obs", "action", "next_obs", "reward", "terminated", "truncated")


class Ring(AppendOnly):
    """The last `capacity` transitions, a packed row of numbers each: `obs | action | next_obs | reward | ended | cut`.

    Row k of the run, counted from 0, stands in place `k mod capacity`; `total` rows were ever put in. Numbered actions
    and flags are kept in the observations' floating-point type, which holds them exactly. Checkpoints share the files
    that hold its rows (`core.chunks`).
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.total = capacity, 0
        self.saved: Saved = []
        self.rows = torch.zeros(0, 0)
        self._shapes: list[tuple[int, ...]] = []
        self._cuts: list[int] = []
        self._numbered = False

    def __len__(self) -> int:
        return min(self.total, self.capacity)

    def append(self, *columns: Tensor) -> None:
        """One transition for each environment, in the order of `COLUMNS`, each `[E, ...]`."""
        dtype = columns[0].dtype
        if not self._shapes:
            self._begin([tuple(c.shape[1:]) for c in columns], not columns[1].is_floating_point(), dtype)
        count = columns[0].shape[0]
        new = torch.cat([c.reshape(count, -1).to(dtype) for c in columns], 1)
        at = self.total % self.capacity
        if at + count <= self.capacity:
            self.rows[at : at + count] = new
        else:
            places = torch.arange(self.total, self.total + count) % self.capacity
            kept = slice(max(0, count - self.capacity), None)
            self.rows[places[kept]] = new[kept]
        self.total += count

    def _begin(self, shapes: list[tuple[int, ...]], numbered: bool, dtype: torch.dtype) -> None:
        self._shapes, self._numbered = shapes, numbered
        self._cuts = [math.prod(shape) for shape in shapes]
        self.rows = torch.empty(self.capacity, sum(self._cuts), dtype=dtype)  # the system gives memory as it fills

    def draw(self, count: int, rng: torch.Generator) -> dict[str, Tensor]:
        """`count` transitions, uniformly and with replacement, as columns `[count, 1, ...]`."""
        index = torch.randint(len(self), (count,), generator=rng)
        parts = self.rows.index_select(0, index).split(self._cuts, 1)
        made = {n: p.reshape(count, 1, *shape) for n, p, shape in zip(COLUMNS, parts, self._shapes)}
        made["action"] = made["action"].long() if self._numbered else made["action"]
        return {**made, "terminated": made["terminated"] != 0, "truncated": made["truncated"] != 0}

    # -- state ---------------------------------------------------------------------------------------------------
    @property
    def first(self) -> int:
        return self.total - len(self)

    def between(self, start: int, stop: int) -> Tensor:
        return self.rows[torch.arange(start, stop) % self.capacity]

    def about(self) -> dict[str, Any]:
        return {"total": self.total, "shapes": [list(s) for s in self._shapes], "numbered": self._numbered}

    def restore(self, about: Mapping[str, Any], rows: Tensor) -> None:
        """Put rows back where they were. Raises ValueError when there are more than fit."""
        self.total = about["total"]
        if len(rows) > self.capacity:
            raise ValueError(f"it holds {len(rows)} transitions, and capacity is {self.capacity}")
        if about["shapes"]:
            self._begin([tuple(shape) for shape in about["shapes"]], about["numbered"], rows.dtype)
            self.rows[torch.arange(self.total - len(rows), self.total) % self.capacity] = rows


def make_ring(kit: Kit, options: Mapping[str, Any]) -> Ring:
    """An empty ring."""
    return Ring(options["capacity"])


def _sane(options: Mapping[str, Any]) -> str | None:
    for name in ("steps", "batch", "capacity"):
        if options[name] < 1:
            return f"{name}={options[name]} must be at least 1"
    if options["warmup"] < 0 or options["warmup"] > options["capacity"]:
        return f"warmup={options['warmup']} must be between 0 and capacity={options['capacity']} decisions"
    return None


REPLAYED = (*COLUMNS, "mask", "source")


@piece("collect", writes=REPLAYED, uses=lambda o: (o["policy"],), validate=_sane, state={"replay": make_ring})
def replay(
    kit: Kit,
    *,
    steps: int = 1,
    batch: int = 256,
    capacity: int = 1_000_000,
    warmup: int = 0,
    policy: str = "policy",
) -> Batch:
    """Act for `steps` steps of all environments, keep what happened, and draw `batch` kept decisions (T = 1).

    The first turn acts until the ring holds `warmup` decisions, so that no update is made from fewer. `next_obs` is the
    true next observation, before any reset, and only `terminated` ends the future: a truncated episode would have gone
    on. Where an `act` wrap changes what the policy sees (`see`), raw observations are kept, and those drawn are shown
    as it sees them now. Rows have the source "replay"; several updates a turn are `rows=batch / updates`.
    capacity: the oldest decisions are overwritten beyond it. policy: the model or copy that acts.
    """
    world, ring, actor, rng = kit.environment, kit.state["replay"], kit.actor(policy), kit.rng("act")
    world.start()
    learn, see = getattr(actor, "learn", None), getattr(actor, "see", None)
    if learn is not None and not ring.total:
        learn(world.obs)
    begun, taken, carry = ring.total, 0, None
    while taken < steps or ring.total < warmup:
        obs = world.obs
        with phase("act", brief=True):
            decision, carry = actor.act(obs, carry, rng)
        with phase("environment", brief=True):
            made = world.step(decision.action)
        ring.append(obs, decision.action, made.next_obs, made.reward, made.terminated, made.truncated)
        if learn is not None:
            learn(world.obs)
        taken += 1
    kit.decided(ring.total - begun)
    finished(kit)
    with phase("replay", brief=True):
        columns = ring.draw(batch, kit.rng("replay"))
    if see is not None:
        columns |= {name: see(columns[name].flatten(0, 1))[:, None] for name in ("obs", "next_obs")}
    mask, source = torch.ones(batch, 1, dtype=torch.bool), SOURCES.index("replay")
    made = Batch({**columns, "mask": mask, "source": torch.full((batch,), source)})
    return made.knowing(mask=True, source=source)
