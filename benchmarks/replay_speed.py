"""Updates per second of an off-policy method on a MuJoCo task, end to end on one thread, one update per step.

    python benchmarks/replay_speed.py "sac" "sac(matmul='bfloat16')" --updates 300 --rounds 3

Process time, arms in turn (A B A B); the first turn, with its warm-up, is not counted.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from collections.abc import Iterator
from typing import Any

import torch

from trimtab.core.loop import run
from trimtab.core.registry import parse
from trimtab.environments.gym import GymEnvironment
from trimtab.policies.networks import build_networks


def loop(expression: str, task: str) -> Iterator[Any]:
    """A run that has made its warm-up of 1,000 decisions and ten updates."""
    method = parse(expression).set("uniform_first.decisions", 1000).set("collect.warmup", 1000)
    environment = GymEnvironment(task, envs=1, seed=0)
    made = run(method, environment, build_networks(method, environment, 0), until=10**9, seed=0)
    for _ in range(10):
        next(made)
    return made


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("methods", nargs="+")
    parser.add_argument("--task", default="HalfCheetah-v5")
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--sort", default="tottime")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    loops = {name: loop(name, asked.task) for name in asked.methods}
    if asked.profile:
        for made in loops.values():
            with cProfile.Profile(time.process_time) as profile:
                for _ in range(asked.updates):
                    next(made)
            pstats.Stats(profile).sort_stats(asked.sort).print_stats(70)
        return
    taken: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(asked.rounds):
        for name, made in loops.items():
            start = time.process_time()
            for _ in range(asked.updates):
                next(made)
            taken[name].append((time.process_time() - start) / asked.updates)
    for name, seconds in taken.items():
        each = ", ".join(f"{1e3 * s:.2f}" for s in seconds)
        print(f"{name}: {1 / min(seconds):.0f} updates/s at best; ms an update in each round: {each}")


if __name__ == "__main__":
    main()
