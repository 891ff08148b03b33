"""Policies whose actions stay inside a box: a tanh-squashed Gaussian and a deterministic one."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.batch import Batch
from trimtab.core.contracts import Decision
from trimtab.core.errors import MethodError, nearest
from trimtab.native.dense import DenseKernels
from trimtab.policies.layers import MLP, Inputs
from trimtab.policies.stochastic import EDGE, LOG_SQRT_2PI, masked

SPREADS = {"tanh": (-5.0, 2.0), "clamp": (-20.0, 2.0)}  # how log sigma is kept in a range, and the range


class Bounds(nn.Module):
    """A box, as half width `c` and middle `b`, both `[A]`: `a = c y + b` for y in [-1, 1].

    level: `sum_j log(4 sqrt(2 pi) c_j)`, the part of a squashed Gaussian's log-density that is the same everywhere.
    """

    reach: Tensor
    middle: Tensor

    def __init__(self, low: Tensor, high: Tensor) -> None:
        super().__init__()
        self.register_buffer("reach", (high - low) / 2, persistent=False)
        self.register_buffer("middle", (high + low) / 2, persistent=False)
        self.unit = bool((self.reach == 1).all() and (self.middle == 0).all())
        self.level = float((LOG_SQRT_2PI + 2 * math.log(2) + self.reach.double().log()).sum())

    def outer(self, y: Tensor) -> Tensor:
        return y if self.unit else self.reach * y + self.middle

    def inner(self, action: Tensor) -> Tensor:
        return action if self.unit else (action - self.middle) / self.reach


class SquashedGaussian(nn.Module):
    """`u = mu(s) + sigma(s) noise`, `a = c tanh(u) + b` (Haarnoja et al. 2018, appendix C).

    `log pi(a|s) = log N(u; mu, sigma) - sum_j log(c_j (1 - tanh^2 u_j))`, with
    `log(1 - tanh^2 u) = 2 (log 2 - u - softplus(-2 u))`, which loses nothing where tanh is close to 1.

    `evaluate` gives `sample` and `sample_logp`, the action that the column `noise` `[N, T, A]` makes and its
    log-density, both with gradient; `logp` of the column `action`, whose `u` comes back from the action itself; `mean`
    and `std` of u. spread: "tanh" maps log sigma into [-5, 2], "clamp" cuts it to [-20, 2].
    """

    provides = frozenset({"sample", "sample_logp", "logp", "mean", "std"})

    def __init__(self, inputs: Inputs, net: MLP, bounds: Bounds, shape: tuple[int, ...], spread: str = "tanh") -> None:
        super().__init__()
        if spread not in SPREADS:
            raise MethodError(f"spread={spread!r} is not known. {nearest(str(spread), SPREADS)}")
        self.inputs, self.net, self.bounds, self.shape, self.spread = inputs, net, bounds, shape, spread

    def moments(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """`mu` and `log sigma`, each `[..., A]`."""
        return self._moments(self.net(self.inputs(obs)))

    def _moments(self, made: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = made.chunk(2, -1)
        low, high = SPREADS[self.spread]
        if self.spread == "clamp":
            return mean, log_std.clamp(low, high)
        return mean, torch.add(low + 0.5 * (high - low), log_std.tanh(), alpha=0.5 * (high - low))

    def drawn(self, made: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Of what the network gave, `[..., 2 A]`: `tanh(u)` `[..., A]` of the u that `noise` makes, and the log-density
        of that action, `[...]`."""
        kernels, shape = DenseKernels.at(made), noise.shape
        fits = (*shape[:-1], 2 * shape[-1]) == made.shape and noise.dtype == made.dtype and noise.is_cpu
        if kernels is None or not fits or noise.requires_grad:
            return self._drawn(made, noise)
        made, noise = made.reshape(-1, made.shape[-1]), noise.reshape(-1, shape[-1])
        if made.requires_grad and torch.is_grad_enabled():
            y, logp = _Squashed.apply(self, kernels, made, noise)
        else:
            y, logp, _ = self._squashed(kernels, made, noise)
        return y.view(shape), logp.view(shape[:-1])

    def _squashed(self, kernels: DenseKernels, made: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Any]:
        return kernels.squashed(made, noise, self.spread == "clamp", SPREADS[self.spread], self.bounds.level)

    def _drawn(self, made: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """`drawn` from what the network gave, by torch's operations."""
        mean, log_std = self._moments(made)
        u = torch.addcmul(mean, log_std.exp(), noise)
        return u.tanh(), self.density(u, noise, log_std)

    def density(self, u: Tensor, noise: Tensor, log_std: Tensor) -> Tensor:
        """The log-density of `c tanh(u) + b`, `[...]`; noise: `(u - mu) / sigma`.

        `-sum_j (noise_j^2 / 2 + log sigma_j - 2 (u_j + softplus(-2 u_j)))`, and what depends on the box alone.
        """
        each = torch.addcmul(log_std, noise, noise, value=0.5)
        each = torch.sub(each, u + F.softplus(-2 * u), alpha=2)
        return -each.sum(-1) - self.bounds.level

    def evaluate(self, batch: Batch, want: frozenset[str]) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        given = self.net(self.inputs(batch["obs"]))
        if want & {"sample", "sample_logp"}:
            y, logp = self.drawn(given, batch["noise"])
            if "sample" in want:
                made["sample"] = self.bounds.outer(y).unflatten(-1, self.shape)
            if "sample_logp" in want:
                made["sample_logp"] = masked(logp, batch)
        if not want & {"logp", "mean", "std"}:
            return made
        mean, log_std = self._moments(given)
        if "logp" in want:
            y = self.bounds.inner(batch["action"].flatten(2)).clamp(-1 + EDGE, 1 - EDGE)
            u = torch.atanh(y)
            made["logp"] = masked(self.density(u, (u - mean) * (-log_std).exp(), log_std), batch)
        made |= {"mean": mean} if "mean" in want else {}
        return made | ({"std": log_std.exp()} if "std" in want else {})

    def act(self, obs: Tensor, carry: Any, rng: torch.Generator) -> tuple[Decision, Any]:
        with torch.inference_mode():
            given = self.net(self.inputs(obs))
            noise = given.new_empty(len(given), given.shape[-1] // 2).normal_(generator=rng)
            y, logp = self.drawn(given, noise)
            return Decision(self.bounds.outer(y).reshape(-1, *self.shape), logp), carry

    def mode(self, obs: Tensor) -> Tensor:
        """What `tanh` makes of the mean: the mode of the Gaussian that is squashed."""
        with torch.inference_mode():
            return self.bounds.outer(self.moments(obs)[0].tanh()).reshape(-1, *self.shape)


class _Squashed(torch.autograd.Function):
    """`SquashedGaussian._drawn` of `[R, 2 A]` and noise `[R, A]` as one step of the gradient."""

    @staticmethod
    def forward(ctx: Any, policy: SquashedGaussian, kernels: DenseKernels, made: Tensor, noise: Tensor) -> Any:
        y, logp, kept = policy._squashed(kernels, made, noise)
        ctx.policy, ctx.kernels = policy, kernels
        ctx.save_for_backward(made, noise, *kept)
        ctx.set_materialize_grads(False)
        return y, logp

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        made, noise, *kept = ctx.saved_tensors
        if torch.is_grad_enabled():  # it will be differentiated again
            given = [(m, g) for m, g in zip(ctx.policy._drawn(made, noise), grads) if g is not None]
            (into,) = torch.autograd.grad([m for m, _ in given], made, [g for _, g in given], create_graph=True)
            return None, None, into, None
        return None, None, ctx.kernels.squashed_back(*grads, kept), None


class Deterministic(nn.Module):
    """`a = c tanh(mu(s)) + b`, with no randomness of its own; `evaluate` gives it as `sample`, with gradient."""

    provides = frozenset({"sample"})

    def __init__(self, inputs: Inputs, net: MLP, bounds: Bounds, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.inputs, self.net, self.bounds, self.shape = inputs, net, bounds, shape

    def evaluate(self, batch: Batch, want: frozenset[str]) -> dict[str, Tensor]:
        return {"sample": self._action(batch["obs"]).unflatten(-1, self.shape)} if "sample" in want else {}

    def _action(self, obs: Tensor) -> Tensor:
        return self.bounds.outer(self.net(self.inputs(obs)).tanh())

    def act(self, obs: Tensor, carry: Any, rng: torch.Generator) -> tuple[Decision, Any]:
        return Decision(self.mode(obs)), carry

    def mode(self, obs: Tensor) -> Tensor:
        with torch.inference_mode():
            return self._action(obs).reshape(-1, *self.shape)
