"""Literal twins of the off-policy methods: one update, row by row, from the equations of their card.

Networks are read from their parameters by name; every product, mean and minimum is spelled out. A twin gets the batch,
the models as they were, and the noise that the run drew, in order.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

LR, GAMMA, TAU = 0.05, 0.99, 0.02
Params = dict[str, dict[str, Tensor]]


def number(x: Tensor) -> float:
    return float(x.detach())


def relu(x: Tensor) -> Tensor:
    return torch.stack([v if number(v) > 0 else v * 0 for v in x])


def through(layers: list[tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
    for i, (weight, bias) in enumerate(layers):
        x = torch.stack([sum(w * v for w, v in zip(row, x)) + b for row, b in zip(weight, bias)])  # type: ignore[misc]
        x = x if i == len(layers) - 1 else relu(x)
    return x


def stack(params: dict[str, Tensor], prefix: str, member: int | None = None) -> list[tuple[Tensor, Tensor]]:
    made = []
    while f"{prefix}layers.{len(made)}.weight" in params:
        pair = params[f"{prefix}layers.{len(made)}.weight"], params[f"{prefix}layers.{len(made)}.bias"]
        made.append(pair if member is None else (pair[0][member], pair[1][member]))
    return made


def q(params: dict[str, Tensor], i: int, s: Tensor, a: Tensor) -> Tensor:
    return through(stack(params, "", i), torch.cat([s, a]))[0]


def critics(params: dict[str, Tensor]) -> int:
    return len(params["layers.0.weight"])


def action(params: dict[str, Tensor], s: Tensor) -> Tensor:
    """The deterministic policy; the toy's actions lie in [-1, 1]."""
    return through(stack(params, "net."), s).tanh()


def drawn(params: dict[str, Tensor], s: Tensor, noise: Tensor, spread: str) -> tuple[Tensor, Tensor]:
    """A squashed Gaussian's action and the log-density of it, as CleanRL writes it but for its 1e-6."""
    head = through(stack(params, "net."), s)
    half = len(head) // 2
    actions, logp = [], head.new_zeros(())
    for mean, raw, eps in zip(head[:half], head[half:], noise):
        log_std = raw.clamp(-20, 2) if spread == "clamp" else -5 + 0.5 * (2 + 5) * (raw.tanh() + 1)
        u = mean + log_std.exp() * eps
        density = -(((u - mean) / log_std.exp()) ** 2) / 2 - log_std - math.log(2 * math.pi) / 2
        logp = logp + density - torch.log(1 - u.tanh() ** 2)
        actions.append(u.tanh())
    return torch.stack(actions), logp


def leaves(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.clone().requires_grad_() for k, v in params.items()}


def stepped(leaf: dict[str, Tensor], loss: Tensor) -> dict[str, Tensor]:
    grads = torch.autograd.grad(loss, list(leaf.values()))
    return {k: (v - LR * g).detach() for (k, v), g in zip(leaf.items(), grads)}


def mean(values: list[Tensor]) -> Tensor:
    return sum(values) / len(values)  # type: ignore[return-value]


def moved(target: dict[str, Tensor], online: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: (1 - TAU) * v + TAU * online[k] for k, v in target.items()}


def rows(batch: Any) -> list[tuple[Tensor, Tensor, Tensor, Tensor, bool]]:
    return [(batch.obs[i, 0], batch.action[i, 0], batch.next_obs[i, 0], batch.reward[i, 0],
             bool(batch.terminated[i, 0])) for i in range(len(batch))]  # fmt: skip


def least(values: list[Tensor]) -> Tensor:
    return min(values, key=number)


def sac(batch: Any, before: Params, noise: list[Tensor], update: int, *, delay: int = 1, log: bool = True,
        scale: float = 1.0, spread: str = "tanh", **_: Any) -> Params:  # fmt: skip
    made, alpha = (
        dict(before),
        before["temperature"]["log"].exp() if "temperature" in before else torch.tensor(0.2, dtype=torch.float64),
    )
    ours = rows(batch)
    due = update % delay == 0
    shared = noise.pop(0) if delay == 1 else None  # drawn before the target's
    leaf, total, draws = leaves(before["critic"]), [], noise.pop(0)
    for (s, a, s2, r, end), eps in zip(ours, draws):
        a2, logp = drawn(before["policy"], s2, eps[0], spread)
        target = before["critic_target"]
        value = least([q(target, i, s2, a2) for i in range(critics(target))]) - alpha * logp
        y = r + GAMMA * (0.0 if end else 1.0) * value
        total.append(scale * sum((q(leaf, i, s, a) - y) ** 2 for i in range(critics(leaf))))
    made["critic"] = stepped(leaf, mean(total))
    for _ in range(delay if due else 0):
        draws = noise.pop(0) if shared is None else shared
        leaf, total = leaves(made["policy"]), []
        for (s, *_), eps in zip(ours, draws):
            a, logp = drawn(leaf, s, eps[0], spread)
            value = least([q(made["critic"], i, s, a) for i in range(critics(made["critic"]))])
            total.append(alpha * logp - value)
        made["policy"] = stepped(leaf, mean(total))
    for _ in range(delay if due and "temperature" in before else 0):
        draws, actor = (noise.pop(0), made["policy"]) if shared is None else (shared, before["policy"])
        leaf, total = leaves(made["temperature"]), []
        for (s, *_), eps in zip(ours, draws):
            a, logp = drawn(actor, s, eps[0], spread)
            strength = leaf["log"] if log else leaf["log"].exp()
            total.append(-strength * (logp.detach() - len(a)))
        made["temperature"] = stepped(leaf, mean(total))
    made["critic_target"] = moved(before["critic_target"], made["critic"])
    return made


def td3(batch: Any, before: Params, noise: list[Tensor], update: int, *, delay: int = 2, smoothing: float = 0.2,
        clip: float = 0.5, **_: Any) -> Params:  # fmt: skip
    made, ours = dict(before), rows(batch)
    draws = noise.pop(0) if smoothing else torch.zeros(len(ours), 1, len(ours[0][1]))
    leaf, total = leaves(before["critic"]), []
    for (s, a, s2, r, end), eps in zip(ours, draws):
        plain = action(before["policy_target"], s2)
        shifts = [max(-clip, min(clip, smoothing * float(e))) for e in eps[0]]
        a2 = torch.stack([(v + shift).clamp(-1, 1) for v, shift in zip(plain, shifts)])
        target = before["critic_target"]
        y = r + GAMMA * (0.0 if end else 1.0) * least([q(target, i, s2, a2) for i in range(critics(target))])
        total.append(sum((q(leaf, i, s, a) - y) ** 2 for i in range(critics(leaf))))
    made["critic"] = stepped(leaf, mean(total))
    if update % delay == 0:
        leaf = leaves(before["policy"])
        made["policy"] = stepped(leaf, mean([-q(made["critic"], 0, s, action(leaf, s)) for s, *_ in ours]))
        for name in ("policy", "critic"):
            made[f"{name}_target"] = moved(before[f"{name}_target"], made[name])
    return made


def ddpg(batch: Any, before: Params, noise: list[Tensor], update: int, **_: Any) -> Params:
    return td3(batch, before, noise, update, delay=1, smoothing=0.0)


def dqn(batch: Any, before: Params, noise: list[Tensor], update: int, *, huber: float | None = None,
        every: int = 50, **_: Any) -> Params:  # fmt: skip
    made, leaf, total = dict(before), leaves(before["policy"]), []
    for s, a, s2, r, end in rows(batch):
        best = max(through(stack(before["policy_target"], "net."), s2), key=number)
        y = r + GAMMA * (0.0 if end else 1.0) * best
        d = through(stack(leaf, "net."), s)[int(a)] - y
        if huber is None:
            total.append(d**2)
        else:
            total.append(d**2 / (2 * huber) if abs(number(d)) < huber else d.abs() - huber / 2)
    made["policy"] = stepped(leaf, mean(total))
    made["policy_target"] = made["policy"] if (update + 1) % every == 0 else before["policy_target"]
    return made
