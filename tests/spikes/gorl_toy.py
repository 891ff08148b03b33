"""The point environment and the networks of the GoRL spike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.batch import Batch

F64 = torch.float64
Decision = dict[str, Tensor]


class Points:
    """`n` points in the plane; action in [-1, 1]^2 moves one by 0.4 a; reward `-|p|^2`; done near 0, cut at `limit`."""

    def __init__(self, n: int = 6, limit: int = 5, seed: int = 0) -> None:
        self.limit = limit
        self.obs = self._start(n, torch.Generator().manual_seed(seed))
        self.age = torch.zeros(n, dtype=torch.long)

    def _start(self, n: int, rng: torch.Generator) -> Tensor:
        return 2 * torch.rand(n, 2, generator=rng, dtype=F64) - 1

    def alike(self, n: int, rng: torch.Generator) -> Points:
        """Other points of the same kind, for evaluation."""
        other = Points(n, self.limit)
        other.obs = self._start(n, rng)
        return other

    def step(self, action: Tensor, rng: torch.Generator) -> Decision:
        """One move of every point; those that ended start anew. `next_obs` is where the move led."""
        next_obs = self.obs + 0.4 * action
        self.age = self.age + 1
        distance = next_obs.square().sum(1)
        terminated = distance < 0.01
        truncated = ~terminated & (self.age >= self.limit)
        done = terminated | truncated
        start = self._start(len(done), rng)
        self.obs = torch.where(done[:, None], start, next_obs)
        self.age = self.age.masked_fill(done, 0)
        return {"next_obs": next_obs, "reward": -distance, "terminated": terminated, "truncated": truncated}

    def state_dict(self) -> dict[str, Any]:
        return {"obs": self.obs, "age": self.age}

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        self.obs, self.age = tree["obs"], tree["age"]


def play(actor: Any, env: Points, steps: int, act: torch.Generator | None, world: torch.Generator) -> Decision:
    """`steps` decisions of every point as columns `[n, steps, *]`; tanh of what is sent acts. act None: the mean."""
    seen: list[Decision] = []
    carry: Any = None
    for _ in range(steps):
        obs = env.obs
        decision, carry = actor.act(obs, carry, act)
        seen.append({"obs": obs, **decision, **env.step(decision["sent"].tanh(), world)})
    return {name: torch.stack([one[name] for one in seen], 1) for name in seen[0]}


def mlp(inputs: int, outputs: int, width: int = 16) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, outputs)).double()


class Encoder(nn.Module):
    """`z ~ N(mu(s), sigma(s)^2)`, diagonal; `sigma = clip(softplus(.) + 1e-3, 1e-3, 10)`; z is not squashed."""

    provides = frozenset({"logp", "entropy", "mean", "std"})

    def __init__(self, decisions: int = 2) -> None:
        super().__init__()
        self.net = mlp(2, 2 * decisions)

    def evaluate(self, batch: Batch, want: frozenset[str]) -> dict[str, Tensor]:
        mean, raw = self.net(batch.obs).chunk(2, -1)
        std = (nn.functional.softplus(raw) + 1e-3).clamp(1e-3, 10)
        made = {"mean": mean, "std": std}
        if "entropy" in want:
            made["entropy"] = (std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)
        if "logp" in want:
            made["logp"] = gaussian_logp(batch.action, mean, std)
        return {name: made[name] for name in want}

    def act(self, obs: Tensor, carry: Any, rng: torch.Generator | None) -> tuple[Decision, Any]:
        """The latent `z` as `action`, with its log-probability; `sent` is what the environment gets (before tanh)."""
        now = self.evaluate(Batch({"obs": obs}), frozenset({"mean", "std"}))
        mean, std = now["mean"], now["std"]
        z = mean if rng is None else mean + std * torch.randn(mean.shape, generator=rng, dtype=F64)
        return {"action": z, "sent": z, "logp_behavior": gaussian_logp(z, mean, std)}, carry


class Critic(nn.Module):
    """`V(s)`, `[N, T]`."""

    provides = frozenset({"value"})

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(2, 1)

    def evaluate(self, batch: Batch, want: frozenset[str]) -> dict[str, Tensor]:
        return {"value": self.net(batch.obs)[..., 0]}


class Velocity(nn.Module):
    """`v(s, x, t)` with `emb(t) = [cos(2^j t), sin(2^j t)]`, j = 0..3. All-zero weights decode `z` to itself."""

    provides = frozenset({"velocity"})

    def __init__(self, decisions: int = 2, width: int = 16) -> None:
        super().__init__()
        self.net = mlp(2 + decisions + 8, decisions, width)

    def forward(self, obs: Tensor, point: Tensor, time: Tensor) -> Tensor:
        angle = time[..., None] * 2.0 ** torch.arange(4, dtype=F64)
        return self.net(torch.cat([obs, point, angle.cos(), angle.sin()], -1))

    def evaluate(self, batch: Batch, want: frozenset[str]) -> dict[str, Tensor]:
        """At `point` `[N, T, K, A]` and `time` `[N, T, K]`: several noises for each decision."""
        obs = batch.obs[:, :, None].expand(*batch.time.shape, -1)
        return {"velocity": self(obs, batch.point, batch.time)}


def gaussian_logp(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return (-((x - mean) / std).square() / 2 - std.log() - math.log(2 * math.pi) / 2).sum(-1)


def transport(velocity: Callable[[Tensor, Tensor, Tensor], Tensor], obs: Tensor, z: Tensor, steps: int) -> Tensor:
    """Euler from t = 1 to 0: `x_1 = z`, `x_{t - 1/K} = x_t - v(s, x_t, t) / K`; returns `u = x_0`. Deterministic.

    Raises ValueError when the latent has not as many dimensions as the action.
    """
    x = z
    for k in range(steps, 0, -1):
        v = velocity(obs, x, torch.full(x.shape[:-1], k / steps, dtype=x.dtype))
        if v.shape != x.shape:
            raise ValueError(f"the latent has {x.shape[-1]} dimensions and the action {v.shape[-1]}; they must agree")
        x = x - v / steps
    return x


def case(seed: int = 0) -> tuple[Points, dict[str, nn.Module]]:
    """The points and all models; plain PPO leaves `decoder` alone. Stage 0 starts from the identity decoder."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        models: dict[str, nn.Module] = {"policy": Encoder(), "critic": Critic(), "decoder": Velocity()}
    for p in models["decoder"].parameters():
        nn.init.zeros_(p)
    return Points(), models
