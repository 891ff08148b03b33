"""The loops that the benchmark calls bare do the same work as `run`: the same parameters after the same updates."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab.core.loop import run
from trimtab.core.registry import find
from trimtab.environments.gym import GymEnvironment
from trimtab.policies.networks import build_networks

FILE = Path(__file__).parents[2] / "benchmarks" / "bare.py"
TASK = "Pendulum-v1"


@pytest.fixture(scope="module")
def bare() -> Any:
    spec = importlib.util.spec_from_file_location("bare", FILE)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def ours(method: Any, envs: int, turns: int) -> dict[str, Any]:
    environment = GymEnvironment(TASK, envs=envs, seed=0)
    models = build_networks(method, environment, 0)
    for _ in run(method, environment, models, until=turns, seed=0):
        pass
    return dict(models)


def same(ours: dict[str, Any], theirs: dict[str, Any], close: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, model in ours.items():
        for mine, other in zip(model.parameters(), theirs[name].parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=close)


def test_sac(bare: Any) -> None:
    method = find("sac")(preset="sb3").set("uniform_first.decisions", 190).set("collect.warmup", 190)
    loop = bare.bare_sac(TASK, warmup=190)
    for _ in range(20):  # past the end of an episode, at 200 steps
        theirs = next(loop)
    same(ours(method, 1, 20), theirs, 2e-5)


def test_ppo(bare: Any) -> None:
    loop = bare.bare_ppo(TASK, envs=2, horizon=128)
    for _ in range(2):  # an episode ends in the second
        theirs = next(loop)
    same(ours(find("ppo")(preset="sb3", horizon=128), 2, 2), theirs, 2e-4)
