"""Every control method beside its twin: turns of the method, each with what its twin makes of the same batch.

A new control method needs a line in TWINS, or `test_twins` fails with its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from tests.golden import control_twins as twins
from tests.golden import momentum_runs, props_twin, replay_runs
from tests.golden.compared import Compared, Params
from trimtab.core.batch import Batch
from trimtab.core.loop import run
from trimtab.core.method import Method
from trimtab.core.registry import find
from trimtab.core.state import State
from trimtab.environments.toy import PointEnvironment
from trimtab.policies.networks import build_networks

PLAIN = {"normalise_obs": False, "scale_reward": False}
ENVS = 3


def built(method: Method, seed: int, hidden: tuple[int, ...] = (3,)) -> tuple[Any, Any]:
    environment = PointEnvironment(seed=seed)
    networks = {name: replace(n, hidden=hidden) for name, n in method.networks.items()}
    models = build_networks(method.but(networks=networks), environment, seed, dtype=torch.float64)
    with torch.no_grad():  # a policy that does something: its last layer starts almost at zero
        for model in models.values():
            for p in model.parameters():
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed), dtype=p.dtype))
    return environment, models


def params(model: Any) -> Params:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def table(batch: Batch, n: int = ENVS) -> Batch:
    """The `[N, T]` columns of a batch that was made flat, as they were collected."""
    names = ("obs", "action", "next_obs", "reward", "terminated", "truncated", "mask")
    return Batch({k: batch[k][:, 0].reshape(n, -1, *batch[k].shape[2:]) for k in names})


class Shuffled:
    """The minibatches that a run draws: every row once in each pass, in a new random order where they are cut."""

    def __init__(self, seed: int) -> None:
        self._rng = State.stream(type("S", (), {"seed": seed, "streams": {}})(), "shuffle")  # type: ignore[arg-type]

    def pairs(self, batch: Batch, size: int, passes: int) -> list[list[tuple[int, int]]]:
        """`(environment, step)` of the decisions of every update of a turn."""
        n, width = batch.mask.numel(), batch.mask.shape[1]
        made = []
        for _ in range(passes):
            rows = torch.randperm(n, generator=self._rng).tolist() if size < n else list(range(n))
            made += [[divmod(r, width) for r in rows[k : k + size]] for k in range(0, n, size)]
        return made


# -- on-policy -----------------------------------------------------------------------------------------------------


def a2c(seed: int) -> Iterator[Compared]:
    method = find("a2c")(horizon=6, lr=1e-2, lam=0.9, entropy_coef=0.02)
    environment, models = built(method, seed)
    optimizer, before = twins.RMSprop(1e-2), params(models["policy"])
    ended = 0
    for step in run(method, environment, models, until=2, seed=seed):
        batch = table(step.batch)
        ended += int(batch.truncated.sum()) + int(batch.terminated.sum())
        expected = twins.a2c(batch, before, optimizer, lam=0.9, entropy_coef=0.02)
        yield Compared(params(models["policy"]), expected, before)
        before = params(models["policy"])
    assert ended, "no episode ended, so no end was compared"


def ppo(seed: int, **options: Any) -> Iterator[Compared]:
    method = find("ppo")(horizon=6, rows=7, passes=2, lr=1e-2, **PLAIN, **options)
    return _surrogate(method, seed, turns=2, **options)


def _surrogate(method: Method, seed: int, *, turns: int, **options: Any) -> Iterator[Compared]:
    """PPO's updates on whatever collect gave."""
    environment, models = built(method, seed)
    optimizer, before, shuffled = twins.Adam(1e-2, 1e-5), params(models["policy"]), Shuffled(seed)
    for step in run(method, environment, models, until=turns, seed=seed):
        batch = table(step.batch)
        chosen = shuffled.pairs(batch, method.rows or 0, method.passes)
        yield Compared(params(models["policy"]), twins.ppo(batch, before, optimizer, chosen, **options), before)
        before = params(models["policy"])


def natural(name: str, seed: int) -> Iterator[Compared]:
    """Conjugate gradient with as many iterations as there are parameters solves exactly, but for rounding."""
    base = find("npg")(horizon=6, rows=9, passes=2, iterations=40, max_kl=0.05)
    base = base.set("policy:update.tolerance", 0.0)
    method = find("trpo")(base) if name == "trpo" else base
    environment, models = built(method, seed)
    before, critic = params(models["policy"]), params(models["critic"])
    step = next(run(method, environment, models, until=1, seed=seed))
    expected = twins.trpo(
        table(step.batch), before, lambda s: float(twins.value(critic, "", s)), search=name == "trpo", max_kl=0.05
    )
    yield Compared(params(models["policy"]), expected, before, tolerance=1e-10)


# -- on the last few batches ---------------------------------------------------------------------------------------


def over_ppo(name: str, **options: Any) -> Method:
    base = find("ppo")(horizon=6, rows=9, passes=2, hidden=(), lr=1e-2, **PLAIN)
    made: Method = find(name)(base, **options)
    return made


def buffered(seed: int) -> Iterator[Compared]:
    """Four turns: the buffer of three batches fills up and begins to lose its oldest."""
    return _surrogate(over_ppo("buffered", batches=3), seed, turns=4)


def linear(p: Params) -> props_twin.Linear:
    return props_twin.Linear(p["actor.mean.layers.0.weight"][0].tolist(), p["actor.mean.layers.0.bias"].item(),
                             p["actor.log_std"].item())  # fmt: skip


def _params_of(made: props_twin.Linear, like: Params) -> Params:
    return {
        **like,
        "actor.mean.layers.0.weight": torch.tensor([made.w], dtype=torch.float64),
        "actor.mean.layers.0.bias": torch.tensor([made.b], dtype=torch.float64),
        "actor.log_std": torch.tensor([made.log_std], dtype=torch.float64),
    }


def behaving(name: str, seed: int) -> Iterator[Compared]:
    """PROPS and ROS whole: the learner by PPO's twin on the buffer, the behavior policy by its own, six turns."""
    sweeps = {"eps": 0.05, "kl_coef": 0.2, "limit": 10.0, "epochs": 5, "minibatches": 1}
    method = over_ppo(name, batches=2, blocks=2, **({"lr": 0.02, **sweeps} if name == "props" else {"lr": 0.5}))
    environment, models = built(method, seed, hidden=())
    optimizer, adam, shuffled = twins.Adam(1e-2, 1e-5), props_twin.Adam(4, 0.02), Shuffled(seed)
    before = params(models["policy"])
    for step in run(method, environment, models, until=6, seed=seed):
        batch = table(step.batch)
        chosen, rests = shuffled.pairs(batch, 9, 2), step.turn % 2 == 1
        theta = before if rests else twins.ppo(batch, before, optimizer, chosen)
        stays = [i for i in range(len(step.batch)) if not bool(step.batch.leaving[i, 0])]
        rows = [(step.batch.obs[i, 0].tolist(), float(step.batch.action[i, 0, 0])) for i in stays]
        if name == "props":
            phi, _ = props_twin.behavior(linear(theta), rows, adam, eps=0.05, kl_coef=0.2, limit=10.0, epochs=5,
                                         clip=0.5)  # fmt: skip
        else:
            phi = props_twin.away(linear(theta), rows, lr=0.5)
        expected = {f"policy.{n}": x for n, x in theta.items()}
        expected |= {f"behavior.{n}": x for n, x in _params_of(phi, theta).items()}
        got = {f"{m}.{n}": x for m in ("policy", "behavior") for n, x in params(models[m]).items()}
        start = {f"{m}.{n}": x for m in ("policy", "behavior") for n, x in before.items()}
        yield Compared(got, expected, start, tolerance=2e-12, moves=0.0 if rests and not rows else 1e-4)
        before = params(models["policy"])


# name -> turns of the method beside those of its twin, for a seed
TWINS: dict[str, Callable[[int], Iterator[Compared]]] = {
    "a2c": a2c,
    "ppo": ppo,
    "npg": partial(natural, "npg"),
    "trpo": partial(natural, "trpo"),
    "buffered": buffered,
    "props": partial(behaving, "props"),
    "ros": partial(behaving, "ros"),
    **{name: partial(momentum_runs.turns, name) for name in ("gpomdp", "n_sgdm", "n_pg_igt", "harpg")},
    **{name: partial(replay_runs.turns, name) for name in ("sac", "td3", "ddpg", "dqn")},
}
