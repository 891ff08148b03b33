"""SAC and PPO as loops written by hand: the same networks, optimiser, numbers and random streams as `run(...)`, and
nothing else: no logs, no check that numbers are finite, no resume. What `run` takes longer is the price of the loop.

`benchmarks/control.py` measures both; `tests/control/test_bare.py` holds them to the same parameters, to rounding.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from typing import Any

import gymnasium
import torch
from torch import Tensor, nn

from trimtab.core.registry import find
from trimtab.environments.gym import GymEnvironment
from trimtab.environments.transition import episode_seed
from trimtab.policies.dense import held_by, layers
from trimtab.policies.networks import build_networks

Models = dict[str, Any]


def stream(name: str, seed: int = 0) -> torch.Generator:
    """The random stream that a run of this seed has under this name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def adam(model: nn.Module, lr: float, eps: float = 1e-8) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=lr, eps=eps, weight_decay=0.0, fused=True)


def built(method: Any, task: str) -> Models:
    return build_networks(method, GymEnvironment(task), 0)


class Episodes:
    """One bare environment, reset when an episode ends; float32 tensors in and out."""

    def __init__(self, task: str, ids: Iterator[int]) -> None:
        self.env, self.ids, self.returns, self.total = gymnasium.make(task), ids, list[float](), 0.0
        self.obs = self._reset()

    def _reset(self) -> Tensor:
        return torch.as_tensor(self.env.reset(seed=episode_seed(0, next(self.ids)))[0], dtype=torch.float32)

    def step(self, action: Any) -> tuple[Tensor, float, bool, bool]:
        made, reward, terminated, truncated, _ = self.env.step(action)
        after = torch.as_tensor(made, dtype=torch.float32)
        self.total += float(reward)
        if terminated or truncated:
            self.returns.append(self.total)
            self.total = 0.0
            self.obs = self._reset()
        else:
            self.obs = after
        return after, float(reward), terminated, truncated


# -- SAC -----------------------------------------------------------------------------------------------------------


def q_values(critic: Any, obs: Tensor, action: Tensor) -> Tensor:
    """`[E, R]`."""
    return layers(torch.cat([obs, action], 1), held_by(critic.layers), torch.relu, critic.matmul)[..., 0]


def drawn(actor: Any, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The action that `noise` makes, and its log-density."""
    y, logp = actor.drawn(actor.net(actor.inputs(obs)), noise)
    return actor.bounds.outer(y), logp


def bare_sac(task: str, *, warmup: int, matmul: str = "float32", batch: int = 256, lr: float = 3e-4,
             gamma: float = 0.99, tau: float = 0.005, capacity: int = 1_000_000) -> Iterator[Models]:  # fmt: skip
    """One update a step; yields after each."""
    models = built(find("sac")(preset="sb3", matmul=matmul), task)
    actor, critic, temperature = models["policy"], models["critic"], models["temperature"]
    target = copy.deepcopy(critic).requires_grad_(False)
    sides = list(zip(target.parameters(), critic.parameters()))
    optimizers = [adam(m, lr) for m in (critic, actor, temperature)]
    world = Episodes(task, iter(range(10**9)))
    space, width = world.env.action_space, len(world.obs)
    count = space.shape[0]
    low, high = torch.as_tensor(space.low), torch.as_tensor(space.high)
    cuts = [width, count, width, 1, 1]
    ring = torch.empty(capacity, sum(cuts))
    acting, replaying, nexts, noises = (stream(n) for n in ("act", "replay", "critic/next_action", "noise"))
    made = 0
    while True:
        obs = world.obs
        if made < warmup:
            action = low + (high - low) * torch.rand(count, generator=acting)
        else:
            with torch.inference_mode():
                action = drawn(actor, obs[None], torch.empty(1, count).normal_(generator=acting))[0][0]
        after, reward, terminated, _ = world.step(action.numpy())
        ring[made % capacity] = torch.cat([obs, action, after, torch.tensor([reward, float(terminated)])])
        made += 1
        if made < max(warmup, 1):
            continue
        rows = ring.index_select(0, torch.randint(min(made, capacity), (batch,), generator=replaying))
        obs, action, after, rewards, ended = rows.split(cuts, 1)
        noise = torch.randn(batch, count, generator=noises)
        alpha = temperature.log.detach().exp()
        with torch.no_grad():
            future, logp = drawn(actor, after, torch.randn(batch, count, generator=nexts))
            value = q_values(target, after, future).amin(0) - alpha * logp
            y = rewards[:, 0] + gamma * (1 - ended[:, 0]) * value
        sample, logp = drawn(actor, obs, noise)
        stepped(optimizers[0], (0.5 * (q_values(critic, obs, action) - y).square().sum(0)).mean())
        with torch.no_grad():
            torch._foreach_lerp_([t for t, _ in sides], [c for _, c in sides], tau)
        critic.requires_grad_(False)
        stepped(optimizers[1], (alpha * logp - q_values(critic, obs, sample).amin(0)).mean())
        critic.requires_grad_(True)
        stepped(optimizers[2], (-temperature.log * (logp.detach() - count)).mean())
        yield models


def stepped(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


# -- PPO -----------------------------------------------------------------------------------------------------------


def bare_ppo(task: str, *, envs: int = 8, horizon: int = 256, rows: int = 64, passes: int = 10, lr: float = 3e-4,
             gamma: float = 0.99, lam: float = 0.95, clip: float = 0.2) -> Iterator[Models]:  # fmt: skip
    """Stable-Baselines3's numbers; yields after each batch of `horizon` steps and its updates."""
    models = built(find("ppo")(preset="sb3", horizon=horizon), task)
    policy = models["policy"]
    actor, value = policy.actor, policy.critic.net
    optimizer = adam(policy, lr, 1e-5)
    acting, shuffling = stream("act"), stream("shuffle")
    ids = iter(range(10**9))
    worlds = [Episodes(task, ids) for _ in range(envs)]
    space = worlds[0].env.action_space
    while True:
        kept: list[tuple[Tensor, ...]] = []
        for _ in range(horizon):
            obs = torch.stack([w.obs for w in worlds])
            with torch.inference_mode():
                decision, _ = actor.act(obs, None, acting)
            clipped = decision.action.numpy().clip(space.low, space.high)
            steps = [w.step(a) for w, a in zip(worlds, clipped)]
            after = torch.stack([s[0] for s in steps])
            flags = torch.tensor([s[1:] for s in steps], dtype=torch.float32)
            kept.append((obs, decision.action, decision.logp, after, flags))
        obs, action, old, after, flags = (torch.stack(c) for c in zip(*kept))  # [T, E, ...]
        reward, terminated, truncated = flags.unbind(-1)
        with torch.no_grad():
            v, beyond = value(obs)[..., 0], value(after)[..., 0]
            delta = reward + gamma * (1 - terminated) * beyond - v
            decay = gamma * lam * (1 - torch.maximum(terminated, truncated))
            advantage = delta.clone()
            for t in range(horizon - 2, -1, -1):
                advantage[t] += decay[t] * advantage[t + 1]
        columns = [c.transpose(0, 1).flatten(0, 1) for c in (obs, action, old, advantage, advantage + v)]
        for _ in range(passes):
            for index in torch.randperm(len(columns[0]), generator=shuffling).split(rows):
                o, a, before, adv, goal = (c[index] for c in columns)
                adv = (adv - adv.mean()) / (adv.std() + 1e-8)
                ratio = (actor.density(actor.mean(o), a) - before).exp()
                loss = -torch.min(ratio * adv, ratio.clamp(1 - clip, 1 + clip) * adv).mean()
                loss = loss + 0.5 * (value(o)[..., 0] - goal).square().mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
                optimizer.step()
        yield models
