"""Gymnasium environments, several of one kind stepped together in this process, with exact resume."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from trimtab.core.errors import CheckpointError, EnvironmentFailure, NonFiniteError
from trimtab.environments.gym_make import make_one
from trimtab.environments.transition import Finished, Transition, episode_seed

LONGEST = 100_000


class GymEnvironment:
    """E environments of one Gymnasium id, stepped by a plain loop.

    spec: an id with parameters, `"HalfCheetah-v5(ctrl_cost_weight=0.05)"`. envs: E. seed: of every reset; an episode is
    reset with a seed made from this and its id alone. longest: steps after which an episode without a time limit is an
    error. render: make pictures (`frame`). first: the id of the first episode.

    obs: float32 `[E, *O]`, what every environment shows now; never written into again, like all that `step` returns.
    observation_space, action_space: of one environment. finished: episodes that ended, until somebody drains them.

    An action outside of a box is clipped to it. Rewards and observations are as the environment gave them.

    Raises EnvironmentFailure when an environment cannot be made, raises an exception, gives a nan or an infinite
    number, or never ends an episode; NonFiniteError for an action that is not finite.
    """

    def __init__(
        self,
        spec: str,
        *,
        envs: int = 1,
        seed: int = 0,
        longest: int = LONGEST,
        render: bool = False,
        first: int = 0,
    ) -> None:
        if envs < 1:
            raise EnvironmentFailure(f"envs={envs} must be at least 1: how many environments are stepped together")
        self.spec, self.envs, self.seed = spec, envs, seed
        made = [make_one(spec, render=render) for _ in range(envs)]
        self._worlds, self.limit = [world for world, _ in made], made[0][1]
        self._steps = [world.step for world in self._worlds]
        self.observation_space: Any = self._worlds[0].observation_space
        self.action_space: Any = self._worlds[0].action_space
        self.finished: list[Finished] = []
        self._shape = (envs, *self.observation_space.shape)
        self._prepare_actions()
        self._started = False
        self._first_episode = self._next_episode = first
        self._episode = [0] * envs
        self._total, self._length = [0.0] * envs, [0] * envs
        self._played: list[list[Any]] = [[] for _ in range(envs)]
        self._obs, self._ids = torch.zeros(0), torch.zeros(0, dtype=torch.long)
        self._none = torch.zeros(envs, dtype=torch.bool)
        self._most = self.limit or longest

    def _prepare_actions(self) -> None:
        from gymnasium import spaces

        space = self.action_space
        self._kind = type(space).__name__
        self._action_shape = (self.envs, *space.shape)
        if isinstance(space, spaces.Box):
            self._low, self._high = space.low, space.high
        elif isinstance(space, spaces.Discrete):
            self._first, self._count = int(space.start), int(space.n)

    # -- stepping ------------------------------------------------------------------------------------------------
    @property
    def obs(self) -> Tensor:
        self.start()
        return self._obs

    def start(self) -> None:
        """Reset every environment, unless that was done before."""
        if not self._started:
            self._started = True
            first = np.empty(self._shape, np.float32)
            for i in range(self.envs):
                first[i] = self._reset(i)
            self._check(first)
            self._ids = torch.tensor(self._episode)
            self._obs = torch.from_numpy(first)

    def _reset(self, i: int) -> Any:
        """Begin a new episode in environment `i`."""
        self._episode[i] = self._next_episode
        self._next_episode += 1
        self._total[i], self._length[i], self._played[i] = 0.0, 0, []
        return self._begun(i)

    def _begun(self, i: int) -> Any:
        try:
            return self._worlds[i].reset(seed=episode_seed(self.seed, self._episode[i]))[0]
        except Exception as error:  # an environment may raise anything; it is said, with the place
            self._broken(i, error)

    def step(self, action: Tensor) -> Transition:
        """Act in every environment: float `[E, *A]` for a box, long `[E]` or `[E, A]` for discrete actions.

        An environment whose episode ended is reset at once: `obs` then shows the first observation of the next one.
        """
        self.start()
        made, rewards = np.empty(self._shape, np.float32), np.empty(self.envs, np.float32)
        over: list[tuple[int, bool]] = []
        total, length = self._total, self._length
        for i, (step, act, played) in enumerate(zip(self._steps, self._actions(action), self._played)):
            try:
                made[i], reward, terminated, truncated, _ = step(act)
            except Exception as error:  # an environment may raise anything; it is said, with the place
                self._broken(i, error)
            rewards[i] = reward
            total[i] += reward
            length[i] += 1
            played.append(act)
            if terminated or truncated or length[i] >= self._most:
                if not (terminated or truncated or self.limit):
                    self._endless(i)
                over.append((i, bool(terminated)))
        self._check(made, rewards)
        next_obs, reward_, episode = torch.from_numpy(made), torch.from_numpy(rewards), self._ids
        if not over:
            self._obs = next_obs
            return Transition(next_obs, reward_, self._none, self._none, episode)
        self._obs = self._restarted(made, over)
        ends, cuts = self._none.clone(), self._none.clone()
        for i, terminated in over:
            ends[i], cuts[i] = terminated, not terminated
        return Transition(next_obs, reward_, ends, cuts, episode)

    def _restarted(self, made: Any, over: list[tuple[int, bool]]) -> Tensor:
        """Observations with those of new episodes where the old ones are over."""
        first = made.copy()
        for i, terminated in over:
            self.finished.append(Finished(self._episode[i], float(self._total[i]), self._length[i], terminated))
            first[i] = self._reset(i)
        self._check(first)
        self._ids = torch.tensor(self._episode)
        return torch.from_numpy(first)

    def _actions(self, action: Tensor) -> Any:
        """What each environment is handed. Raises when the actions do not fit the space."""
        if action.shape != self._action_shape:
            raise EnvironmentFailure(
                f"{self.spec} has actions of {self.action_space}: {self.envs} environments need actions of shape "
                f"{list(self._action_shape)}, and these have {list(action.shape)}"
            )
        given = (action if action.is_cpu and not action.requires_grad else action.detach().cpu()).numpy()
        if self._kind == "Box":
            if not (_finite(given.reshape(-1)) or np.isfinite(given).all()):
                raise NonFiniteError(f"an action for {self.spec} is nan or infinite, so the policy's parameters are")
            clipped = np.minimum(np.maximum(given, self._low), self._high)
            return clipped.astype(self.action_space.dtype, copy=False)
        if self._kind == "Discrete":
            chosen: list[int] = given.tolist()
            for a in chosen:
                if not 0 <= a < self._count or a != int(a):
                    raise EnvironmentFailure(f"{self.spec} has the actions 0 to {self._count - 1}, and was given {a}")
            return chosen if self._first == 0 else [a + self._first for a in chosen]
        if not ((given >= 0) & (given < self.action_space.nvec)).all():
            raise EnvironmentFailure(f"{self.spec} has actions of {self.action_space}, and was given {given.tolist()}")
        return given.astype(self.action_space.dtype)

    # -- faults --------------------------------------------------------------------------------------------------
    def _where(self, i: int) -> str:
        return (
            f"{self.spec} (environment {i} of {self.envs}, episode {self._episode[i]}, step {self._length[i]}, reset "
            f"with seed {episode_seed(self.seed, self._episode[i])})"
        )

    def _broken(self, i: int, error: Exception) -> NoReturn:
        raise EnvironmentFailure(f"{self._where(i)} raised {type(error).__name__}: {error}") from error

    def _endless(self, i: int) -> NoReturn:
        raise EnvironmentFailure(
            f"{self._where(i)} has no time limit and its episode does not end. Give it one: "
            f"'{self.spec.partition('(')[0]}(max_episode_steps=1000)'"
        )

    def _check(self, obs: Any, rewards: Any = None) -> None:
        """Raise where a number is nan or infinite. The square length shows it in one pass, without a mask."""
        if _finite(obs.reshape(-1)) and (rewards is None or _finite(rewards)):
            return
        for i in range(self.envs):
            seen = np.isfinite(obs[i]).all()
            if not seen or (rewards is not None and not math.isfinite(rewards[i])):
                what = "reward" if seen else "observation"
                raise EnvironmentFailure(f"{self._where(i)} gave a nan or infinite {what}; it is not learned from")

    # -- state ---------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """The running episodes: with what seed each was reset, and every action since."""
        if not self._started:
            return {"started": False}
        return {
            "started": True,
            "next_episode": self._next_episode,
            "episode": list(self._episode),
            "played": [torch.from_numpy(np.array(acts)) if acts else torch.zeros(0) for acts in self._played],
            "total": list(self._total),
            "obs": self._obs,
            "finished": [tuple(f) for f in self.finished],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Play the running episodes again. Raises CheckpointError where they do not lead to what was saved."""
        self._started = bool(state["started"])
        if not self._started:
            self._next_episode, self.finished = self._first_episode, []
            return
        if len(state["episode"]) != self.envs:
            raise CheckpointError(f"the checkpoint has {len(state['episode'])} environments, and this run {self.envs}")
        self._next_episode, self._episode = state["next_episode"], list(state["episode"])
        self.finished = [Finished(*f) for f in state["finished"]]
        made = np.empty(self._shape, np.float32)
        for i, acts in enumerate(state["played"]):
            rows = acts.numpy()
            self._played[i] = rows.tolist() if self._kind == "Discrete" else list(rows)
            self._length[i], self._total[i] = len(self._played[i]), state["total"][i]
            made[i] = self._replayed(i)
        self._obs, self._ids = torch.from_numpy(made), torch.tensor(self._episode)
        if not torch.equal(self._obs, state["obs"]):
            raise CheckpointError(
                f"{self.spec} is not deterministic: the same seeds and actions led to other observations, so a run on "
                "it cannot go on exactly"
            )

    def _replayed(self, i: int) -> Any:
        obs = self._begun(i)
        for act in self._played[i]:
            try:
                obs = self._steps[i](act)[0]
            except Exception as error:
                self._broken(i, error)
        return obs

    def describe(self) -> dict[str, Any]:
        """For `config.json`."""
        return {
            "name": self.spec,
            "envs": self.envs,
            "observation": str(self.observation_space),
            "action": str(self.action_space),
            "time_limit": self.limit,
        }

    def frame(self) -> Any:
        """A picture of the first environment, uint8 `[H, W, 3]`; None where it makes none."""
        return self._worlds[0].render()

    @property
    def frames_per_second(self) -> float:
        """How fast its pictures are meant to be shown."""
        return float(self._worlds[0].metadata.get("render_fps") or 30)

    def close(self) -> None:
        """Let go of what the environments hold (simulators, windows)."""
        for world in self._worlds:
            world.close()


def _finite(x: Any) -> bool:
    """Whether a vector is certainly finite: a nan or an infinity makes its square length one, as huge numbers do."""
    return math.isfinite(x.dot(x))
