"""A small combination lock with a fixed offline data set, and one linear map per step for policy and critic."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.batch import Batch


class Lock:
    """Latents 0 and 1 are good, 2 absorbs; the right action goes to 0 or 1, any other to 2 for ever.

    Reward, at the last step only: 1 for a right action in a good latent, else 0.1 with probability 1/2. `offline` is a
    fixed data set of `episodes` episodes of the right actions, each replaced by a uniform one with probability 1/H.
    """

    def __init__(self, horizon: int = 3, actions: int = 4, episodes: int = 200, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.horizon, self.actions, self.width = horizon, actions, 3 * horizon
        self.right = torch.randint(actions, (horizon, 3), generator=g)
        self.right[:, 2] = -1
        self.started = 0

        def behaviour(latent: Tensor, h: int) -> Tensor:
            n = len(latent)
            stray = torch.rand(n, generator=g) < 1 / horizon
            return torch.where(stray | (latent == 2), torch.randint(actions, (n,), generator=g), self.right[h, latent])

        self.offline = self.play(behaviour, episodes, g)
        self.started = 0

    def observe(self, latent: Tensor, h: int) -> Tensor:
        """One-hot of (latent, step), `[n, 3 H]`; zeros after the last step."""
        if h == self.horizon:
            return torch.zeros(len(latent), self.width, dtype=torch.float64)
        return nn.functional.one_hot(3 * h + latent, self.width).double()

    def play(self, decide: Callable[[Tensor, int], Tensor], n: int, rng: torch.Generator) -> dict[str, Tensor]:
        """`n` episodes as transitions, `[n, H, ...]`; `decide(latent, h)` chooses."""
        latent = torch.randint(2, (n,), generator=rng)
        steps: list[dict[str, Tensor]] = []
        for h in range(self.horizon):
            action = decide(latent, h)
            right, chance = action == self.right[h, latent], torch.rand(n, 2, generator=rng, dtype=torch.float64)
            moved = torch.where(right, (chance[:, 0] < 0.5).long(), torch.full_like(latent, 2))
            last = torch.where(right, 1.0, 0.1 * (chance[:, 1] < 0.5).double())
            reward = last if h == self.horizon - 1 else torch.zeros_like(last)
            steps.append(
                {
                    "obs": self.observe(latent, h),
                    "action": action,
                    "reward": reward,
                    "next_obs": self.observe(moved, h + 1),
                    "terminated": torch.full((n,), h == self.horizon - 1),
                    "turn": torch.full((n,), h),
                    "episode": self.started + torch.arange(n),
                }
            )
            latent = moved
        self.started += n
        return {name: torch.stack([s[name] for s in steps], 1) for name in steps[0]}

    def state_dict(self) -> dict[str, Any]:
        return {"started": self.started}

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        self.started = tree["started"]


class Stacked(nn.Module):
    """One linear map per step, `[H, D, A]`, from the observation of step h to a number per action."""

    def __init__(self, lock: Lock, scale: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        shape = (lock.horizon, lock.width, lock.actions)
        self.weight = nn.Parameter(scale * torch.randn(shape, generator=g, dtype=torch.float64))

    def table(self, obs: Tensor, h: Tensor) -> Tensor:
        """`[N, 1, A]` from `obs` `[N, 1, D]` and steps `[N]`."""
        return torch.einsum("nd,nda->na", obs[:, 0], self.weight[h])[:, None]


class StackedPolicy(Stacked):
    """A softmax per step."""

    provides = frozenset({"logp", "logits"})

    def sample(self, obs: Tensor, h: Tensor, rng: torch.Generator) -> Tensor:
        """Actions `[N, 1]` by inverse CDF, one uniform number each."""
        probs = self.table(obs, h).softmax(-1)
        uniform = torch.rand(len(obs), 1, 1, generator=rng, dtype=torch.float64)
        return (probs.cumsum(-1) < uniform).sum(-1).clamp_max(probs.shape[-1] - 1)

    def evaluate(self, batch: Batch, want: frozenset[str]) -> dict[str, Tensor]:
        logits = self.table(batch.obs, batch.turn).log_softmax(-1)
        made = {"logits": logits, "logp": logits.gather(-1, batch.action[..., None])[..., 0] * batch.mask}
        return {name: made[name] for name in want}


class StackedCritic(Stacked):
    """`f_h(s, a)`; `value_next` is `f_{h+1}(s', a')`, 0 after the last step."""

    provides = frozenset({"value", "value_next"})

    def score(self, obs: Tensor, h: Tensor, action: Tensor) -> Tensor:
        return self.table(obs, h).gather(-1, action[..., None])[..., 0]

    def evaluate(self, batch: Batch, want: frozenset[str]) -> dict[str, Tensor]:
        made = {}
        if "value" in want:
            made["value"] = self.score(batch.obs, batch.turn, batch.action)
        if "value_next" in want:
            after = (batch.turn + 1).clamp_max(len(self.weight) - 1)
            made["value_next"] = self.score(batch.next_obs, after, batch.next_action) * ~batch.terminated
        return made
