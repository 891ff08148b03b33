"""Toy problems of claims whose gradient is known exactly: how far a direction is from it, turn by turn."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trimtab.core.batch import Batch
from trimtab.core.kit import Kit
from trimtab.core.loop import run
from trimtab.core.method import Method
from trimtab.core.piece import piece
from trimtab.core.registry import find
from trimtab.core.terms import SOURCES
from trimtab.environments.tabular import TabularEnvironment, random_mdp
from trimtab.policies.tabular import TableSoftmax

DISCOUNT, HORIZON = 0.9, 20
FIRST, TURNS, WINDOWS = 100, 2000, 8
STEADY = (40, 160, 2)  # first turn, turns and windows where steps do not shrink: the policy soon stops being random
FRESH = 100  # those settings were found by trials on seeds 0 to 2, so they are measured on other processes


@piece("collect", writes=("obs", "action", "next_obs", "mask", "reward", "terminated", "truncated", "logp_behavior",
       "episode", "source", "age"), uses=lambda options: (options["policy"],))  # fmt: skip
def table_episodes(kit: Kit, *, count: int = 1, policy: str = "policy") -> Batch:
    """`episodes` of a tabular environment, rolled out in plain lists: the same rows, thirty times as fast."""
    table: Any = kit.models[policy]
    made = kit.environment.rollout(table.probs, count, kit.rng("act"))
    logp = table.probs.log()[made.obs, made.action] * made.mask
    last = made.mask.sum(1, keepdim=True) - 1 == torch.arange(made.mask.shape[1])
    return Batch(
        {
            "obs": made.obs,
            "action": made.action,
            "next_obs": made.next_obs,
            "mask": made.mask,
            "reward": made.reward,
            "terminated": made.terminated,
            "truncated": last & ~made.terminated,
            "logp_behavior": logp,
            "episode": made.episode[:, 0],
            "source": torch.full((count,), SOURCES.index("policy")),
            "age": torch.zeros(count, dtype=torch.long),
        }
    )


def exact_gradients(environment: TabularEnvironment, logits: Tensor) -> Tensor:
    """`grad J` at each of many tables of logits `[T, S, A]`, of the same shape."""
    leaf = logits.clone().requires_grad_()
    (made,) = torch.autograd.grad(environment.objective(leaf.softmax(-1), DISCOUNT).sum(), leaf)
    return made


def tracking(method: Method, seed: int) -> dict[str, float]:
    """How well the direction of a method tracks the gradient on a random process of its own seed.

    `e_t = |d_t - grad J(theta_t)|`; the root mean square of it over each of 8 windows, equally wide in log t from turn
    100 to 2000 (2 windows from 40 to 160 where steps do not shrink). slope: of its logarithm over log t, least squares.
    error: in the last window.
    """
    shrinking = method.get("update.lr").exponent > 0
    first, turns, windows = (FIRST, TURNS, WINDOWS) if shrinking else STEADY
    seed += 0 if shrinking else FRESH
    environment = random_mdp(horizon=HORIZON, tables=seed, seed=seed)
    policy = TableSoftmax(environment.states, environment.actions)
    points, directions = [], []
    at = policy.logits.detach().clone()
    for step in run(method, environment, {"policy": policy}, until=turns, seed=seed):
        points.append(at)
        directions.append(step.state.pieces["policy/estimate"]["d"]["logits"])
        at = policy.logits.detach().clone()
    wrong = torch.stack(directions) + exact_gradients(environment, torch.stack(points))  # d tracks -grad J
    square = wrong.square().sum((1, 2))
    edges = [round(first * (turns / first) ** (k / windows)) for k in range(windows + 1)]
    rms = torch.stack([square[a:b].mean().sqrt() for a, b in itertools.pairwise(edges)]).log()
    centre = torch.tensor([math.log(math.sqrt(a * b)) for a, b in itertools.pairwise(edges)], dtype=rms.dtype)
    centre = centre - centre.mean()
    slope = float((centre * rms).sum() / centre.square().sum())
    return {"slope": slope, "error": float(rms[-1].exp())}


def on_tables(count: int = 1) -> Method:
    """GPOMDP with `count` quick episodes a gradient at discount 0.9: what the compared methods stand on."""
    base: Method = find("gpomdp")(discount=DISCOUNT)
    # The rows are the same ones, so this is no edit that a method on top could undo.
    return replace(base.swap("collect", table_episodes(count=count)), edits=base.edits)
