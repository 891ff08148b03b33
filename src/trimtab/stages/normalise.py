"""Running moments of observations and of returns: explicit, saved, changed by collection alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.core.batch import Batch
from trimtab.core.errors import MethodError
from trimtab.core.kit import Kit
from trimtab.core.piece import piece
from trimtab.stages.advantage import discounted

EPS = 1e-8


class Moments:
    """Count, mean and sum of squared deviations of vectors, in float64, by Chan et al.'s parallel update.

    The variance is 1 until something was seen.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.count = 0.0
        self.mean = torch.zeros(shape, dtype=torch.float64)
        self.m2 = torch.zeros(shape, dtype=torch.float64)
        self._scale: tuple[Tensor, Tensor] | None = None

    def add(self, x: Tensor) -> None:
        """Take in `[n, *shape]`."""
        n = len(x)
        mean = x.mean(0, dtype=torch.float64)
        delta, total = mean - self.mean, self.count + n
        self.m2 = self.m2 + (x - mean).square_().sum(0) + delta.square() * (self.count * n / total)
        self.mean = self.mean + delta * (n / total)
        self.count, self._scale = total, None

    @property
    def variance(self) -> Tensor:
        return self.m2 / self.count if self.count else torch.ones_like(self.mean)

    def normalise(self, x: Tensor, clip: float) -> Tensor:
        """`(x - mean) / sqrt(variance + 1e-8)`, no further from 0 than `clip`, in x's own type."""
        if self._scale is None:
            self._scale = self.mean.to(x.dtype), (self.variance + EPS).rsqrt().to(x.dtype)
        mean, scale = self._scale
        return ((x - mean) * scale).clamp_(-clip, clip)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean, "m2": self.m2}

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        self.count, self.mean, self.m2, self._scale = tree["count"], tree["mean"], tree["m2"], None


def _sane(options: Mapping[str, Any]) -> str | None:
    return None if options["clip"] > 0 else f"clip={options['clip']} must be above 0: how far from 0 a number may be"


# -- observations --------------------------------------------------------------------------------------------------


class NormalisedActor:
    """An actor that sees normalised observations. Its moments change in `learn` alone, which collect calls."""

    def __init__(self, actor: Any, moments: Moments, clip: float) -> None:
        self._actor, self._moments, self._clip = actor, moments, clip

    def see(self, obs: Tensor) -> Tensor:
        """What the policy is shown: normalised, clipped, then whatever wraps inside do to it."""
        inner: Callable[[Tensor], Tensor] | None = getattr(self._actor, "see", None)
        made = self._moments.normalise(obs, self._clip)
        return inner(made) if inner else made

    def learn(self, obs: Tensor) -> None:
        self._moments.add(obs)

    def act(self, obs: Tensor, carry: Any, rng: torch.Generator) -> tuple[Any, Any]:
        return self._actor.act(self._moments.normalise(obs, self._clip), carry, rng)

    def mode(self, obs: Tensor) -> Tensor:
        made: Tensor = self._actor.mode(self._moments.normalise(obs, self._clip))
        return made

    def __getattr__(self, name: str) -> Any:
        return getattr(self._actor, name)


def obs_moments(kit: Kit, options: Mapping[str, Any]) -> Moments:
    """Of one observation of the environment. Raises MethodError where observations are numbers of states."""
    space = kit.environment.observation_space
    if type(space).__name__ != "Box":
        raise MethodError(
            f"normalised_obs: observations of {space} are no measurements and have no mean; set normalise_obs=False"
        )
    return Moments(tuple(space.shape))


@piece("act", state={"obs_moments": obs_moments}, validate=_sane)
def normalised_obs(kit: Kit, actor: Any, *, clip: float = 10.0) -> NormalisedActor:
    """A wrap of the actor: `clip((s - mean) / sqrt(var + 1e-8), +-clip)` by the running moments of what was collected.

    Batches hold what the policy saw. Moments are updated step by step while collecting, by the observations that begin
    a step (a final one begins none), and by nothing else: an evaluation acts with them as they stand.
    """
    return NormalisedActor(actor, kit.state["obs_moments"], clip)


# -- rewards -------------------------------------------------------------------------------------------------------


def return_moments(kit: Kit, options: Mapping[str, Any]) -> Moments:
    """Of the discounted return so far."""
    return Moments(())


def no_returns(kit: Kit, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """The discounted return so far of each episode that goes on in the next batch."""
    return {"episode": torch.zeros(0, dtype=torch.long), "value": torch.zeros(0, dtype=torch.float64)}


@piece(
    "credit",
    reads=("reward", "terminated", "truncated", "episode", "mask"),
    writes=("scaled_reward",),
    state={"return_moments": return_moments, "running_return": no_returns},
    validate=_sane,
)
def scaled_reward(
    kit: Kit, batch: Batch, *, inner: Callable[[Batch], Batch], gamma: float = 0.99, clip: float = 10.0
) -> Batch:
    """A wrap: the credit inside is paid `clip(r_t / sqrt(var(R) + 1e-8), +-clip)`, written as `scaled_reward`.

    `R_t = gamma R_{t-1} + r_t` within an episode, and its variance runs over all decisions up to and including step t
    of this batch. Nothing is subtracted: a reward keeps its sign. The column `reward` stays as the environment gave it.
    Steps of an earlier batch (`fresh` is 0, where there is such a column) were counted then, and are scaled as of now.
    gamma: of R, the same as that of the credit inside.
    """
    mask = batch["mask"]
    fresh = _fresh(batch)
    over = (fresh["terminated"] | fresh["truncated"]) & fresh["mask"]
    running = _so_far(kit, fresh, fresh["reward"].double(), over, gamma)
    scale = _running_scale(kit.state["return_moments"], running, fresh["mask"])
    if scale.shape[0] < mask.shape[1]:
        scale = torch.cat([scale[-1:].expand(mask.shape[1] - len(scale)), scale])
    scaled = (batch["reward"] * scale.to(batch["reward"].dtype)).clamp(-clip, clip) * mask
    made = inner(Batch({**batch.columns, "reward": scaled}, batch.guard))
    return Batch({**made.columns, "reward": batch.columns["reward"]}, batch.guard).put(scaled_reward=scaled)


def _fresh(batch: Batch) -> Batch:
    """The steps collected last, where a collect keeps earlier ones before them (`stages.behavior.kept`)."""
    columns = batch.columns
    if "fresh" not in columns:
        return batch
    length, new = columns["mask"].shape[1], int(columns["fresh"][0].sum())  # type: ignore[union-attr]
    names = ("reward", "terminated", "truncated", "episode", "mask")
    return Batch({name: columns[name][:, length - new :] for name in names})  # type: ignore[call-overload]


def _so_far(kit: Kit, batch: Batch, reward: Tensor, over: Tensor, gamma: float) -> Tensor:
    """`R_t` `[N, T]`; an episode that began in the batch before goes on from where it was."""
    ids, held = batch["episode"], kit.state["running_return"]
    first, last = (ids, ids) if ids.dim() == 1 else (ids[:, 0], ids[:, -1])
    same = first[:, None] == held["episode"]
    before = (same * held["value"]).sum(1)
    start = torch.cat([(reward[:, :1] + gamma * before[:, None]), reward[:, 1:]], 1)
    follows = torch.nn.functional.pad(~over[:, :-1], (1, 0)).double() * gamma  # R_t goes on from R_{t-1}
    running = discounted(start.flip(1), follows.flip(1)).flip(1)
    goes_on = ~over[:, -1] & batch["mask"][:, -1]
    kit.state["running_return"] = {"episode": last[goes_on].clone(), "value": running[goes_on, -1].clone()}
    return running


def _running_scale(moments: Moments, running: Tensor, mask: Tensor) -> Tensor:
    """`1 / sqrt(var + 1e-8)` after each step, `[T]`, and the moments moved on by all of them."""
    n = mask.sum(0).double()
    shift = moments.mean if moments.count else (running * mask).sum() / mask.sum()
    away = (running - shift) * mask  # sums of squares about a number near the mean lose no digits
    count = moments.count + n.cumsum(0)
    first, second = away.sum(0).cumsum(0), away.square().sum(0).cumsum(0) + moments.m2
    m2 = (second - first.square() / count).clamp_min(0)
    moments.load_state_dict({"count": float(count[-1]), "mean": shift + first[-1] / count[-1], "m2": m2[-1]})
    return (m2 / count + EPS).rsqrt()
