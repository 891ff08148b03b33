"""What of a method TRL's loop can honour. Everything else is refused, by name, before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from trimtab.core.batch import Batch
from trimtab.core.closure import Closure
from trimtab.core.copies import frozen
from trimtab.core.errors import EnvironmentFailure, MethodError
from trimtab.core.kit import Kit
from trimtab.core.method import Method, show
from trimtab.core.piece import Piece, Schedule, piece
from trimtab.core.registry import Definition, parse
from trimtab.core.terms import SOURCES, fixed
from trimtab.methods.language.bases import reinforce
from trimtab.methods.language.capo import modelled
from trimtab.stages.collect import first_id, rollouts

COLUMNS = ("prompt", "prompt_mask", "action", "mask", "reward", "terminated", "truncated", "logp_behavior",
           "temperature", "group", "episode", "turn", "source", "age")  # fmt: skip

# Fields of GRPOConfig that the method decides, and what does it there.
_KL = "the method's KL to the reference, grpo(kl=..., kl_estimator=...)"
_ENTROPY = "an entropy term of the loss, method.then(entropy_bonus(coef=...))"
_OTHER_LOSS = "another surrogate: the list is `trimtab methods`"
DECIDED: dict[str, str] = {
    "loss_type": "the reduction of its surrogate, grpo(per=...), and the surrogate itself",
    "epsilon": "the bound of its surrogate, grpo(clip_low=..., clip_high=...)",
    "epsilon_high": "the bound of its surrogate, grpo(clip_high=...)",
    "delta": "the dual clip of its surrogate, grpo(dual=...)",
    "importance_sampling_level": "the ratio of its surrogate: gspo has one for each sequence",
    "scale_rewards": "its credit, grpo(scale=...)",
    "multi_objective_aggregation": "its credit, which is given the weighted sum of the rewards",
    "num_iterations": "its passes over a batch, grpo(passes=...)",
    "beta": _KL,
    "use_bias_correction_kl": _KL,
    "sync_ref_model": "the reference of its KL, which stays as it was at the start",
    "ref_model_mixup_alpha": "the reference of its KL, which stays as it was at the start",
    "ref_model_sync_steps": "the reference of its KL, which stays as it was at the start",
    "mask_truncated_completions": "what may learn: dapo(filter_truncated=True), or method.then(finished_only())",
    "top_entropy_quantile": "what may learn: d3s(tokens=...) keeps decisions of large |A| x entropy",
    "off_policy_mask_threshold": "what may learn: capo, or the masks of rec",
    "entropy_coef": _ENTROPY,
    "use_adaptive_entropy": _ENTROPY,
    **{f"entropy_{name}": _ENTROPY for name in ("coef_min", "coef_max", "coef_delta", "target")},
    **{f"sapo_temperature_{name}": _OTHER_LOSS for name in ("neg", "pos")},
    **{f"vespo_{name}": _OTHER_LOSS for name in ("k_pos", "lambda_pos", "k_neg", "lambda_neg")},
}
# Fields that change where or how a model runs, in ways that nobody has checked these gradients under.
UNVERIFIED = (
    "use_vllm", "use_liger_kernel", "use_transformers_continuous_batching", "deepspeed", "fsdp", "torch_compile",
    "parallelism_config",
)  # fmt: skip
# What TRL's generation is given instead of an option of collect.
GENERATION = {
    "group": "num_generations", "new_tokens": "max_completion_length", "temperature": "temperature", "top_k": "top_k",
    "top_p": "top_p",
}  # fmt: skip
PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": None, "repetition_penalty": 1.0,
         "generation_kwargs": None}  # fmt: skip
REFERENCE = {"reference": frozen("policy")}


def as_method(method: str | Method | Definition) -> Method:
    """A method from its expression, its definition, or itself."""
    if isinstance(method, str):
        return parse(method)
    return method() if isinstance(method, Definition) else method


@dataclass(frozen=True)
class TrainerRate(Schedule):
    """The learning rate of TRL's optimiser at this moment, for a piece that models the step (CAPO)."""

    initial: float
    trainer: Any = field(repr=False, compare=False)

    def __call__(self, clock: Any) -> float:
        return float(self.trainer._get_learning_rate())


@piece("update", slot="update", one_gradient=True)
def optimizer_of_trl(
    kit: Kit, closure: Closure, *, lr: float, betas: tuple[float, float], eps: float
) -> tuple[dict[str, Any], bool]:
    """TRL's own step; it is never called, and says what its pieces may know of that step."""
    raise MethodError("TRL makes the step of this method; run it with trimtab.run to have trimtab make it")


@piece("collect", writes=COLUMNS, state={"ids": first_id})
def generated_by_trl(kit: Kit, *, new_tokens: int, temperature: float) -> Batch:
    """The rows that TRL generated and scored; those that every reward function passed over are left out.

    The reward of a row is TRL's weighted sum, at its last decision. Raises EnvironmentFailure when none was scored.
    """
    made: Mapping[str, Any] = kit.environment
    mask, score = made["mask"], made["score"]
    n, ids = len(score), kit.state["ids"]
    kit.state["ids"] = {"group": ids["group"] + n // made["group"], "episode": ids["episode"] + n}
    if bool(score.isnan().all()):
        raise EnvironmentFailure("every reward function returned None or nan for every completion of this batch")
    at, device = mask.sum(1) - 1, mask.device
    last = torch.arange(mask.shape[1], device=device) == at[:, None]
    final = made["action"].gather(1, at.clamp_min(0)[:, None]).squeeze(1)
    ended = torch.isin(final, torch.tensor(made["ends"], device=device))
    number = torch.arange(n, device=device)
    columns = {
        **{name: made[name] for name in ("prompt", "prompt_mask", "action", "mask")},
        "reward": torch.where(last, score[:, None], 0.0),
        "terminated": ended,
        "truncated": ~ended,
        "temperature": torch.full((n,), temperature, device=device),
        "group": ids["group"] + number // made["group"],
        "episode": ids["episode"] + number,
        "turn": torch.zeros_like(number),
        "source": torch.full_like(number, SOURCES.index("policy")),
        "age": torch.zeros_like(number),
        **{name: made[name] for name in ("logp_old", "logp_ref", "logp_behavior") if name in made},
    }
    scored = ~score.isnan()
    kit.log("failures", (~scored).double().sum())
    batch = Batch(columns)
    return batch if bool(scored.all()) else batch.take(scored)


def fitted(method: Method, args: Any, trainer: Any) -> Method:
    """The same method with TRL's generation as its collect and TRL's optimiser as its update.

    Raises MethodError, naming the option and the method, for what TRL's loop cannot honour: of either side.
    """
    _config(method, args)
    _tracks(method)
    _copies(method)
    _collect(method, args)
    _update(method)
    _rows(method, args)
    given = set()
    if several(method, args):
        given.add("logp_old")
    if method.copies:
        given.add("logp_ref")
    pieces = tuple(p for p in method.pieces if p.stage != "collect" and p.slot not in given)
    left_out = {p.slot for p in method.pieces} & given  # these columns are TRL's; others nobody asked for
    source = generated_by_trl(new_tokens=args.max_completion_length, temperature=args.temperature)
    (track,) = method.tracks
    step = optimizer_of_trl(lr=TrainerRate(args.learning_rate, trainer), betas=(args.adam_beta1, args.adam_beta2),
                            eps=args.adam_epsilon)  # fmt: skip
    kind = str(getattr(args.optim, "value", args.optim))
    step = replace(step, name="adamw" if kind.startswith("adamw") else kind)
    for p in (q for q in track.pieces if q.name == "trust_region"):
        modelled(step, p.options["optimizer"])  # says if it cannot model that optimiser
    return replace(
        method,
        pieces=(replace(source, writes=source.writes | left_out), *pieces),
        tracks=(replace(track, update=step),),
        copies={},
    )


def several(method: Method, args: Any) -> bool:
    """Whether a generation batch serves more than one update."""
    return bool(method.passes > 1 or args.steps_per_generation != args.gradient_accumulation_steps)


def needs_behavior(method: Method) -> bool:
    """Whether a piece reads the sampler's log-probabilities for more than the surrogate's metric."""
    places = [*method.pieces, *(p for t in method.tracks for p in t.pieces)]
    return any("logp_behavior" in q.reads for p in places if p.stage != "collect" for q in p.walk()
               if q.name != "surrogate")  # fmt: skip


# -- refusals ----------------------------------------------------------------------------------------------------


def _config(method: Method, args: Any) -> None:
    default = {f.name: f.default for f in fields(args)}
    for name, instead in DECIDED.items():
        value = getattr(args, name)
        if value != default[name]:
            raise MethodError(
                f"GRPOConfig({name}={value!r}) was given, but that is decided by the method {method.name}: by "
                f"{instead}. Leave {name} out of GRPOConfig."
            )
    for name in UNVERIFIED:
        value = getattr(args, name)
        if value and value != default[name]:
            raise MethodError(
                f"GRPOConfig({name}={value!r}) was given, and {method.name} inside TRL has not been checked under it. "
                f"Leave {name} out."
            )
    if args.world_size > 1:
        raise MethodError(
            f"{method.name} inside TRL runs in one process, and this is one of {args.world_size}: its credit and its "
            f"denominators would see the rows of one process only. Launch a single process."
        )


def _tracks(method: Method) -> None:
    name = method.name
    if method.phases:
        raise MethodError(
            f"{name} runs in phases {[p.name for p in method.phases]}, and TRL's loop has one. Run it with trimtab.run."
        )
    if method.networks:
        raise MethodError(f"{name} is a method for environments, and TRL trains language models. Run it with trimtab.")
    if len(method.tracks) != 1:
        raise MethodError(
            f"{name} has the tracks {[t.name for t in method.tracks]}, and TRL trains one model with one optimiser. "
            f"Run it with trimtab.run."
        )
    (track,) = method.tracks
    if track.every != 1 or track.on != "update":
        raise MethodError(
            f"track {track.name!r} of {name} runs every {track.every} on {track.on!r}; TRL steps on each update. "
            f"Run it with trimtab.run."
        )
    for p in (*method.pieces, *track.pieces):
        if p.stage in ("act", "probe") or p.slot == "sampler_mismatch":
            doing = {"act": "TRL generates with the model as it is", "probe": "TRL measures with its eval_dataset"}
            raise MethodError(
                f"{name} has the {p.stage} piece {p.name}, and "
                f"{doing.get(p.stage, 'TRL does not report its sampler')}. Leave it out, or run it with trimtab.run."
            )
    for p in track.of("loss"):
        if p.core.options["unit"] != "row":
            raise MethodError(
                f"{p.name} of {name} needs each {p.core.options['unit']} whole, and TRL cuts a batch between any two "
                f"rows. Run it with trimtab.run."
            )


def _copies(method: Method) -> None:
    for name, rule in method.copies.items():
        if REFERENCE.get(name) != rule:
            raise MethodError(
                f"{method.name} keeps the copy {name!r}, {rule}, and TRL keeps none but a reference that stays as it "
                f"was. Run it with trimtab.run."
            )


def _collect(method: Method, args: Any) -> None:
    (collect,) = [p for p in method.pieces if p.stage == "collect"]
    plain, name = rollouts(), method.name
    for p in collect.walk():
        if p.stage == "collect" and p is not collect.core and not _idle(p):
            raise MethodError(
                f"{name} changes how experience is collected ({p.name}), and in TRL's loop TRL collects. "
                + ("Switch it off: dapo(batches=0), or dapo(preset='trl')." if p.name == "dynamic_sampling" else
                   "Run it with trimtab.run.")
            )  # fmt: skip
    if collect.core.name != plain.name:
        raise MethodError(
            f"{name} collects by {collect.core.name}, and in TRL's loop the rows are completions that TRL generates. "
            f"Run it with trimtab.run."
        )
    for option, value in collect.core.options.items():
        field_name = GENERATION.get(option)
        if show(value) == show(plain.options[option]) or (field_name and value == getattr(args, field_name)):
            continue
        instead = f"GRPOConfig({field_name}=...)" if field_name else "its data set and batch sizes"
        raise MethodError(
            f"{name} has collect.{option}={show(value)}, and in TRL's loop that is decided by {instead}. "
            f"Leave collect.{option} out of the method."
        )
    for p in method.tracks[0].of("loss"):
        per = p.core.options["per"]
        if isinstance(per, fixed) and per.length == collect.core.options["new_tokens"] != args.max_completion_length:
            raise MethodError(
                f"{p.name} of {name} is divided by {per.length:g} decisions a row, the longest response of trimtab's "
                f"own collect, and TRL's is max_completion_length={args.max_completion_length}. Say which is meant: "
                f"dr_grpo(length={args.max_completion_length})."
            )
    if needs_behavior(method):
        for option, value in PLAIN.items():
            if option != "temperature" and getattr(args, option) not in (value, {}):
                raise MethodError(
                    f"GRPOConfig({option}={getattr(args, option)!r}) changes what completions are drawn from, and "
                    f"{name} reads the sampler's log-probabilities, which TRL does not report. Leave {option} out."
                )


def _idle(p: Piece) -> bool:
    """A wrap of collect that is switched off."""
    return p.name == "dynamic_sampling" and p.options["batches"] == 0


def _update(method: Method) -> None:
    update, plain = method.tracks[0].update, reinforce().tracks[0].update
    mine, default = update.flatten("update"), plain.flatten("update")
    for path in (*mine, *default):
        if show(mine.get(path)) != show(default.get(path)):
            given = f"{path}={show(mine[path])}" if path in mine else f"no {path}"
            raise MethodError(
                f"{method.name} has {given}, and in TRL's loop the optimiser is TRL's. Leave it out, and "
                f"give GRPOConfig learning_rate, lr_scheduler_type, max_grad_norm and optim."
            )


def _rows(method: Method, args: Any) -> None:
    size, steps = args.gradient_accumulation_steps, args.steps_per_generation
    rows, name = args.per_device_train_batch_size * size, method.name
    if steps % size:
        raise MethodError(
            f"gradient_accumulation_steps={size} does not divide steps_per_generation={steps}, so an update would mix "
            f"rows of two batches of {name}. Give steps_per_generation={size} or a multiple of it."
        )
    if method.rows is None and steps != size:
        raise MethodError(
            f"{name} makes one update of a whole batch (rows=None), and GRPOConfig makes {steps // size} of "
            f"{rows} rows. Give the method rows={rows}, as in grpo(rows={rows}), or leave steps_per_generation out."
        )
    if method.rows is not None and method.rows != rows:
        raise MethodError(
            f"{name} has rows={method.rows} for each update, and GRPOConfig makes it of per_device_train_batch_size x "
            f"gradient_accumulation_steps = {rows}. Give one of them the other's number."
        )
