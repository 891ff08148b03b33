"""Stochastic policies over vectors of observations: a diagonal Gaussian and a categorical one; and a value beside them.

All answer `evaluate(batch, want)` with `[N, T]` results that are 0 where `mask` is 0. Policies also say how far two
distributions are apart: `divergence` of what `evaluate` calls "distribution".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.batch import Batch
from trimtab.core.contracts import Decision, Pullback
from trimtab.native.dense import DenseKernels
from trimtab.policies.layers import MLP, Inputs

VALUE = frozenset({"value"})
LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)
EDGE = 1e-6  # how close to the ends of its interval a tanh action may come, as a share of half the interval


def masked(value: Tensor, batch: Batch) -> Tensor:
    """`value` where our policy decided, 0 elsewhere; a padded decision may hold anything, nan too."""
    return value if batch.same("mask") == 1 else torch.where(batch["mask"], value, torch.zeros_like(value))


class Gaussian(nn.Module):
    """`a ~ N(mu(s), diag(sigma^2))`, log sigma a parameter that does not depend on the state.

    `log pi = sum_j [-((a_j - mu_j) / sigma_j)^2 / 2 - log sigma_j - log(2 pi) / 2]`. The action is unbounded, and the
    log-probability is that of the action before the environment clips it.
    bounds: `(low, high)` `[A]` make it `a = c tanh(u) + b`, `u` the Gaussian, c and b the half width and the middle;
    then `log pi = log N(u) - sum_j log(c_j (1 - tanh^2 u_j))` and there is no entropy in closed form. `u` comes back
    from the action itself, which stays 1e-6 of half the interval away from its ends.
    """

    half_width: Tensor
    middle: Tensor

    def __init__(
        self,
        inputs: Inputs,
        mean: MLP,
        shape: tuple[int, ...],
        *,
        log_std: float = 0.0,
        bounds: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.inputs, self.mean, self.shape, self.begin = inputs, mean, shape, log_std
        self.log_std = nn.Parameter(torch.full((math.prod(shape),), log_std, dtype=inputs.dtype))
        self.bounded = bounds is not None
        if bounds is not None:
            low, high = (b.to(inputs.dtype).flatten() for b in bounds)
            self.register_buffer("half_width", (high - low) / 2, persistent=False)
            self.register_buffer("middle", (high + low) / 2, persistent=False)
        self.provides = frozenset({"logp", "mean", "std", "distribution"} | ({"entropy"} if bounds is None else set()))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.log_std, self.begin)

    def evaluate(self, batch: Batch, want: frozenset[str]) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        mean = self.mean(self.inputs(batch["obs"])) if want - {"std", "entropy"} else None
        if mean is not None and "logp" in want:
            made["logp"] = masked(self.density(mean, batch["action"].flatten(2)), batch)
        if mean is not None and "mean" in want:
            made["mean"] = mean
        if "std" in want:
            made["std"] = self.log_std.exp().expand(*batch["mask"].shape, -1)
        if mean is not None and "distribution" in want:
            made["distribution"] = torch.cat([mean, self.log_std.expand_as(mean)], -1)
        if "entropy" in want:
            each = (self.log_std + (0.5 + LOG_SQRT_2PI)).sum()
            made["entropy"] = masked(each.expand(batch["mask"].shape), batch)
        return made

    def pullback(self, batch: Batch, want: frozenset[str]) -> Pullback | None:
        """See `ActorCritic.pullback`."""
        log_std = self.log_std
        if self.bounded or not want <= {"logp", "entropy"} or not log_std.requires_grad:
            return None
        passed = self.mean.pullback(self.inputs(batch["obs"]).flatten(0, 1))
        if passed is None:
            return None
        mean, into = passed
        shape, kernels = batch["action"].shape[:2], DenseKernels.at(mean)
        with torch.no_grad():
            action = batch["action"].reshape(mean.shape)
            if kernels is not None:
                z, logp = kernels.gaussian(mean, action, log_std)
            else:
                z = (action - mean) * (-log_std).exp()
                logp = -0.5 * torch.linalg.vecdot(z, z) - log_std.sum()
            made = {"logp": (logp - len(log_std) * LOG_SQRT_2PI).view(shape)}
            if "entropy" in want:
                made["entropy"] = (log_std + (0.5 + LOG_SQRT_2PI)).sum().expand(shape)

        def back(grads: Mapping[str, Tensor]) -> list[Tensor]:
            grad = grads["logp"].reshape(-1)
            if kernels is not None:
                into_mean, into_log_std = kernels.gaussian_back(grad, z, log_std)
            else:
                along = grad[:, None] * z
                into_mean, into_log_std = along * (-log_std).exp(), (along * z).sum(0) - grad.sum()
            if "entropy" in grads:
                into_log_std = into_log_std + grads["entropy"].sum()
            return [into_log_std, *into(into_mean)]

        return made, back

    def divergence(self, new: Tensor, old: Tensor) -> Tensor:
        """`KL(new || old)` of distributions `[..., 2 A]` (means, log deviations), `[...]`; no tanh changes it."""
        (mean, log_std), (mean_old, log_std_old) = new.chunk(2, -1), old.chunk(2, -1)
        gap = (2 * log_std).exp() + (mean - mean_old).square()
        return (log_std_old - log_std + 0.5 * gap * (-2 * log_std_old).exp() - 0.5).sum(-1)

    def density(self, mean: Tensor, action: Tensor) -> Tensor:
        """`log pi` of flat actions `[..., A]` under means of the same shape, `[...]`."""
        log_std = self.log_std
        if not self.bounded:
            z = (action - mean) * (-log_std).exp()
            return -0.5 * z.square().sum(-1) - (log_std.sum() + len(log_std) * LOG_SQRT_2PI)
        y = ((action - self.middle) / self.half_width).clamp(-1 + EDGE, 1 - EDGE)
        u = torch.atanh(y)
        # log(1 - tanh^2 u) = 2 (log 2 - u - softplus(-2 u)), which does not lose the small ones.
        change = self.half_width.log() + 2 * (math.log(2) - u - F.softplus(-2 * u))
        return (-0.5 * ((u - mean) * (-log_std).exp()).square() - log_std - LOG_SQRT_2PI - change).sum(-1)

    def act(self, obs: Tensor, carry: Any, rng: torch.Generator) -> tuple[Decision, Any]:
        with torch.inference_mode():
            mean = self.mean(self.inputs(obs))
            noise = torch.empty_like(mean).normal_(generator=rng)
            action = self._outer(mean + self.log_std.exp() * noise)
            if self.bounded:
                return Decision(action.reshape(-1, *self.shape), self.density(mean, action)), carry
            logp = -0.5 * noise.square().sum(-1) - (self.log_std.sum() + len(self.log_std) * LOG_SQRT_2PI)
            return Decision(action.reshape(-1, *self.shape), logp), carry

    def mode(self, obs: Tensor) -> Tensor:
        """The mean, or what `tanh` makes of it: the mode of the Gaussian that is squashed."""
        with torch.inference_mode():
            return self._outer(self.mean(self.inputs(obs))).reshape(-1, *self.shape)

    def _outer(self, u: Tensor) -> Tensor:
        return self.middle + self.half_width * u.tanh().clamp(-1 + EDGE, 1 - EDGE) if self.bounded else u


class Categorical(nn.Module):
    """`pi(a|s) = softmax(logits(s))_a`; of several independent choices (MultiDiscrete), the product.

    choices: the number of actions of each choice. single: whether an action is one number `[...]`, not a vector.
    """

    provides = frozenset({"logp", "entropy", "distribution"})

    def __init__(self, inputs: Inputs, logits: MLP, choices: tuple[int, ...], single: bool) -> None:
        super().__init__()
        self.inputs, self.logits, self.choices, self.single = inputs, logits, choices, single

    def evaluate(self, batch: Batch, want: frozenset[str]) -> dict[str, Tensor]:
        logps = self._logps(batch["obs"])
        made: dict[str, Tensor] = {}
        if "logp" in want:
            made["logp"] = masked(self._taken(logps, batch["action"]), batch)
        if "entropy" in want:
            made["entropy"] = masked(-sum_of([(p.exp() * p).sum(-1) for p in logps]), batch)
        if "distribution" in want:
            made["distribution"] = torch.cat(logps, -1)
        return made

    def divergence(self, new: Tensor, old: Tensor) -> Tensor:
        """`KL(new || old)` of log-probabilities `[..., K]`, of every choice one after another, `[...]`."""
        return (new.exp() * (new - old)).sum(-1)

    def pullback(self, batch: Batch, want: frozenset[str]) -> Pullback | None:
        """See `ActorCritic.pullback`; of one choice."""
        if len(self.choices) > 1 or not want <= {"logp", "entropy"}:
            return None
        passed = self.logits.pullback(self.inputs(batch["obs"]).flatten(0, 1))
        if passed is None:
            return None
        logits, into = passed
        with torch.no_grad():
            shape, every = batch["action"].shape[:2], logits.log_softmax(-1)
            action = batch["action"].reshape(-1, 1).long()
            made = {"logp": every.gather(-1, action).view(shape)}
            probs = every.exp()
            entropy = -(probs * every).sum(-1, keepdim=True) if "entropy" in want else None
            if entropy is not None:
                made["entropy"] = entropy.view(shape)

        def back(grads: Mapping[str, Tensor]) -> list[Tensor]:
            grad = grads["logp"].reshape(-1, 1)
            into_logits = (-grad * probs).scatter_add(-1, action, grad)
            if entropy is not None:
                into_logits = into_logits - grads["entropy"].reshape(-1, 1) * probs * (every + entropy)
            return into(into_logits)

        return made, back

    def _logps(self, obs: Tensor) -> list[Tensor]:
        """Log-probabilities of every action, `[..., K]`, one for each choice."""
        logits = self.logits(self.inputs(obs))
        parts = (logits,) if len(self.choices) == 1 else logits.split(self.choices, -1)
        return [p.log_softmax(-1) for p in parts]

    def _taken(self, logps: list[Tensor], action: Tensor) -> Tensor:
        picks = action[..., None] if self.single else action
        return sum_of([p.gather(-1, picks[..., i : i + 1].long())[..., 0] for i, p in enumerate(logps)])

    def act(self, obs: Tensor, carry: Any, rng: torch.Generator) -> tuple[Decision, Any]:
        with torch.inference_mode():
            logps = self._logps(obs)
            # Gumbel's trick: the argmax of log-probabilities plus such noise is a draw from them.
            drawn = [(p - torch.empty_like(p).exponential_(generator=rng).log()).argmax(-1) for p in logps]
            action = drawn[0] if self.single else torch.stack(drawn, -1)
            return Decision(action, self._taken(logps, action)), carry

    def mode(self, obs: Tensor) -> Tensor:
        with torch.inference_mode():
            best = [p.argmax(-1) for p in self._logps(obs)]
            return best[0] if self.single else torch.stack(best, -1)


def sum_of(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


class Value(nn.Module):
    """`V(s)`, one number for each observation."""

    provides = frozenset({"value"})

    def __init__(self, inputs: Inputs, net: MLP) -> None:
        super().__init__()
        self.inputs, self.net = inputs, net

    def evaluate(self, batch: Batch, want: frozenset[str]) -> dict[str, Tensor]:
        return {"value": masked(self.net(self.inputs(batch["obs"]))[..., 0], batch)} if "value" in want else {}

    def pullback(self, batch: Batch, want: frozenset[str]) -> Pullback | None:
        """See `ActorCritic.pullback`."""
        passed = self.net.pullback(self.inputs(batch["obs"]).flatten(0, 1)) if want == {"value"} else None
        if passed is None:
            return None
        made, into = passed
        return {"value": made.view(batch["obs"].shape[:2])}, lambda grads: into(grads["value"].reshape(-1, 1))


class ActorCritic(nn.Module):
    """A policy and a value with no layer in common, trained as one: their gradient is clipped by one norm."""

    def __init__(self, actor: Gaussian | Categorical, critic: Value) -> None:
        super().__init__()
        self.actor, self.critic = actor, critic
        self.provides = actor.provides | critic.provides

    def evaluate(self, batch: Batch, want: frozenset[str]) -> dict[str, Tensor]:
        decided = want - {"value"}
        made = self.actor.evaluate(batch, decided) if decided else {}
        return {**made, **self.critic.evaluate(batch, want)} if "value" in want else made

    def pullback(self, batch: Batch, want: frozenset[str]) -> Pullback | None:
        """`evaluate` without a graph, and what turns gradients of its results into those of `parameters()`, in order.

        None where that cannot be done: padded rows, other wants, an activation without a known slope, or layers trained
        only in part.
        """
        if batch.same("mask") != 1 or "value" not in want or want == {"value"}:
            return None
        acting, valuing = self.actor.pullback(batch, want - {"value"}), self.critic.pullback(batch, VALUE)
        if acting is None or valuing is None:
            return None

        def back(grads: Mapping[str, Tensor]) -> list[Tensor]:
            return acting[1](grads) + valuing[1](grads)

        return {**acting[0], **valuing[0]}, back

    def act(self, obs: Tensor, carry: Any, rng: torch.Generator) -> tuple[Decision, Any]:
        return self.actor.act(obs, carry, rng)

    def mode(self, obs: Tensor) -> Tensor:
        return self.actor.mode(obs)

    def divergence(self, new: Tensor, old: Tensor) -> Tensor:
        return self.actor.divergence(new, old)
