"""Environments with few states, known exactly: their objective can be differentiated, not only sampled."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trimtab.core.errors import EnvironmentFailure
from trimtab.environments.transition import Finished, Transition

ROUNDING = 1e-9  # probabilities sum to 1 within this


class Episodes(NamedTuple):
    """Whole episodes, `[N, T]` each, right-padded with zeros: what was seen, done, seen next and paid."""

    obs: Tensor
    action: Tensor
    next_obs: Tensor
    reward: Tensor
    mask: Tensor
    terminated: Tensor
    episode: Tensor


class TabularEnvironment:
    """E copies of one finite Markov decision process, stepped together.

    transition [S, A, S]: `P(s'|s, a)`, rows that sum to 1. reward [S, A]. start [S]: of the first state. horizon: steps
    after which an episode is truncated. terminal bool [S]: entering one of these ends an episode. envs: E. seed: of
    every draw it makes.

    An observation is the number of the state, long `[E]`. Transitions as in `GymEnvironment`; float64 throughout.
    Raises EnvironmentFailure for tables that are no probabilities, and for actions outside 0 .. A - 1.
    """

    def __init__(
        self,
        transition: Tensor,
        reward: Tensor,
        *,
        start: Tensor,
        horizon: int,
        terminal: Tensor | None = None,
        envs: int = 1,
        seed: int = 0,
    ) -> None:
        self.transition, self.reward, self.initial = transition.double(), reward.double(), start.double()
        self.states, self.actions = reward.shape
        self.horizon, self.envs, self.seed = horizon, envs, seed
        self.terminal = torch.zeros(self.states, dtype=torch.bool) if terminal is None else terminal
        self._check()
        self._moves, self._starts = self.transition.cumsum(-1), self.initial.cumsum(-1)
        self._move_lists, self._start_list = self._moves.tolist(), self._starts.tolist()
        self._reward_list, self._terminal_list = self.reward.tolist(), self.terminal.tolist()
        self._rng = torch.Generator().manual_seed(seed)
        self._next_episode = 0
        self._started = False
        self._state = self._time = self._ids = torch.zeros(envs, dtype=torch.long)
        self._total = torch.zeros(envs, dtype=torch.float64)
        self.finished: list[Finished] = []

    def _check(self) -> None:
        expected = (self.states, self.actions, self.states)
        if self.transition.shape != expected or self.initial.shape != (self.states,):
            raise EnvironmentFailure(
                f"transition has shape {list(self.transition.shape)} and start {list(self.initial.shape)}; with "
                f"rewards {[self.states, self.actions]} they must be {list(expected)} and {[self.states]}"
            )
        for name, table in (("transition", self.transition), ("start", self.initial)):
            if bool((table < 0).any()) or bool(((table.sum(-1) - 1).abs() > ROUNDING).any()):
                raise EnvironmentFailure(
                    f"{name} holds rows that are no probabilities: each must sum to 1, none below 0"
                )
        if self.horizon < 1 or self.envs < 1:
            raise EnvironmentFailure(f"horizon={self.horizon} and envs={self.envs} must both be at least 1")

    @property
    def observation_space(self) -> Any:
        from gymnasium import spaces

        return spaces.Discrete(self.states)

    @property
    def action_space(self) -> Any:
        from gymnasium import spaces

        return spaces.Discrete(self.actions)

    # -- sampling ------------------------------------------------------------------------------------------------
    @property
    def obs(self) -> Tensor:
        """The state of every environment, long `[E]`."""
        self.start()
        return self._state

    def start(self) -> None:
        """Begin an episode everywhere, unless that was done before."""
        if not self._started:
            self._started = True
            self._begin(torch.ones(self.envs, dtype=torch.bool))

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self._rng, dtype=torch.float64)

    def _begin(self, over: Tensor) -> None:
        """New episodes where the old ones are over, bool `[E]`."""
        n = int(over.sum())
        state = (self._starts < self._uniform(n, 1)).sum(-1).clamp_max(self.states - 1)
        ids = self._next_episode + torch.arange(n)
        self._next_episode += n
        self._state = self._state.masked_scatter(over, state)
        self._ids = self._ids.masked_scatter(over, ids)
        self._time, self._total = self._time.masked_fill(over, 0), self._total.masked_fill(over, 0.0)

    def step(self, action: Tensor) -> Transition:
        """Act in every environment, long `[E]`. One whose episode ended begins the next at once: see `obs`."""
        self.start()
        if action.shape != (self.envs,) or bool((action < 0).any()) or bool((action >= self.actions).any()):
            raise EnvironmentFailure(
                f"{self.envs} tabular environments need one action each, a whole number from 0 to {self.actions - 1}; "
                f"they were given {action.tolist()}"
            )
        state, ids = self._state, self._ids
        reward = self.reward[state, action]
        reached = (self._moves[state, action] < self._uniform(self.envs, 1)).sum(-1).clamp_max(self.states - 1)
        self._state, self._time, self._total = reached, self._time + 1, self._total + reward
        terminated = self.terminal[reached]
        truncated = (self._time >= self.horizon) & ~terminated
        over = terminated | truncated
        if bool(over.any()):
            for i in over.nonzero().squeeze(1).tolist():
                end = (int(ids[i]), float(self._total[i]), int(self._time[i]), bool(terminated[i]))
                self.finished.append(Finished(*end))
            self._begin(over)
        return Transition(reached, reward, terminated, truncated, ids)

    def rollout(self, probs: Tensor, n: int, rng: torch.Generator) -> Episodes:
        """`n` whole episodes of the policy `probs` [S, A], beside those that `step` is in the middle of.

        Actions are drawn from `rng`, states from the environment's own stream.
        """
        chances, moves = probs.detach().cumsum(-1).tolist(), self._move_lists
        dice = torch.rand(n, self.horizon, generator=rng, dtype=torch.float64).tolist()
        luck = self._uniform(n, self.horizon + 1).tolist()
        last_state, last_action = self.states - 1, self.actions - 1
        rows: list[list[list[Any]]] = []
        for mine, world in zip(dice, luck):
            state = min(bisect_left(self._start_list, world[0]), last_state)
            row: list[list[Any]] = [[], [], [], []]
            for u, w in zip(mine, world[1:]):
                action = min(bisect_left(chances[state], u), last_action)
                reached = min(bisect_left(moves[state][action], w), last_state)
                for column, value in zip(row, (state, action, reached, self._reward_list[state][action])):
                    column.append(value)
                state = reached
                if self._terminal_list[state]:
                    break
            rows.append(row)
        lengths = torch.tensor([len(row[0]) for row in rows])
        width = int(lengths.max()) if n else 0
        obs, action_, next_obs, reward = (
            torch.tensor([r[k] + [0] * (width - len(r[k])) for r in rows], dtype=kind)
            for k, kind in enumerate((torch.long, torch.long, torch.long, torch.float64))
        )
        place = torch.arange(width)
        mask, last = place < lengths[:, None], place == lengths[:, None] - 1
        ids = (self._next_episode + torch.arange(n))[:, None].expand(n, width)
        self._next_episode += n
        return Episodes(obs, action_, next_obs, reward, mask, self.terminal[next_obs] & last, ids)

    # -- known exactly -------------------------------------------------------------------------------------------
    def objective(self, probs: Tensor, discount: float = 1.0) -> Tensor:
        """`J = E[sum_{t < horizon} discount^t r_t]` of policies `probs` [..., S, A], differentiable, `[...]`.

        By dynamic programming; a state that ends the episode is worth nothing.
        """
        alive, value = (~self.terminal).to(probs.dtype), probs.new_zeros(probs.shape[:-1])
        for _ in range(self.horizon):
            later = torch.einsum("saz,...z->...sa", self.transition, alive * value)
            value = (probs * (self.reward + discount * later)).sum(-1)
        return value @ self.initial

    # -- state ---------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Where every episode is, and the stream of draws."""
        return {
            "rng": self._rng.get_state(),
            "next_episode": self._next_episode,
            "started": self._started,
            "state": self._state,
            "time": self._time,
            "ids": self._ids,
            "total": self._total,
            "finished": [tuple(f) for f in self.finished],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken."""
        self._rng.set_state(state["rng"])
        self._next_episode, self._started = state["next_episode"], state["started"]
        self._state, self._time, self._ids = state["state"], state["time"], state["ids"]
        self._total, self.finished = state["total"], [Finished(*f) for f in state["finished"]]

    def describe(self) -> dict[str, Any]:
        """For `config.json`."""
        return {"id": "tabular", "states": self.states, "actions": self.actions, "horizon": self.horizon}

    def close(self) -> None:
        """Nothing is open."""


# -- some of them ------------------------------------------------------------------------------------------------


def random_mdp(
    states: int = 6,
    actions: int = 3,
    horizon: int = 20,
    *,
    final: bool = False,
    tables: int = 0,
    envs: int = 1,
    seed: int = 0,
) -> TabularEnvironment:
    """`P(.|s, a)` Dirichlet(0.3), rewards uniform on [0, 1], uniform start.

    final: whether entering the last state ends an episode. tables: the seed of probabilities and rewards. seed: that of
    the episodes.
    """
    draw = np.random.default_rng(tables)
    transition = torch.from_numpy(draw.dirichlet([0.3] * states, size=(states, actions)))
    reward = torch.from_numpy(draw.random((states, actions)))
    start = torch.full((states,), 1 / states, dtype=torch.float64)
    terminal = (torch.arange(states) == states - 1) & final
    return TabularEnvironment(transition, reward, start=start, horizon=horizon, terminal=terminal, envs=envs, seed=seed)


def grid(size: int = 5, horizon: int = 20, *, envs: int = 1, seed: int = 0) -> TabularEnvironment:
    """A `size x size` grid walked up, right, down and left; walls block, every episode begins in one corner.

    Paid 1 for every step that ends in the opposite corner. State `size * row + column`.
    """
    states = size * size
    transition, reward = torch.zeros(states, 4, states), torch.zeros(states, 4)
    for s in range(states):
        for a, (down, right) in enumerate(((-1, 0), (0, 1), (1, 0), (0, -1))):
            row, column = s // size + down, s % size + right
            inside = 0 <= row < size and 0 <= column < size
            reached = size * row + column if inside else s
            transition[s, a, reached] = 1.0
            reward[s, a] = float(reached == states - 1)
    start = torch.zeros(states)
    start[0] = 1.0
    return TabularEnvironment(transition, reward, start=start, horizon=horizon, envs=envs, seed=seed)
