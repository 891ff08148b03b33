"""A tiny language model in TRL's loop, and the same rows put through trimtab's own loop."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback
from trl import GRPOConfig

from trimtab.core.batch import Batch
from trimtab.core.closure import Closure
from trimtab.core.copies import frozen
from trimtab.core.kit import Kit
from trimtab.core.loop import begin, collected, scoped
from trimtab.core.method import Method
from trimtab.core.piece import piece
from trimtab.core.registry import parse
from trimtab.integrations.trl import GRPOTrainer
from trimtab.integrations.trl_method import COLUMNS
from trimtab.policies.builtin import load_policy

ROWS, GROUP, LONGEST, LR = 8, 4, 6, 0.02


def coin(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """Half of all answers are right, some more than others: the sum of their letters."""
    return [float(sum(map(ord, text)) % 3) / 2 for text in completions]


def config(folder: Path, accumulate: int = 1, **more: Any) -> GRPOConfig:
    """One generation batch of eight rows, on a CPU in full precision."""
    plain = {
        "output_dir": str(folder), "per_device_train_batch_size": ROWS // accumulate, "num_generations": GROUP,
        "gradient_accumulation_steps": accumulate, "max_completion_length": LONGEST, "max_steps": 1,
        "learning_rate": LR, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "use_cpu": True, "bf16": False,
        "report_to": [], "save_strategy": "no", "seed": 3, "disable_tqdm": True, "logging_steps": 1,
        "gradient_checkpointing": False,
    }  # fmt: skip
    return GRPOConfig(**{**plain, **more})


@dataclass
class Record(TrainerCallback):
    """The parameters and gradients before each step, and the numbers that were logged."""

    trainer: Any = None
    starts: list[dict[str, Tensor]] = field(default_factory=list)
    grads: list[dict[str, Tensor]] = field(default_factory=list)
    logs: list[dict[str, Any]] = field(default_factory=list)

    def on_pre_optimizer_step(self, *args: Any, **more: Any) -> None:
        named = dict(self.trainer.model.named_parameters())
        self.starts.append({n: p.detach().clone() for n, p in named.items()})
        self.grads.append({n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named.items()})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        self.logs.append(dict(logs))


def questions() -> Dataset:
    return Dataset.from_dict({"prompt": [f"{i}+{i * 7 % 12}=" for i in range(12)]})


def trainer_of(method: str | Method, folder: Path, args: GRPOConfig, kind: Any = GRPOTrainer, **more: Any) -> Any:
    """A trainer of the tiny model in float64, its files in `folder`, and a record of what it does."""
    policy = load_policy("nano", dtype="float64")
    policy.model.save_pretrained(folder / "start")
    ends = range(1, len(policy.tokenizer), 5)  # every fifth letter ends an answer, so that lengths differ
    policy.model.generation_config.eos_token_id = list(ends)
    policy.model.config._name_or_path = str(folder / "start")
    record = Record()
    given = {"method": method} if kind is GRPOTrainer else {}
    more = {"model": policy.model, "reward_funcs": coin, "train_dataset": questions(), **more}
    trainer = kind(args=args, processing_class=policy.tokenizer, callbacks=[record], **given, **more)
    record.trainer = trainer
    return trainer


def record_of(trainer: Any) -> Record:
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, Record))


def keeping_batches(trainer: Any) -> list[dict[str, Tensor]]:
    """The columns of every generation batch from now on, before TRL shuffles them."""
    inner, kept = trainer._generate_and_score_completions, []

    def generate(inputs: Any) -> dict[str, Tensor]:
        made = inner(inputs)
        kept.append(dict(made))
        return made

    trainer._generate_and_score_completions = generate
    return kept


@piece("collect", writes=(*COLUMNS, "logp_old"))
def recorded(kit: Kit, *, new_tokens: int = LONGEST) -> Batch:
    """The rows that TRL generated."""
    return kit.environment


def ours(method: str, rows: dict[str, Tensor], start: dict[str, Tensor], *, credited: bool, lr: float = LR) -> Any:
    """The gradient that trimtab's own loop takes on these rows at these parameters, by its own policy.

    credited: the rows have been through the batch-scope pieces; otherwise those of trimtab's loop are run.
    """
    policy = load_policy("nano", dtype="float64")
    policy.model.load_state_dict(start, strict=False)
    made = parse(method)
    (track,) = made.tracks
    track = replace(track, update=track.update.assign(["lr"], lr))
    pieces = (recorded(), *(p for p in made.pieces if p.stage != "collect"))
    made = replace(made, pieces=pieces, tracks=(track,), explicit=(), copies={n: frozen("policy") for n in made.copies})
    batch = Batch({n: c for n, c in rows.items() if n != "scored"})
    if not credited:
        batch = Batch({n: c for n, c in batch.columns.items() if n in COLUMNS})
    state = begin(made, batch, {"policy": policy}, seed=3)
    state.clock.budget = {"updates": 1}
    kit = Kit(state, made, None, False)
    if not credited:
        batch = collected(kit)
    batch = scoped(kit, batch, made.pieces, "policy")
    kit.scope, kit.model = track.name, track.trains
    batch = scoped(kit, batch, track.pieces, track.trains)
    gradient = Closure(kit, track, batch)()
    return replace(gradient, grads={n.removeprefix("model."): g for n, g in gradient.grads.items()}), kit.drain()


def far(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference, relative to the longest gradient."""
    most = max(float(g.abs().max()) for g in b.values())
    assert set(a) == set(b)
    return max(float((a[n] - b[n]).abs().max()) for n in b) / most
