"""A run of the language world: a language policy, an environment that asks and scores, held-out problems."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trimtab.core.batch import Batch
from trimtab.core.errors import EnvironmentFailure, MethodError
from trimtab.core.loop import Step, begin
from trimtab.core.method import Method
from trimtab.core.state import State
from trimtab.core.terms import rows_of
from trimtab.environments.spec import FORMS
from trimtab.evaluation import Evaluation, answer_length
from trimtab.report.intervals import mean_interval
from trimtab.runs.request import Request
from trimtab.stages.signals import measured, numbers


@dataclass
class LanguageExperiment:
    """exam: the environment that the policy is evaluated on; the training one unless another was asked for."""

    request: Request
    method: Method
    environment: Any
    policy: Any
    exam: Any

    @property
    def models(self) -> dict[str, nn.Module]:
        return {"policy": self.policy}

    @property
    def numbers(self) -> torch.dtype:
        return torch.bfloat16 if self.policy.autocast else self.policy.wide

    @property
    def device(self) -> torch.device:
        device: torch.device = self.policy.device
        return device

    def begin(self) -> State:
        return begin(self.method, self.environment, self.models, seed=self.request.seed)

    def notes(self) -> list[str]:
        return []

    def keep(self, folder: Path) -> None:
        """A policy is read from where it was read before."""

    def evaluate(self, state: State | None = None) -> Evaluation:
        """The policy of a state, or the one that was built, on held-out problems."""
        policy = self.policy if state is None else state.models["policy"]
        return self.request.evaluator(self.exam, answer_length(self.method))(policy)

    def describe(self) -> dict[str, Any]:
        import transformers

        return {
            "policy": self.policy.describe(),
            "environment": self.environment.describe(),
            "versions": {"transformers": transformers.__version__},
        }

    def measured(self, step: Step) -> dict[str, float]:
        return {**of_batch(step.batch, step.logs), **numbers(measured(step.batch)), **step.logs}

    def sample(self, step: Step) -> Iterator[Mapping[str, Any]]:
        return group_sample(self.policy, step)

    def export(self, folder: Path, state: State) -> None:
        self.policy.save(folder)

    def close(self) -> None:
        self.environment.close()
        self.exam.close()


def build_language(request: Request, method: Method) -> LanguageExperiment:
    """The policy and the environment of a request. Raises a TrimtabError that says what cannot be had and what can."""
    from transformers.utils import logging as quiet

    from trimtab.environments.text import load_environment
    from trimtab.policies.builtin import load_policy

    if not request.policy:
        raise MethodError(
            f"{request.method} trains a language policy that it is given: add --policy smollm2, tiny, nano, a Hugging "
            "Face id, or a model folder"
        )
    for text in (request.env, request.eval_env or ""):
        if re.search(r"-v\d+(\(|$)", text.strip()) and ".jsonl" not in text and ":" not in text:
            raise EnvironmentFailure(
                f"{request.method} is a language method, and {text!r} looks like a Gymnasium id, in which a control "
                f"method acts (trimtab methods lists them). {FORMS}"
            )
    quiet.disable_progress_bar()
    rules: dict[str, Any] = {"seed": request.seed, "reward": request.reward, "prompt": request.prompt}
    environment = load_environment(request.env, **rules)
    exam = environment if request.eval_env is None else load_environment(request.eval_env, **rules)
    policy = load_policy(
        request.policy, lora=request.lora, dtype=request.dtype, chat=request.chat, seed=request.seed,
        checkpointing=request.checkpointing,
    )  # fmt: skip
    return LanguageExperiment(request, method, environment, policy, exam)


def of_batch(batch: Batch, logs: Mapping[str, float]) -> dict[str, float]:
    """Numbers read off a turn's batch: the reward with its interval, and the mean age.

    A collect that dropped rows (dynamic sampling) has logged the reward of all it made; what is left has another mean,
    and no interval is given then.
    """
    made: dict[str, float] = {}
    played = rows_of(batch, "policy")  # demonstrations and replayed rows are not this policy's outcome
    if "reward" in batch and bool(played.any()):
        mean, low, high = mean_interval(batch.score()[played].tolist())
        made["reward"] = mean
        if abs(mean - logs.get("reward", mean)) < 1e-4:
            made |= {"reward_low": low, "reward_high": high}
    if "age" in batch:
        made["age"] = float(batch.age.double().mean())
    return made


def group_sample(policy: Any, step: Step) -> Iterator[Mapping[str, Any]]:
    """One group of a batch as transcripts, each token with its credit: the first whose credit is not all zero."""
    batch = step.batch
    if "group" not in batch or "advantage" not in batch:
        return
    taught = (batch.advantage * batch.mask != 0).any(1).nonzero().squeeze(1)
    first = batch.group[int(taught[0]) if len(taught) else 0]
    for i in (batch.group == first).nonzero().squeeze(1).tolist():
        mask = batch.mask[i].bool()
        yield {
            "turn": step.turn,
            "group": int(batch.group[i]),
            "prompt": batch.question[i],
            "response": batch.response[i],
            "reward": float(batch.score()[i]),
            "advantage": float(batch.advantage[i][mask].mean()),
            "tokens": [policy.decode([t]) for t in batch.action[i][mask].tolist()],
            "credit": batch.advantage[i][mask].tolist(),
        }
