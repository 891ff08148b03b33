"""One reference run on one side: a method on a task with one seed, evaluated as it learns; one JSON line a point.

    python benchmarks/reference_work.py ours sac Hopper-v5 0 50000 OUT.jsonl      # or narrow: bfloat16 products
    .venv-peers/bin/python benchmarks/reference_work.py theirs sac Hopper-v5 0 50000 OUT.jsonl

Both sides have Stable-Baselines3's settings (our preset "sb3"), the same environments, one thread, and are evaluated by
their mode on the same ten starts every 5,000 decisions. A run that was cut short begins anew; a whole one has the last
line {"done": true, ...}.
"""

from __future__ import annotations

import json
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

EVERY, EPISODES = 5_000, 10


class Log:
    """Lines of a file, written as they come."""

    def __init__(self, path: str) -> None:
        self.path, self.start = Path(path), time.process_time()
        self.path.write_text("")

    def point(self, decisions: int, returns: list[float]) -> None:
        self.write({"decisions": decisions, "mean": sum(returns) / len(returns), "returns": returns})

    def write(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({**line, "cpu_seconds": round(time.process_time() - self.start, 1)}) + "\n")


def narrow(name: str, task: str, seed: int, decisions: int, log: Log) -> None:
    """Ours with products of bfloat16 factors."""
    ours(name, task, seed, decisions, log, matmul="bfloat16")


def ours(name: str, task: str, seed: int, decisions: int, log: Log, **options: str) -> None:
    from trimtab.core.loop import run
    from trimtab.core.registry import find
    from trimtab.environments.gym import GymEnvironment
    from trimtab.policies.networks import build_networks
    from trimtab.returns import HELD_OUT, evaluated

    base = find("ddpg")(**options) if name == "td3" else None
    method = find(name)(base, preset="sb3", **({} if base else options))
    environment = GymEnvironment(task, envs=1, seed=seed)
    exam = GymEnvironment(task, envs=EPISODES, seed=HELD_OUT)
    models, seen = build_networks(method, environment, seed), 0
    for step in run(method, environment, models, until={"decisions": decisions}, seed=seed):
        now = step.state.clock.decisions
        if now // EVERY > seen // EVERY:
            log.point(now, evaluated(step.state, method, exam, EPISODES).returns)
        seen = now


def theirs(name: str, task: str, seed: int, decisions: int, log: Log) -> None:
    import gymnasium
    import stable_baselines3 as sb3
    from stable_baselines3.common.callbacks import BaseCallback

    exam = gymnasium.make(task)

    def returns(model: Any) -> list[float]:
        made = []
        for episode in range(EPISODES):
            obs, _ = exam.reset(seed=10_000 + episode)
            total, over = 0.0, False
            while not over:
                action, _ = model.predict(obs, deterministic=True)
                obs, reward, terminated, truncated, _ = exam.step(action)
                total, over = total + float(reward), terminated or truncated
            made.append(total)
        return made

    class Evaluate(BaseCallback):
        """Collects of PPO are long: evaluated after the first update that follows a multiple of EVERY decisions."""

        seen = 0

        def _on_step(self) -> bool:
            if name != "ppo":
                self.look()
            return True

        def _on_rollout_start(self) -> None:
            if name == "ppo":
                self.look()

        def _on_training_end(self) -> None:
            self.look()

        def look(self) -> None:
            if self.num_timesteps // EVERY > self.seen // EVERY:
                log.point(self.num_timesteps, returns(self.model))
            self.seen = self.num_timesteps

    model = getattr(sb3, name.upper())("MlpPolicy", task, seed=seed, device="cpu")
    model.learn(decisions, callback=Evaluate())


def versions() -> dict[str, str]:
    held = {d.metadata["Name"].lower(): d.version for d in metadata.distributions()}
    names = ("torch", "gymnasium", "mujoco", "numpy", "stable-baselines3", "stable_baselines3", "trimtab")
    return {n: held[n] for n in names if n in held}


def main() -> None:
    side, name, task, seed, decisions, path = sys.argv[1:]
    torch.set_num_threads(1)
    log = Log(path)
    {"ours": ours, "narrow": narrow, "theirs": theirs}[side](name, task, int(seed), int(decisions), log)
    log.write({"done": True, "versions": versions()})


if __name__ == "__main__":
    main()
