"""One work of `benchmarks/control.py` on one side, in a process of its own: prints one JSON object as its last line.

    python benchmarks/control_work.py ours sac '{"task": "HalfCheetah-v5", "updates": 500, "threads": 1}'
    .venv-peers/bin/python benchmarks/control_work.py theirs sac '{...}'
    python benchmarks/control_work.py bare sac '{...}'

Both sides have Stable-Baselines3's settings, the same environment and the same threads; what is timed is the loop from
end to end, after a warm-up.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import torch

Size = dict[str, Any]
Made = dict[str, Any]
WARMUP, BEFORE = 1_000, 50  # decisions before the first update, updates before the clock


class Clock:
    """Wall and processor seconds since it was made."""

    def __init__(self) -> None:
        self.start = time.perf_counter(), time.process_time()

    def read(self, count: int, what: str) -> Made:
        wall, cpu = time.perf_counter() - self.start[0], time.process_time() - self.start[1]
        return {"seconds": wall, "cpu_seconds": cpu, f"{what}_per_second": count / wall}


def ours(name: str, size: Size) -> Made:
    return ours_ppo(size) if name == "ppo" else ours_replay(name, size)


def ours_replay(name: str, size: Size) -> Made:
    """Updates a second of an off-policy method, one a step."""
    from trimtab.core.registry import find

    options = size.get("options", {})
    base = {k: v for k, v in options.items() if k == "matmul"} if name == "td3" else {}
    own = {k: v for k, v in options.items() if k not in base}
    made = find(name)(find("ddpg")(**base) if name == "td3" else None, preset="sb3", **own)
    loop = started(made.set("uniform_first.decisions", WARMUP).set("collect.warmup", WARMUP), size, 1)
    for _ in range(BEFORE):
        next(loop)
    clock = Clock()
    for _ in range(size["updates"]):
        next(loop)
    return clock.read(size["updates"], "updates")


def ours_ppo(size: Size) -> Made:
    """Environment steps a second of ppo, collecting and learning."""
    from trimtab.core.registry import parse

    method = parse(f'ppo(preset="sb3", horizon={size["horizon"]})')
    loop, turns = started(method, size, size["envs"]), size["turns"]
    next(loop)
    clock = Clock()
    for _ in range(turns):
        next(loop)
    return clock.read(turns * size["horizon"] * size["envs"], "steps")


def by_hand(name: str, size: Size) -> Made:
    """The same as a loop written by hand."""
    import bare

    if name == "ppo":
        loop, count = bare.bare_ppo(size["task"], envs=size["envs"], horizon=size["horizon"]), size["turns"]
    else:
        loop, count = bare.bare_sac(size["task"], warmup=WARMUP, **size.get("options", {})), size["updates"]
    for _ in range(1 if name == "ppo" else BEFORE):
        next(loop)
    clock = Clock()
    for _ in range(count):
        next(loop)
    if name == "ppo":
        return clock.read(count * size["horizon"] * size["envs"], "steps")
    return clock.read(count, "updates")


def started(method: Any, size: Size, envs: int) -> Iterator[Any]:
    from trimtab.core.loop import run
    from trimtab.environments.gym import GymEnvironment
    from trimtab.policies.networks import build_networks

    environment = GymEnvironment(size["task"], envs=envs, seed=0)
    return run(method, environment, build_networks(method, environment, 0), until=10**9, seed=0)


def theirs(name: str, size: Size) -> Made:
    import stable_baselines3 as sb3
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    made: Made = {}

    class Timed(BaseCallback):
        """Starts at a step and stops the training so many steps later; a rollout of ppo begins both."""

        clock: Clock | None = None

        def _on_step(self) -> bool:
            return name == "ppo" or self.look()

        def _on_rollout_start(self) -> None:
            if name == "ppo":
                self.look()

        def _on_training_end(self) -> None:
            if name == "ppo" and not made:
                self.look()

        def look(self) -> bool:
            now = self.num_timesteps
            if self.clock is None and now >= first:
                self.clock = Clock()
            elif self.clock is not None and now >= first + count and not made:
                made.update(self.clock.read(count, "steps" if name == "ppo" else "updates"))
                return False
            return True

    if name == "ppo":
        per_turn = size["horizon"] * size["envs"]
        first, count = per_turn, size["turns"] * per_turn
        env = make_vec_env(size["task"], n_envs=size["envs"])
        model = sb3.PPO("MlpPolicy", env, n_steps=size["horizon"], device="cpu", seed=0)
    else:
        first, count = WARMUP + BEFORE, size["updates"]
        options = size.get("theirs", {})
        model = getattr(sb3, name.upper())(
            "MlpPolicy", size["task"], learning_starts=WARMUP, device="cpu", seed=0, **options
        )
    model.learn(first + count + (0 if name == "ppo" else 10), callback=Timed())
    return made


def versions() -> dict[str, str]:
    held = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in metadata.distributions()}
    return {n: held[n] for n in ("torch", "gymnasium", "mujoco", "numpy", "stable-baselines3", "trimtab") if n in held}


def main() -> None:
    side, name, size = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    torch.set_num_threads(size["threads"])
    torch.manual_seed(0)
    if side == "theirs":
        made = theirs(name, size)
    else:
        from trimtab.machine import keep_freed_memory

        keep_freed_memory()  # as our command line does
        run = by_hand if side == "bare" else ours
        made = run(name, size)
    print(json.dumps({**made, "versions": versions()}))


if __name__ == "__main__":
    main()
