"""A run of the control world: networks that the method names, environments that are stepped, whole episodes."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from trimtab.core.disk import writing
from trimtab.core.errors import EnvironmentFailure
from trimtab.core.loop import Step, begin
from trimtab.core.method import Method
from trimtab.core.state import State
from trimtab.environments.gym import GymEnvironment
from trimtab.environments.spec import FORMS, KINDS
from trimtab.policies.start import ABOUT, ACTING, MOMENTS, Start, described, read_start
from trimtab.report.folder import START
from trimtab.returns import HELD_OUT, MOST_AT_ONCE, Returns, current, evaluated
from trimtab.runs.request import Request
from trimtab.stages.signals import FEWEST, measured, numbers

PACKAGES = ("gymnasium", "mujoco", "minigrid")


@dataclass
class ControlExperiment:
    """exam: environments of its own, in which the policy is evaluated. start: what its networks begin with."""

    request: Request
    method: Method
    environment: GymEnvironment
    models: dict[str, nn.Module]
    exam: GymEnvironment
    start: Start | None = None

    def begin(self) -> State:
        state = begin(self.method, self.environment, self.models, seed=self.request.seed)
        if self.start is not None and (moments := self.start.moments()):
            state.pieces[f"/{MOMENTS}"].load_state_dict(moments)
        return state

    def notes(self) -> list[str]:
        """With what its networks begin, and whether the budget ends before anything is learned."""
        said = [self.start.said(self.method)] if self.start is not None else []
        now, most = self.method.phases[0].method if self.method.phases else self.method, self.request.budget
        warmup = now.get("collect.warmup") if now.has("collect.warmup") else 0
        if most.get("decisions", warmup + 1) <= warmup:
            said.append(
                f"The first turn makes {warmup:,} decisions before anything is learned (collect.warmup), and "
                f"--decisions {most['decisions']} end with it: this run makes one update. Ask for more, or for a "
                f"shorter warm-up: --set collect.warmup=N --set uniform_first.decisions=N"
            )
        return said

    def keep(self, folder: Path) -> None:
        """A copy of what it begins with, as `START` of a new run folder: the run goes on without the earlier one."""
        kept = folder / START
        shutil.rmtree(kept, ignore_errors=True)
        if self.start is not None:
            with writing(kept):
                shutil.copytree(self.start.folder, kept)

    @property
    def numbers(self) -> torch.dtype:
        return torch.float32

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def evaluate(self, state: State) -> Returns:
        return evaluated(state, self.method, self.exam, self.request.problems)

    def describe(self) -> dict[str, Any]:
        sizes = {name: sum(p.numel() for p in m.parameters()) for name, m in self.models.items()}
        named = ", ".join(f"{name} ({type(self.models[name]).__name__}, {n:,} parameters)" for name, n in sizes.items())
        policy = {"name": named, "compute": "float32", "parameters": sizes}
        if self.start is not None:
            policy["start"] = {"digest": self.start.digest, "said": self.start.said(self.method)}
        return {
            "policy": policy,
            "environment": self.environment.describe(),
            "versions": {name: metadata.version(name) for name in PACKAGES if _installed(name)},
        }

    def measured(self, step: Step) -> dict[str, float]:
        return {**of_batch(step, self.environment), **step.logs}

    def sample(self, step: Step) -> Iterator[Mapping[str, Any]]:
        return iter(())

    def export(self, folder: Path, state: State) -> None:
        """`NAME.safetensors` for every network, `acting.safetensors` with what acting reads beside (running moments),
        and `model.json` with what builds them again.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for name, module in self.models.items():
            tensors = {key: t.detach().contiguous().clone() for key, t in module.state_dict().items()}
            save_file(tensors, folder / f"{name}.safetensors")
        now = current(state, self.method)
        keys = {key for p in now.pieces if p.stage == "act" for q in p.walk() for key in q.state}
        acting = {f"{key}/{name}": t for key in keys for name, t in tensors_of(state.pieces[f"/{key}"]).items()}
        if acting:
            save_file(acting, folder / f"{ACTING}.safetensors")
        made = {
            "method": self.request.method,
            "set": list(self.request.set),
            "environment": self.request.env,
            "turns": state.clock.turns,
            "decisions": state.clock.decisions,
            **described(self.method, self.environment),
        }
        (folder / ABOUT).write_text(json.dumps(made, indent=1) + "\n")

    def close(self) -> None:
        self.environment.close()
        self.exam.close()


LOOK_EVERY = 2048  # decisions: what a batch says of learning is read off it that often, however small the batches


def of_batch(step: Step, environment: Any) -> dict[str, float]:
    """What a turn's batch says of learning (`signals.measured`), and how widely the policy acted in it.

    `action_entropy` in nats for numbered actions, `action_width` = exp(H / d) for d real ones: the side of the cube
    that is as large as what they are drawn from, H = -mean log pi(a) as sampled. {} for batches of fewer than 64
    decisions, for replayed ones, and for all but one in 2048 decisions.
    """
    batch = step.batch
    if "advantage" not in batch or "mask" not in batch:
        return {}
    size, done = batch["mask"].numel(), step.state.clock.decisions
    if size < FEWEST or done // LOOK_EVERY == (done - size) // LOOK_EVERY:
        return {}
    made = measured(batch)
    if "logp_behavior" in batch:
        entropy = -batch["logp_behavior"][batch["mask"].bool()].double().mean()
        space = environment.action_space
        numbered = not batch["action"].is_floating_point()
        made["action_entropy" if numbered else "action_width"] = (
            entropy if numbered else (entropy / math.prod(space.shape)).exp()
        )
    return numbers(made)


def tensors_of(value: Any) -> dict[str, Tensor]:
    """The numbers and tensors of an object with `state_dict`, by name; numbers in float64."""
    if isinstance(value, Tensor) or not hasattr(value, "state_dict"):
        return {"value": torch.as_tensor(value)} if isinstance(value, Tensor | int | float) else {}
    tree = value.state_dict()
    return {
        name: v.clone() if isinstance(v, Tensor) else torch.tensor(v, dtype=torch.float64)
        for name, v in tree.items()
        if isinstance(v, Tensor | int | float)
    }


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def build_control(request: Request, method: Method) -> ControlExperiment:
    """The networks and the environments of a request. Raises a TrimtabError that says what cannot be had."""
    from trimtab.policies.networks import build_networks

    environment = GymEnvironment(checked(request, request.env), envs=request.envs or 1, seed=request.seed)
    start = read_start(request.policy) if request.policy else None
    models = build_networks(method, environment, request.seed, start=start)
    other = request.env if request.eval_env is None else checked(request, request.eval_env)
    exam = GymEnvironment(other, envs=min(request.problems, MOST_AT_ONCE), seed=HELD_OUT)
    for name in ("observation_space", "action_space"):
        mine, its = getattr(environment, name), getattr(exam, name)
        if mine.shape != its.shape or type(mine) is not type(its) or getattr(mine, "n", 0) != getattr(its, "n", 0):
            raise EnvironmentFailure(
                f"the policy is made for the {name} {mine} of {request.env}, and that of {other} is {its}; it can only "
                "be evaluated where they are alike"
            )
    return ControlExperiment(request, method, environment, models, exam, start)


def checked(request: Request, text: str) -> str:
    """An environment's specification; EnvironmentFailure when it is one of the language world."""
    kind = text.strip().partition(":")[0]
    if kind in KINDS or ".jsonl" in text:
        raise EnvironmentFailure(
            f"{request.method} is a control method and acts in Gymnasium environments such as 'Pendulum-v1'; {text!r} "
            f"is for language methods. {FORMS}"
        )
    return text
