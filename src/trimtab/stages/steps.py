"""Experience from environments that are stepped: so many steps of each, or so many whole episodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.core.batch import Batch
from trimtab.core.errors import MethodError
from trimtab.core.kit import Kit
from trimtab.core.piece import piece
from trimtab.core.stopwatch import phase
from trimtab.core.terms import SOURCES
from trimtab.environments.transition import Transition

STEP_COLUMNS = (
    "obs", "action", "next_obs", "reward", "terminated", "truncated", "mask", "episode", "logp_behavior", "source",
    "age",
)  # fmt: skip


RAW = ("raw_obs", "raw_next_obs")


class Recording:
    """What happens while an actor plays: one entry of every column for each step of all environments.

    Observations are recorded as the actor saw them (its `see`), and an actor that learns from them (`learn`) is shown
    each new one once, before it decides.
    """

    def __init__(self, kit: Kit, policy: str, raw: bool = False) -> None:
        self.environment, self.actor, self.rng = kit.environment, kit.actor(policy), kit.rng("act")
        self.environment.start()
        self._see: Callable[[Tensor], Tensor] = getattr(self.actor, "see", lambda obs: obs)
        self._learn: Callable[[Tensor], None] = getattr(self.actor, "learn", lambda obs: None)
        self._carry: Any = None
        if kit.clock.turns == 0:
            self._learn(self.environment.obs)
        self._seen = self._see(self.environment.obs)
        self.columns: dict[str, list[Tensor]] = {name: [] for name in STEP_COLUMNS[:-2] if name != "mask"}
        self.columns |= {name: [] for name in RAW} if raw else {}

    def step(self) -> Transition:
        """One decision in every environment."""
        world, columns = self.environment, self.columns
        seen, before = self._seen, world.obs
        with phase("act", brief=True):
            decision, self._carry = self.actor.act(world.obs, self._carry, self.rng)
        if decision.logp is None:
            raise MethodError(
                f"{type(self.actor).__name__} decides without saying with what probability, and steps of the policy "
                f"itself need that; a deterministic policy learns from replay"
            )
        with phase("environment", brief=True):
            made: Transition = world.step(decision.action)
        self._learn(world.obs)
        self._seen = self._see(world.obs)
        over = made.terminated | made.truncated
        # Where nothing ended the next observation is the one that is seen next, whatever was learned in between.
        after = torch.where(_like(over, self._seen), self._see(made.next_obs), self._seen) if over.any() else self._seen
        values = (seen, decision.action, after, made.reward, made.terminated, made.truncated, made.episode,
                  decision.logp, before, made.next_obs)  # fmt: skip
        for column, value in zip(columns.values(), values):
            column.append(value)
        return made

    def stacked(self) -> dict[str, Tensor]:
        """Every column, `[E, T, ...]`."""
        return {name: torch.stack(entries, 1) for name, entries in self.columns.items()}


def _like(flags: Tensor, x: Tensor) -> Tensor:
    return flags.reshape(-1, *[1] * (x.dim() - 1))


def finished(kit: Kit) -> None:
    """Log the mean return and length of the episodes that ended since it was last asked, and forget them."""
    for episode in kit.environment.finished:
        kit.log("return", float(episode.total))
        kit.log("length", float(episode.length))
    kit.environment.finished.clear()


def by_policy(rows: Mapping[str, Tensor], n: int) -> Batch:
    """Rows of our policy as it is now."""
    return Batch({**rows, "source": torch.full((n,), SOURCES.index("policy")), "age": torch.zeros(n, dtype=torch.long)})


def _acting(options: Mapping[str, Any]) -> tuple[str, ...]:
    return (options["policy"],)


def _sane_steps(options: Mapping[str, Any]) -> str | None:
    return None if options["horizon"] >= 1 else f"horizon={options['horizon']} must be at least 1 step"


@piece("collect", writes=STEP_COLUMNS, uses=_acting, validate=_sane_steps)
def steps(kit: Kit, *, horizon: int = 2048, policy: str = "policy", raw: bool = False) -> Batch:
    """The next `horizon` steps of each of the E environments: E rows of T = horizon decisions, episodes running on.

    `next_obs` is the true next observation, before any reset; `episode` is `[E, T]`, the episode of each decision.
    policy: the model or copy that acts. raw: also write `raw_obs` and `raw_next_obs`, as the environment gave them,
    for a collect that shows old steps anew.
    """
    recording = Recording(kit, policy, raw)
    for _ in range(horizon):
        recording.step()
    columns = recording.stacked()
    mask = torch.ones_like(columns["terminated"])
    finished(kit)
    return by_policy({**columns, "mask": mask}, len(mask))


def _sane_episodes(options: Mapping[str, Any]) -> str | None:
    return None if options["count"] >= 1 else f"count={options['count']} must be at least 1 episode"


def none_running(kit: Any, options: Mapping[str, Any]) -> Tensor:
    """The ids of the episodes that have begun and not ended."""
    return torch.zeros(0, dtype=torch.long)


@piece("collect", writes=STEP_COLUMNS, uses=_acting, validate=_sane_episodes, state={"running": none_running})
def episodes(kit: Kit, *, count: int = 16, policy: str = "policy") -> Batch:
    """`count` whole episodes, one a row, from their first step to their last, padded on the right; `episode` is `[N]`.

    The first `count` to *begin*: taking the first to end would prefer short ones. Environments go on until all of these
    have ended. What else they play is dropped, and so is the rest of an episode that the batch before had begun;
    dropped steps count as decisions. policy: the model or copy that acts.
    """
    recording = Recording(kit, policy)
    begun = set(kit.state["running"].tolist())
    wanted: list[int] = []
    over: set[int] = set()
    while len(wanted) < count or not over.issuperset(wanted):
        made = recording.step()
        ids = made.episode.tolist()
        wanted += [i for i in ids if i not in wanted and i not in begun][: count - len(wanted)]
        ended = made.terminated | made.truncated
        over |= set(made.episode[ended].tolist())
    kit.state["running"] = made.episode[~ended]
    kit.decided(len(recording.columns["reward"]) * kit.environment.envs)
    finished(kit)
    return _rows(recording.stacked(), wanted)


def _rows(columns: dict[str, Tensor], wanted: list[int]) -> Batch:
    """The wanted episodes, one a row, in the order they are named."""
    flat = {name: column.flatten(0, 1) for name, column in columns.items()}  # environment by environment, in time
    places = [(flat["episode"] == i).nonzero()[:, 0] for i in wanted]
    n, longest = len(places), max(map(len, places))
    mask = torch.arange(longest) < torch.tensor([len(p) for p in places])[:, None]
    index = torch.zeros(n, longest, dtype=torch.long)
    index[mask] = torch.cat(places)
    rows = {name: c[index].masked_fill(~_spread(mask, c), 0) for name, c in flat.items() if name != "episode"}
    return by_policy({**rows, "mask": mask, "episode": torch.tensor(wanted)}, n)


def _spread(mask: Tensor, column: Tensor) -> Tensor:
    return mask.reshape(*mask.shape, *[1] * (column.dim() - 1))


# -- rows of one decision ------------------------------------------------------------------------------------------


@piece("select", slot="flat", reads=("mask",), rows=None)
def flat(batch: Batch) -> Batch:
    """Every decision as a row of its own, `[N, T] -> [M, 1]`, padding dropped: a minibatch is then of decisions.

    What belonged to a row belongs to each of its decisions; `episode` becomes `[M]`. Put it after credit.
    """
    mask = batch["mask"]
    length = mask.shape[1]
    inside = None if bool(mask.all()) else mask.flatten()
    made: dict[str, Any] = {}
    for name, column in batch.columns.items():
        if isinstance(column, list):
            each: Any = [x for x in column for _ in range(length)]
            made[name] = each if inside is None else [x for x, m in zip(each, inside.tolist()) if m]
            continue
        along = column.dim() > 1 and column.shape[1] == length
        one = column.flatten(0, 1) if along else column.repeat_interleave(length, 0)
        one = one if inside is None else one[inside]
        made[name] = one if not along or name in LEVELS else one[:, None]
    return Batch(made, batch.guard)


LEVELS = ("group", "episode", "turn", "agent", "pair")
