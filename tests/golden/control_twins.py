"""Slow, literal transcriptions of the control card's equations: one turn each, on the point that is pushed.

A twin gets the batch as it was collected (`[N, T]` columns before `flat`, under their own names), a function for the
log-probability, value and so on of one decision at given parameters, and makes every update with plain loops. Nothing
of trimtab's stages is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Params = dict[str, Tensor]


# -- networks ------------------------------------------------------------------------------------------------------


def mlp(p: Params, head: str, x: Tensor) -> Tensor:
    """Layers head.0, head.1, ... with tanh between, unit by unit."""
    count = len([n for n in p if n.startswith(head) and n.endswith("weight")])
    for k in range(count):
        w, b = p[f"{head}.{k}.weight"], p[f"{head}.{k}.bias"]
        x = torch.stack([sum((w[i, j] * x[j] for j in range(len(x))), b[i]) for i in range(len(b))])  # type: ignore
        if k < count - 1:
            x = torch.tanh(x)
    return x


def gaussian(p: Params, head: str, obs: Tensor, action: Tensor) -> Tensor:
    mean, log_std = mlp(p, f"{head}mean.layers", obs), p[f"{head}log_std"]
    total = mean.new_zeros(())
    for j in range(len(mean)):
        sigma = torch.exp(log_std[j])
        total = total - ((action[j] - mean[j]) / sigma) ** 2 / 2 - log_std[j] - 0.5 * math.log(2 * math.pi)
    return total


def gaussian_entropy(p: Params, head: str) -> Tensor:
    return sum(0.5 + 0.5 * math.log(2 * math.pi) + s for s in p[f"{head}log_std"])  # type: ignore[return-value]


def gaussian_kl(p: Params, old: Params, head: str, obs: Tensor) -> Tensor:
    """KL(new || old)."""
    new_mean, old_mean = (mlp(q, f"{head}mean.layers", obs) for q in (p, old))
    total = new_mean.new_zeros(())
    for j in range(len(new_mean)):
        s, t = torch.exp(p[f"{head}log_std"][j]), torch.exp(old[f"{head}log_std"][j])
        total = total + torch.log(t / s) + (s**2 + (new_mean[j] - old_mean[j]) ** 2) / (2 * t**2) - 0.5
    return total


def value(p: Params, head: str, obs: Tensor) -> Tensor:
    return mlp(p, f"{head}net.layers", obs)[0]


# -- advantages ----------------------------------------------------------------------------------------------------


def gae(
    reward: list[float], v: list[float], v_next: list[float], terminated: list[bool], truncated: list[bool],
    gamma: float, lam: float,
) -> list[float]:  # fmt: skip
    """The definition as a sum: `A_t = sum_k (gamma lam)^k delta_{t+k}`, to the end of the episode or of the rollout."""
    delta = [r + gamma * (0.0 if end else after) - now for r, now, after, end in zip(reward, v, v_next, terminated)]
    made = []
    for t in range(len(reward)):
        total, factor = 0.0, 1.0
        for k in range(t, len(reward)):
            total += factor * delta[k]
            factor *= gamma * lam
            if terminated[k] or truncated[k]:
                break
        made.append(total)
    return made


def advantages(batch: Any, v_of: Callable[[Tensor], float], gamma: float, lam: float) -> dict[Any, tuple[float, float]]:
    """(advantage, value target) of every decision (row, step)."""
    out = {}
    for i in range(batch.mask.shape[0]):
        steps = [t for t in range(batch.mask.shape[1]) if bool(batch.mask[i, t])]
        v = [v_of(batch.obs[i, t]) for t in steps]
        v_next = [v_of(batch.next_obs[i, t]) for t in steps]
        columns = [[x[i, t].item() for t in steps] for x in (batch.terminated, batch.truncated)]
        made = gae([float(batch.reward[i, t]) for t in steps], v, v_next, *columns, gamma, lam)
        out |= {(i, t): (a, a + v[k]) for k, (t, a) in enumerate(zip(steps, made))}
    return out


def standard(a: list[float]) -> list[float]:
    mean = sum(a) / len(a)
    std = math.sqrt(sum((x - mean) ** 2 for x in a) / (len(a) - 1))
    return [(x - mean) / (std + 1e-8) for x in a]


# -- steps ---------------------------------------------------------------------------------------------------------


def clipped_gradient(loss: Tensor, leaves: Params, norm: float | None) -> Params:
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    total = math.sqrt(sum(float((g**2).sum()) for g in grads))
    scale = 1.0 if norm is None else min(1.0, norm / (total + 1e-6))
    return {n: scale * g for n, g in zip(leaves, grads)}


def leaves_of(p: Params) -> Params:
    return {n: x.detach().clone().requires_grad_() for n, x in p.items()}


class RMSprop:
    def __init__(self, lr: float, alpha: float = 0.99, eps: float = 1e-5) -> None:
        self.lr, self.alpha, self.eps = lr, alpha, eps
        self.v: Params = {}

    def step(self, p: Params, g: Params) -> Params:
        out = {}
        for n, x in p.items():
            v = self.alpha * self.v.get(n, torch.zeros_like(x)) + (1 - self.alpha) * g[n] ** 2
            self.v[n] = v
            out[n] = x - self.lr * g[n] / (torch.sqrt(v) + self.eps)
        return out


class Adam:
    def __init__(self, lr: float, eps: float = 1e-8) -> None:
        self.lr, self.eps, self.t = lr, eps, 0
        self.m: Params = {}
        self.v: Params = {}

    def step(self, p: Params, g: Params) -> Params:
        self.t += 1
        out = {}
        for n, x in p.items():
            m = 0.9 * self.m.get(n, torch.zeros_like(x)) + 0.1 * g[n]
            v = 0.999 * self.v.get(n, torch.zeros_like(x)) + 0.001 * g[n] ** 2
            self.m[n], self.v[n] = m, v
            seen, wide = m / (1 - 0.9**self.t), v / (1 - 0.999**self.t)
            out[n] = x - self.lr * seen / (torch.sqrt(wide) + self.eps)
        return out


# -- methods -------------------------------------------------------------------------------------------------------


def a2c(batch: Any, start: Params, optimizer: RMSprop, gamma: float = 0.99, lam: float = 1.0,
        entropy_coef: float = 0.0) -> Params:  # fmt: skip
    made = advantages(batch, lambda s: float(value(start, "critic.", s)), gamma, lam)
    p, loss = leaves_of(start), torch.zeros((), dtype=torch.float64)
    for (i, t), (a, target) in made.items():
        loss = loss - a * gaussian(p, "actor.", batch.obs[i, t], batch.action[i, t])
        loss = loss + 0.5 * (target - value(p, "critic.", batch.obs[i, t])) ** 2
        loss = loss - entropy_coef * gaussian_entropy(p, "actor.")
    return optimizer.step(start, clipped_gradient(loss / len(made), p, 0.5))


def ppo(
    batch: Any, start: Params, optimizer: Adam, minibatches: list[list[tuple[int, int]]], *, gamma: float = 0.99,
    lam: float = 0.95, clip_at: float = 0.2, value_clip: float | None = 0.2, value_coef: float = 0.25,
    entropy_coef: float = 0.0,
) -> Params:  # fmt: skip
    """`minibatches`: the decisions of every update, in order, all passes one after another."""
    v_old = {(i, t): float(value(start, "critic.", batch.obs[i, t]))
             for i in range(batch.mask.shape[0]) for t in range(batch.mask.shape[1])}  # fmt: skip
    old = {k: float(gaussian(start, "actor.", batch.obs[k], batch.action[k])) for k in v_old}
    made = advantages(batch, lambda s: float(value(start, "critic.", s)), gamma, lam)
    p = start
    for chosen in minibatches:
        q, loss = leaves_of(p), torch.zeros((), dtype=torch.float64)
        scaled = standard([made[k][0] for k in chosen])
        for k, a in zip(chosen, scaled):
            rho = torch.exp(gaussian(q, "actor.", batch.obs[k], batch.action[k]) - old[k])
            loss = loss - torch.minimum(rho * a, torch.clamp(rho, 1 - clip_at, 1 + clip_at) * a)
            v, target = value(q, "critic.", batch.obs[k]), made[k][1]
            error = (v - target) ** 2
            if value_clip is not None:
                near = v_old[k] + torch.clamp(v - v_old[k], -value_clip, value_clip)
                error = torch.maximum(error, (near - target) ** 2)
            loss = loss + value_coef * error - entropy_coef * gaussian_entropy(q, "actor.")
        p = optimizer.step(p, clipped_gradient(loss / len(chosen), q, 0.5))
    return p


def trpo(
    batch: Any, start: Params, value_of: Callable[[Tensor], float], *, search: bool, max_kl: float = 0.01,
    damping: float = 0.1, gamma: float = 0.99, lam: float = 0.95, shrink: float = 0.8, tries: int = 10,
) -> Params:  # fmt: skip
    """The natural step by a dense Fisher matrix and a direct solve; with `search`, TRPO's backtracking."""
    made = advantages(batch, value_of, gamma, lam)
    keys = list(made)
    a = standard([made[k][0] for k in keys])
    old = {k: float(gaussian(start, "", batch.obs[k], batch.action[k])) for k in keys}

    def loss(p: Params) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for k, x in zip(keys, a):
            total = total - torch.exp(gaussian(p, "", batch.obs[k], batch.action[k]) - old[k]) * x
        return total / len(keys)

    def kl(p: Params) -> Tensor:
        return sum((gaussian_kl(p, start, "", batch.obs[k]) for k in keys), torch.zeros(())) / len(keys)

    names = list(start)
    sizes = [start[n].numel() for n in names]

    def unpack(flat: Tensor) -> Params:
        return {n: x.reshape(start[n].shape) for n, x in zip(names, flat.split(sizes))}

    theta = torch.cat([start[n].flatten() for n in names])
    g = torch.autograd.functional.jacobian(lambda f: loss(unpack(f)), theta)
    fisher = torch.autograd.functional.hessian(lambda f: kl(unpack(f)), theta)
    curved = fisher + damping * torch.eye(len(theta), dtype=torch.float64)
    x = torch.linalg.solve(curved, g)
    step = math.sqrt(2 * max_kl / float(x @ curved @ x))
    if not search:
        return unpack(theta - step * x)
    for k in range(tries):
        candidate = theta - shrink**k * step * x
        if float(kl(unpack(candidate))) <= max_kl and float(loss(unpack(candidate))) < float(loss(start)):
            return unpack(candidate)
    return start
