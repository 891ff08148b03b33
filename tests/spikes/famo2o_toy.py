"""The toy problem and the networks of the FamO2O spike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.batch import Batch

FIELDS = ("obs", "action", "next_obs", "reward", "terminated")
F64 = torch.float64


# -- the problem -------------------------------------------------------------------------------------------------


class Contexts:
    """Contexts of two types (the card's bandit) with a successor: obs `[3]` = (type, feature, 1), action `[1]`.

    Reward: type 0 `max(0, 1 - |a + 0.8| / 0.8)`, type 1 `1 - a^2`. `data` is the offline set, columns `[size, 1, *]`.
    """

    def __init__(self, size: int = 48, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.obs = self._context(1, g)
        obs = self._context(size, g)
        action = 0.9 * (2 * torch.rand(size, 1, generator=g, dtype=F64) - 1)
        self.data = dict(zip(FIELDS, (x[:, None] for x in (obs, action, *self._answer(obs, action, g)))))

    def step(self, action: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
        """One decision in the current context; the transition as columns `[1, 1, *]`."""
        obs = self.obs
        next_obs, reward, terminated = self._answer(obs, action, rng)
        self.obs = self._context(1, rng) if bool(terminated) else next_obs
        return dict(zip(FIELDS, (x[:, None] for x in (obs, action, next_obs, reward, terminated))))

    def _context(self, n: int, g: torch.Generator) -> Tensor:
        kind = torch.randint(2, (n,), generator=g).to(F64)
        return torch.stack([kind, torch.randn(n, generator=g, dtype=F64), torch.ones(n, dtype=F64)], 1)

    def _answer(self, obs: Tensor, action: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        a = action[:, 0]
        reward = torch.where(obs[:, 0] == 0, (1 - (a + 0.8).abs() / 0.8).clamp_min(0), 1 - a.square())
        return self._context(len(obs), g), reward, torch.rand(len(obs), generator=g, dtype=F64) < 0.3

    def state_dict(self) -> dict[str, Any]:
        return {"obs": self.obs}

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        self.obs = tree["obs"]


# -- the models --------------------------------------------------------------------------------------------------


def encode(beta: Tensor, width: int = 6, base: float = 10000.0) -> Tensor:
    """`e[2i] = sin(beta / n^(2i/d))`, `e[2i+1] = cos(beta / n^(2i/d))`, `[...] -> [..., width]`; beta is raw."""
    angle = beta[..., None] / base ** (2 * torch.arange(width // 2, dtype=beta.dtype) / width)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)


def mlp(inputs: int, outputs: int, width: int = 16) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, outputs)).double()


class Universal(nn.Module):
    """`pi_u(a | s, e(beta))`: mean `tanh(.)`, one std per action dimension, unsquashed Gaussian.

    Without a `balance` column the feature is the constant `e(beta)` of `fixed`: the plain policy with an idle input.
    """

    provides = frozenset({"logp", "mean", "std"})

    def __init__(self, fixed: float = 10.0) -> None:
        super().__init__()
        self.net, self.log_std, self.fixed = mlp(3 + 6, 1), nn.Parameter(torch.zeros(1, dtype=F64)), fixed

    def evaluate(self, batch: Batch, want: frozenset[str]) -> dict[str, Tensor]:
        beta = batch.balance if "balance" in batch else torch.full(batch.obs.shape[:-1], self.fixed, dtype=F64)
        mean = self.net(torch.cat([batch.obs, encode(beta)], -1)).tanh()
        std = self.log_std.clamp(-5, 2).exp().expand_as(mean)
        made = {"mean": mean, "std": std}
        if "logp" in want:
            made["logp"] = gaussian_logp(batch.action, mean, std).sum(-1)
        return {name: made[name] for name in want}

    def act(self, obs: Tensor, carry: Any, rng: torch.Generator, balance: Tensor | None = None) -> tuple[Tensor, Any]:
        """A sampled action `[N, 1]`, clipped to [-1, 1]."""
        given = {} if balance is None else {"balance": balance}
        now = self.evaluate(Batch({"obs": obs, **given}), frozenset({"mean", "std"}))
        noise = torch.randn(now["mean"].shape, generator=rng, dtype=F64)
        return (now["mean"] + now["std"] * noise).clamp(-1, 1), carry


class Balance(nn.Module):
    """`pi_b(u | s)`, a tanh-squashed Gaussian over `u` in (-1, 1): its mean and std before squashing, `[N, T]`."""

    provides = frozenset({"mean", "std"})

    def __init__(self) -> None:
        super().__init__()
        self.net, self.log_std = mlp(3, 1), nn.Parameter(torch.zeros(1, dtype=F64))

    def evaluate(self, batch: Batch, want: frozenset[str]) -> dict[str, Tensor]:
        mean = self.net(batch.obs)[..., 0]
        return {"mean": mean, "std": self.log_std.clamp(-10, 2).exp().expand_as(mean)}


class Temperature(nn.Module):
    """`T = exp(log T)`, one number."""

    provides = frozenset({"temperature"})

    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.zeros((), dtype=F64))

    def evaluate(self, batch: Batch, want: frozenset[str]) -> dict[str, Tensor]:
        return {"temperature": self.log.exp().expand(batch.obs.shape[:-1])}


class Value(nn.Module):
    """`V(s)`, `[N, T]`."""

    provides = frozenset({"value"})

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(3, 1)

    def evaluate(self, batch: Batch, want: frozenset[str]) -> dict[str, Tensor]:
        return {"value": self.net(batch.obs)[..., 0]}


class Twin(nn.Module):
    """`Q_1(s, a), Q_2(s, a)`, `[N, T, 2]`."""

    provides = frozenset({"value"})

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList([mlp(4, 1), mlp(4, 1)])

    def evaluate(self, batch: Batch, want: frozenset[str]) -> dict[str, Tensor]:
        both = torch.cat([batch.obs, batch.action], -1)
        return {"value": torch.cat([net(both) for net in self.nets], -1)}


def gaussian_logp(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return -((x - mean) / std).square() / 2 - std.log() - math.log(2 * math.pi) / 2


def squashed(mean: Tensor, std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """`u = tanh(mean + std noise)` and its log-density, evaluated from the value before tanh."""
    x = mean + std * noise
    jacobian = 2 * (math.log(2) - x - nn.functional.softplus(-2 * x))
    return x.tanh(), gaussian_logp(x, mean, std) - jacobian


def affine(u: Tensor, lo: float, hi: float) -> Tensor:
    """`beta = (u + 1) / 2 (hi - lo) + lo` for `u` in [-1, 1]."""
    return (u + 1) / 2 * (hi - lo) + lo


def case(seed: int = 0) -> tuple[Contexts, dict[str, nn.Module]]:
    """The problem and all models; plain IQL leaves `balance` and `temperature` alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made: dict[str, nn.Module] = {"policy": Universal(), "value": Value(), "critic": Twin()}
        made |= {"balance": Balance(), "temperature": Temperature()}
    return Contexts(), made
