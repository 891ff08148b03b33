"""A trimtab method inside TRL's GRPO loop: TRL generates, scores and steps; credit, select and loss are the method's.

from trimtab.integrations.trl import GRPOTrainer
trainer = GRPOTrainer(model="...", method="d3s+bapo", reward_funcs=..., args=GRPOConfig(...), train_dataset=...)
trainer.train()

The pieces that run are those of `trimtab.run`, on the same columns and with the same weights: a gradient does not
depend on `gradient_accumulation_steps`. docs/trl.md has what is honoured and what is refused.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import trl
from torch import Tensor, nn
from trl.models.utils import disable_gradient_checkpointing

from trimtab.core.batch import Batch
from trimtab.core.check import check
from trimtab.core.errors import MethodError, NonFiniteError
from trimtab.core.kit import Kit
from trimtab.core.loop import collected, make_state
from trimtab.core.method import Method
from trimtab.core.registry import Definition
from trimtab.core.state import State, load, save
from trimtab.integrations.outer import Update
from trimtab.integrations.trl_method import as_method, fitted, needs_behavior, several
from trimtab.policies.language import _last_logits
from trimtab.policies.readout import top

KNOWN = "1.16"  # what is overridden here is private to TRL, so another version may mean something else by it
STATE = "trimtab"  # the folder beside TRL's files in a checkpoint


class PolicyOfTrainer:
    """The model that TRL trains, read through TRL's own forward: `evaluate(batch, want)` is that of a policy.

    Log-probabilities and entropies are of TRL's temperature. It has no state of its own: TRL saves the model.
    """

    provides = frozenset({"logp", "entropy", "hidden", "topk", "topk_ids"})

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def parameters(self) -> Iterator[nn.Parameter]:
        parameters: Iterator[nn.Parameter] = self.trainer.model.parameters()
        return parameters

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        named: Iterator[tuple[str, nn.Parameter]] = self.trainer.model.named_parameters()
        return named

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to load."""

    def evaluate(self, batch: Batch, want: set[str] | frozenset[str]) -> dict[str, Tensor]:
        """logp, entropy `[N, T]`, hidden `[N, T, H]`, topk, topk_ids `[N, T, K]`; 0 where mask is 0."""
        model, mask = self.trainer.model, batch["mask"].bool()
        ids = torch.cat([batch["prompt"], batch["action"]], 1)
        attend = torch.cat([batch["prompt_mask"], mask], 1).long()
        found: dict[str, Tensor] = {}
        quiet = contextlib.nullcontext() if torch.is_grad_enabled() else disable_gradient_checkpointing(
            model, self.trainer.args.gradient_checkpointing_kwargs
        )  # fmt: skip
        with quiet:
            if want & {"logp", "entropy"}:
                logp, entropy, _ = self.trainer._get_per_token_logps_and_entropies(
                    model, ids, attend, mask.shape[1], compute_entropy="entropy" in want
                )
                found |= {"logp": logp, **({} if entropy is None else {"entropy": entropy})}
            if want - {"logp", "entropy"}:
                found |= self._inside(model, ids, attend, batch)
        return {n: torch.where(mask if v.dim() == 2 else mask[..., None], v, 0) for n, v in found.items() if n in want}

    def _inside(self, model: Any, ids: Tensor, attend: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The states that decisions are read from, and the most probable tokens."""
        mask, t = batch["mask"].bool(), batch["mask"].shape[1]
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        with self.trainer.accelerator.autocast():
            made = model(
                input_ids=ids, attention_mask=attend, output_hidden_states=True, **_last_logits(base, t + 1)
            )  # fmt: skip
        wide = torch.float64 if made.logits.dtype == torch.float64 else torch.float32
        scale = (1 / batch["temperature"].to(wide))[:, None].expand(mask.shape)[mask]
        values, tokens = top(lambda x: x, made.logits[:, -t - 1 : -1][mask], scale, wide)
        shape = (*mask.shape, values.shape[1])
        return {
            "hidden": made.hidden_states[-1][:, -t - 1 : -1].to(wide),
            "topk": values.new_zeros(shape).masked_scatter(mask[..., None], values),
            "topk_ids": tokens.new_zeros(shape).masked_scatter(mask[..., None], tokens),
        }


class GRPOTrainer(trl.GRPOTrainer):
    """TRL's GRPOTrainer with a trimtab method in the place of TRL's advantages and loss.

    method: an expression ("d3s+bapo(target=0.5)"), a definition or a `Method`; its reduction is over the rows of an
    update, per_device_train_batch_size x gradient_accumulation_steps. Everything else is TRL's.
    Raises MethodError when something that was given, to the method or to GRPOConfig, would not be honoured.
    """

    model: Any
    args: Any
    _logs: Any
    _buffered_inputs: Any
    _tag_names = ["trl", "trimtab"]  # noqa: RUF012  as TRL has it
    _paper: dict[str, str] = {}  # noqa: RUF012  TRL would cite GRPO's

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: trl.GRPOConfig | None = None,
        train_dataset: Any = None,
        *,
        method: str | Method | Definition,
        **more: Any,
    ) -> None:
        args = copy.copy(args) if args is not None else trl.GRPOConfig()
        wanted = as_method(method)
        _supported(wanted, model, more)
        self.method = fitted(wanted, args, self)
        self._name = f"trimtab's {wanted.name}"
        self._several = several(wanted, args)
        policy: Any = PolicyOfTrainer(self)
        check(self.method, {"policy": policy})
        self._behavior = needs_behavior(wanted)
        args.num_iterations = wanted.passes
        args.beta = 1.0 if wanted.copies else 0.0  # for TRL: whether there is a reference; the method weighs it
        super().__init__(model, reward_funcs, args, train_dataset, **more)
        if self._is_vlm or self.aux_loss_enabled:
            what = "images" if self._is_vlm else "a router with a loss of its own (router_aux_loss_coef)"
            raise MethodError(f"this model has {what}, which {wanted.name} inside TRL does not carry. Use a plain one.")
        if self.ref_model is not None:  # TRL reads it from files again; a model that was given may differ from them
            self.ref_model.load_state_dict(self.model.state_dict())
        self._tree = State(args.seed, self.method.fingerprint(), self.method.name, {"policy": policy}, {}, None)
        make_state(self._tree, self.method)
        self._kits: dict[str, Kit] = {}  # of the batch that is trained on, and of the one that is evaluated
        self._update: Update | None = None

    # -- a batch ------------------------------------------------------------------------------------------------
    def _calculate_rewards(self, *args: Any) -> Tensor:
        rewards: Tensor = super()._calculate_rewards(*args)
        weighed = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
        self._score = torch.where(rewards.isnan().all(1), float("nan"), weighed)
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        """TRL generates and scores; the method's batch-scope pieces run; the columns are what TRL shuffles and cuts."""
        made = super()._generate_and_score_completions(inputs)
        mode = "train" if self.model.training else "eval"
        kit = self._kits[mode] = self._kit(mode)
        kit.environment = self._columns(made, mode)
        scored = ~self._score.isnan()
        batch = collected(kit)
        if len(batch) != int(scored.sum()):
            raise MethodError(
                f"{self.method.name} changed the number of rows from {int(scored.sum())} to {len(batch)}, and TRL cuts "
                f"the rows that it generated. Run it with trimtab.run."
            )
        mine = batch.guarded(None)
        row = (mine["advantage"] * mine["mask"]).sum(1) / mine["mask"].sum(1).clamp_min(1)
        self._show(torch.zeros(len(scored), dtype=row.dtype, device=row.device).masked_scatter(scored, row))
        if mode == "train":
            self._pending = (len(batch), kit.decisions(batch))
        spare = torch.zeros(len(scored) - len(batch), dtype=torch.long, device=scored.device)  # nobody reads these rows
        whole = batch.put(scored=torch.ones(len(batch), dtype=torch.bool, device=scored.device))
        if len(spare):
            whole = Batch.cat([whole, whole.take(spare).put(scored=torch.zeros_like(spare, dtype=torch.bool))])
        return {name: column for name, column in whole.columns.items() if isinstance(column, Tensor)}

    def _columns(self, made: Mapping[str, Any], mode: str) -> dict[str, Any]:
        """What `generated_by_trl` reads, from TRL's names."""
        columns = {
            "prompt": made["prompt_ids"],
            "prompt_mask": made["prompt_mask"].bool(),
            "action": made["completion_ids"],
            "mask": made["completion_mask"].bool(),
            "score": self._score,
            "group": self.num_generations if mode == "train" else self.num_generations_eval,
            "ends": [*self.eos_token_ids, self._tokenizer.pad_token_id],
        }
        source = next(p for p in self.method.pieces if p.stage == "collect")
        for ours, theirs in (("logp_old", "old_per_token_logps"), ("logp_ref", "ref_per_token_logps")):
            if ours in source.writes:
                columns[ours] = torch.where(columns["mask"], made[theirs], 0)
        if self._behavior:  # TRL samples from the model itself, so this is what its sampler would report
            old = made.get("old_per_token_logps")
            if old is None:
                rows = Batch({name: columns[name] for name in ("prompt", "prompt_mask", "action", "mask")})
                old = self._kits[mode].evaluate("policy", rows, {"logp"})["logp"]
            columns["logp_behavior"] = torch.where(columns["mask"], old, 0)
        return columns

    def _kit(self, mode: str) -> Kit:
        """Of the next batch; an evaluation's leaves no trace in the run's state."""
        tree = self._tree
        tree.clock.budget = {"updates": self.state.max_steps}
        if mode == "eval":
            tree = replace(tree, clock=copy.copy(tree.clock), pieces=copy.deepcopy(tree.pieces), streams={})
        return Kit(tree, self.method, self.args.per_device_train_batch_size, False)

    def _show(self, advantages: Tensor) -> None:
        """The method's advantages, in TRL's table of completions, in the place of TRL's."""
        held = self._logs["advantages"]
        for _ in range(min(len(held), len(advantages))):
            held.pop()
        held.extend(advantages.tolist())

    # -- an update ----------------------------------------------------------------------------------------------
    def _compute_loss(self, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """The share of these rows in the loss of their update; TRL adds up the gradients."""
        if not self.model.training:
            update = Update(self._kits["eval"], [inputs])
            loss = update.loss(0)
            self._report("eval", update)
            return loss
        size = self.args.gradient_accumulation_steps
        if self.current_gradient_accumulation_steps != size:
            raise MethodError(
                f"TRL makes an update of {self.current_gradient_accumulation_steps} parts where "
                f"gradient_accumulation_steps is {size}; the reduction would be over rows that it does not see"
            )
        place = self._step % size
        if place == 0:
            first = self._step % self.args.steps_per_generation
            self._update = Update(self._kits["train"], self._buffered_inputs[first : first + size])
        assert self._update is not None
        return self._update.loss(place)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self._step % self.args.gradient_accumulation_steps == 0:
            self._finish()
        return loss

    def _finish(self) -> None:
        """After the last part's backward, before the step."""
        assert self._update is not None
        if self.accelerator.scaler is None:  # in float16 the scaler skips steps whose gradient overflows
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            if not bool(torch.isfinite(nn.utils.get_total_norm(grads))):
                raise NonFiniteError(
                    f"the gradient of {self.method.name} is not finite at update {self._tree.clock.updates}; no "
                    f"parameter was changed. A learning rate that is too large gives this: lower it."
                )
        self._report("train", self._update)
        self._update = None
        clock = self._tree.clock
        clock.updates += 1
        if self._step % (self.args.steps_per_generation * self.num_iterations) == 0:
            clock.turns += 1
            clock.rows += self._pending[0]
            clock.decisions += self._pending[1]

    def _report(self, mode: str, update: Update) -> None:
        for name, value in update.logs().items():
            if name != "sampler_gap":  # TRL's sampler reports nothing to compare
                self._metrics[mode][name].append(value)

    # -- files --------------------------------------------------------------------------------------------------
    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}" / STATE
            save(self._tree, folder, keep=1)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load(self._tree, Path(checkpoint) / STATE)


def _supported(method: Method, model: Any, more: Mapping[str, Any]) -> None:
    """Refuse what can be told before TRL is asked."""
    if not trl.__version__.startswith(f"{KNOWN}."):
        raise MethodError(
            f"trl {trl.__version__} is installed, and a method inside TRL has been checked with {KNOWN} alone, whose "
            f"private functions it replaces. Install it: pip install 'trl=={KNOWN}.*'."
        )
    for name in ("tools", "rollout_func", "environment_factory"):
        if more.get(name):
            raise MethodError(
                f"GRPOTrainer was given {name}, and {method.name} inside TRL has been checked with single answers "
                f"alone. Leave {name} out."
            )
    if more.get("optimizers", (None, None))[0] is not None and any(
        p.name == "trust_region" for t in method.tracks for p in t.pieces
    ):
        raise MethodError(
            f"{method.name} models the optimiser's step, and GRPOTrainer was given an optimizer of your own, whose "
            f"settings it does not know. Name one with GRPOConfig(optim=..., learning_rate=...)."
        )
    instance = not isinstance(model, str) and more.get("peft_config") is None and not hasattr(model, "peft_config")
    if method.copies and instance and not getattr(model.config, "_name_or_path", ""):
        raise MethodError(
            f"{method.name} has a KL to a reference, which TRL loads from the model's folder, and this model has none. "
            f"Save it first and give its folder, or leave the KL out."
        )
