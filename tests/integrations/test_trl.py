"""A method inside TRL's loop has the gradient that it has in trimtab's, and what TRL would not honour is refused."""

from __future__ import annotations

import gc
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from transformers.utils import logging as transformers_logging

from tests.integrations.trl_world import (
    GROUP,
    LONGEST,
    ROWS,
    coin,
    config,
    far,
    keeping_batches,
    ours,
    questions,
    record_of,
    trainer_of,
)
from trimtab.core.batch import Batch
from trimtab.core.errors import CheckpointError, EnvironmentFailure, MethodError, NonFiniteError
from trimtab.core.registry import find, parse
from trimtab.integrations.trl import GRPOTrainer
from trimtab.policies.builtin import load_policy
from trimtab.stages.annotate import sampler_mismatch
from trimtab.stages.probe import held_out

FLOAT32 = 3e-6  # TRL reads log-probabilities in float32 whatever the model is


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> Any:
    """Every run collects garbage: a second each, spent on what the imports have left."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Any:
    torch.set_num_threads(1)
    monkeypatch.setenv("CI", "1")  # TRL tells its makers of every trainer elsewhere
    transformers_logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
    transformers_logging.enable_progress_bar()


METHODS = (
    "reinforce", "grpo", "grpo(per='row',kl=0.1)", f"dr_grpo(length={LONGEST})", "dapo(preset='trl',penalty=1.0)",
    "dapo(batches=0,filter_truncated=True)", "bnpo", "bapo", "gspo", "gpg", "rloo", "rloo(preset='trl')",
    "rec(weight='ratio')", "d3s(share=0.5,tokens=0.5)+bapo", "d3s(preset='d1s')+gspo", "capo(fisher=0.1,hessian=1.0)",
)  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_of_a_batch_is_that_of_our_own_loop(method: str, tmp_path: Path) -> None:
    trainer = trainer_of(method, tmp_path, config(tmp_path, 2, temperature=0.8))
    kept = keeping_batches(trainer)
    trainer.train()
    record = record_of(trainer)
    mine, logged = ours(method, kept[0], record.starts[0], credited=False)
    assert float(mine.norm) > 1e-3
    assert far(record.grads[0], mine.grads) < FLOAT32
    shown = record.logs[0]
    for name, value in {**logged, **{n: float(v) for n, v in mine.terms.items()}}.items():
        if name != "sampler_gap":  # TRL's sampler reports nothing
            assert shown[name] == pytest.approx(value, abs=1e-5), name
    assert shown["loss"] == pytest.approx(float(mine.loss), abs=1e-5)


STALE = (
    "grpo(rows=4,passes=2)", "grpo(rows=4,passes=2,kl=0.1)", "bapo+grpo(rows=4,passes=2)",
    "gspo+grpo(rows=4,passes=2)", "rec(mask='ring')+grpo(rows=4,passes=2)",
    "d3s(preset='d1s_cross')+bapo+grpo(rows=4,passes=2)", "rloo(preset='trl',rows=4,passes=2)",
)  # fmt: skip


@pytest.mark.parametrize("method", STALE)
def test_later_updates_of_a_batch_keep_its_old_policy(method: str, tmp_path: Path) -> None:
    rate = 1e-5 if "gspo" in method else 4e-3  # so that some ratios are out of their bounds, and not all
    args = config(tmp_path, 2, per_device_train_batch_size=2, steps_per_generation=4, max_steps=4, learning_rate=rate)
    trainer = trainer_of(method, tmp_path, args)
    kept = keeping_batches(trainer)
    trainer.train()
    assert len(kept) == 1
    record, slices = record_of(trainer), trainer._buffered_inputs
    rows = {name: torch.cat([slices[2][name], slices[3][name]]) for name in slices[0]}
    mine, _ = ours(method, rows, record.starts[3], credited=True)
    assert record.logs[3]["clip_high"] + record.logs[3]["clip_low"] > 0 or "bapo" in method
    assert float(mine.norm) > 1e-3
    assert far(record.grads[3], mine.grads) < FLOAT32
    assert trainer._tree.clock.counts() == {
        "turns": 1, "updates": 4, "rows": ROWS, "decisions": int(kept[0]["mask"].sum())
    }  # fmt: skip


def test_each_column_of_log_probabilities_is_of_its_own_policy(tmp_path: Path) -> None:
    """In the second batch the reference, the old policy and the one that is trained are three."""
    args = config(tmp_path, 2, per_device_train_batch_size=2, steps_per_generation=4, max_steps=4, learning_rate=4e-3)
    trainer = trainer_of("bapo+grpo(rows=4,kl=0.1)", tmp_path, args)
    kept = keeping_batches(trainer)
    trainer.train()
    starts, rows = record_of(trainer).starts, Batch(kept[1])
    for name, start in (("logp_ref", starts[0]), ("logp_old", starts[2]), ("logp_behavior", starts[2])):
        policy = load_policy("nano", dtype="float64")
        policy.model.load_state_dict(start, strict=False)
        with torch.no_grad():
            assert float((rows[name] - policy.evaluate(rows, {"logp"})["logp"]).abs().max()) < 1e-5, name
    assert float((rows.logp_ref - rows.logp_old).abs().max()) > 1e-2


@pytest.mark.parametrize(
    "method",
    ["grpo", "grpo(per='row')", f"dr_grpo(length={LONGEST})", "gspo", "bapo", "d3s(share=0.5,tokens=0.5)+bapo",
     "capo(fisher=0.1,hessian=1.0)", "bapo+grpo(passes=3)"],
)  # fmt: skip
def test_the_gradient_does_not_depend_on_accumulation(method: str, tmp_path: Path) -> None:
    grads = []
    steps = parse(method).passes
    for accumulate in (1, 2, 4):
        folder = tmp_path / str(accumulate)
        trainer = trainer_of(method, folder, config(folder, accumulate, max_steps=steps))
        trainer.train()
        grads.append(record_of(trainer).grads[-1])
    assert far(grads[1], grads[0]) < FLOAT32
    assert far(grads[2], grads[0]) < FLOAT32


SAME = {
    "token": ("grpo(passes=2)", {"loss_type": "dapo"}),
    "row": ("grpo(per='row',passes=2)", {"loss_type": "grpo"}),
    "dr_grpo": (f"dr_grpo(length={LONGEST})+grpo(passes=2)", {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "batch": ("grpo(scale='batch',passes=2)", {"scale_rewards": "batch"}),
    "higher": ("grpo(clip_high=0.3,clip_low=0.1,passes=2)", {"epsilon": 0.1, "epsilon_high": 0.3}),
    "gspo": ("gspo+grpo(passes=2)", {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4,
                                     "epsilon_high": 4e-4}),
    "kl": ("grpo(kl=0.1,passes=2)", {"beta": 0.1, "use_bias_correction_kl": False}),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_with_the_same_settings_it_is_trls_own_gradient(name: str, tmp_path: Path) -> None:
    """The second pass over one batch: the ratio has moved, and the clip binds."""
    method, settings = SAME[name]
    rate = 1e-5 if name == "gspo" else 4e-3
    mine = trainer_of(method, tmp_path / "a", config(tmp_path / "a", 2, max_steps=2, learning_rate=rate))
    mine.train()
    args = config(tmp_path / "b", 2, max_steps=2, num_iterations=2, learning_rate=rate, **settings)
    theirs = trainer_of("", tmp_path / "b", args, trl.GRPOTrainer)
    theirs.train()
    ours, its = record_of(mine), record_of(theirs)
    for step in (0, 1):
        assert far(ours.grads[step], its.grads[step]) < 2e-5  # the second step starts where the first one led
    assert 0 < its.logs[1]["clip_ratio/region_mean"] < 1


def test_two_steps_train_the_model_and_show_the_methods_advantages(tmp_path: Path) -> None:
    trainer = trainer_of("d3s(share=0.5)+bapo", tmp_path, config(tmp_path, 2, max_steps=2))
    kept = keeping_batches(trainer)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    logs = record_of(trainer).logs
    assert all(math.isfinite(log["loss"]) for log in logs[:2])
    assert all(bool((p != before[n]).any()) for n, p in trainer.model.named_parameters())
    assert "sampler_gap" not in logs[0]
    assert {"bound_low", "kept_decisions", "surrogate"} <= logs[0].keys()
    advantage = (kept[1]["advantage"] * kept[1]["mask"]).sum(1) / kept[1]["mask"].sum(1)
    assert list(trainer._logs["advantages"])[-ROWS:] == pytest.approx(advantage.tolist())
    assert kept[0]["group"].unique().tolist() == [0, 1]
    assert kept[1]["group"].unique().tolist() == [2, 3]


def test_four_lines_are_enough(tmp_path: Path) -> None:
    """A model's folder, and TRL's defaults: bfloat16 under autocast, layers computed again in the backward."""
    policy = load_policy("nano")
    policy.save(tmp_path / "model")
    args = trl.GRPOConfig(
        str(tmp_path), per_device_train_batch_size=8, max_completion_length=8, max_steps=2, use_cpu=True, report_to=[],
        save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = GRPOTrainer(str(tmp_path / "model"), coin, args, questions(), method="d3s+bapo")
    assert trainer.args.bf16
    assert trainer.args.gradient_checkpointing
    trainer.train()
    assert all(math.isfinite(log["loss"]) and log["kept_decisions"] > 0 for log in trainer.state.log_history[:2])
    assert trainer.method.name == "d3s+bapo"


def test_an_adapter_learns_beside_its_own_reference(tmp_path: Path) -> None:
    import peft

    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    trainer = trainer_of("grpo(kl=0.1,passes=2)", tmp_path, config(tmp_path, 2, max_steps=2), peft_config=lora)
    trainer.train()
    record = record_of(trainer)
    trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora" in n for n in trained)
    assert record.logs[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert record.logs[1]["kl"] > 1e-4


def test_the_reference_is_the_model_that_was_given_and_not_its_file(tmp_path: Path) -> None:
    other = load_policy("nano", dtype="float64", seed=5).model
    trainer = trainer_of("grpo(kl=0.1)", tmp_path, config(tmp_path))
    other.config._name_or_path = str(tmp_path / "start")
    trainer = trainer_of("grpo(kl=0.1)", tmp_path, config(tmp_path), model=other)
    trainer.train()
    assert record_of(trainer).logs[0]["kl"] == pytest.approx(0, abs=1e-6)


# -- rewards -----------------------------------------------------------------------------------------------------


def test_a_row_that_no_reward_function_scores_does_not_exist_for_the_method(tmp_path: Path) -> None:
    def picky(prompts: list[str], completions: list[str], **_: Any) -> list[float | None]:
        scores: list[float | None] = list(coin(prompts, completions))
        scores[2] = scores[5] = None
        return scores

    method = "grpo(per='row')"
    trainer = trainer_of(method, tmp_path, config(tmp_path, 4), reward_funcs=picky)
    kept = keeping_batches(trainer)
    trainer.train()
    assert kept[0]["scored"].tolist() == [True] * 6 + [False] * 2  # the rest are places in TRL's rectangle
    rows = {name: column[kept[0]["scored"]] for name, column in kept[0].items()}
    mine, _ = ours(method, rows, record_of(trainer).starts[0], credited=False)
    assert far(record_of(trainer).grads[0], mine.grads) < FLOAT32
    assert record_of(trainer).logs[0]["failures"] == 2


def test_weights_of_rewards_are_those_of_trl(tmp_path: Path) -> None:
    def length(completions: list[str], **_: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    args = config(tmp_path, 1, reward_weights=[1.0, 0.25])
    trainer = trainer_of("grpo", tmp_path, args, reward_funcs=[coin, length])
    kept = keeping_batches(trainer)
    trainer.train()
    answers = list(trainer._logs["completion"])
    expected = [a + 0.25 * len(text) for a, text in zip(coin([], answers), answers)]
    assert kept[0]["reward"].sum(1).tolist() == pytest.approx(expected)


def test_when_no_row_is_scored_the_run_stops_and_says_so(tmp_path: Path) -> None:
    trainer = trainer_of("grpo", tmp_path, config(tmp_path), reward_funcs=lambda completions, **_: [None] * ROWS)
    with pytest.raises(EnvironmentFailure, match="every reward function returned None"):
        trainer.train()


def test_a_loss_that_is_not_finite_stops_before_the_step(tmp_path: Path) -> None:
    trainer = trainer_of("reinforce", tmp_path, config(tmp_path, 2), reward_funcs=lambda completions, **_: [
        math.inf if i == 3 else 0.0 for i in range(ROWS)
    ])  # fmt: skip
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with pytest.raises(NonFiniteError, match="surrogate"):
        trainer.train()
    assert all(bool((a == b).all()) for a, b in zip(before, trainer.model.parameters()))


# -- evaluation and checkpoints ----------------------------------------------------------------------------------


def test_an_evaluation_leaves_no_trace(tmp_path: Path) -> None:
    method = "d3s(share=0.5)+capo(fisher=0.1,hessian=1.0)"
    plain = trainer_of(method, tmp_path / "a", config(tmp_path / "a", 2, max_steps=2))
    plain.train()
    args = config(tmp_path / "b", 2, max_steps=2, per_device_eval_batch_size=GROUP)
    looking = trainer_of(method, tmp_path / "b", args, eval_dataset=questions().select(range(2)))
    kept = torch.random.get_rng_state
    inner, seen = looking._finish, []

    def finish() -> None:
        inner()
        state = kept()
        seen.append(looking.evaluate())
        torch.random.set_rng_state(state)
        looking.model.train()

    looking._finish = finish
    looking.train()
    assert len(seen) == 2
    assert math.isfinite(seen[0]["eval_loss"])
    assert "eval_reward" in seen[0]
    assert looking._tree.clock == plain._tree.clock
    first, second = (t._tree.pieces["policy/moments"] for t in (plain, looking))
    assert all(torch.equal(torch.as_tensor(first[k]), torch.as_tensor(second[k])) for k in first)


def test_the_methods_own_state_is_in_the_checkpoint(tmp_path: Path) -> None:
    method = "capo(warmup=2)"
    args = config(tmp_path, 2, max_steps=3, save_strategy="steps", save_steps=2, save_only_model=False)
    whole = trainer_of(method, tmp_path, args)
    whole.train()
    assert whole._tree.pieces["policy/calibration"]["updates"] == 2
    rest = trainer_of(method, tmp_path, args)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert rest._tree.clock == whole._tree.clock
    assert rest._tree.pieces["policy/calibration"] == whole._tree.pieces["policy/calibration"]
    for a, b in zip(whole.model.parameters(), rest.model.parameters()):
        assert torch.equal(a, b)
    other = trainer_of("capo(warmup=3)", tmp_path, args)
    with pytest.raises(CheckpointError, match="Resume with the same method"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


# -- refusals ----------------------------------------------------------------------------------------------------


def refused(method: Any, args: Any, sentence: str, **more: Any) -> None:
    """It is, before a model is looked for."""
    more = {"reward_funcs": coin, "train_dataset": questions(), **more}
    with pytest.raises(MethodError, match=sentence):
        GRPOTrainer("nobody/nothing", args=args, method=method, **more)


BY_THE_METHOD = {
    "loss_type": "grpo", "epsilon": 0.3, "epsilon_high": 0.3, "delta": 2.0, "importance_sampling_level": "sequence",
    "scale_rewards": "none", "multi_objective_aggregation": "normalize_then_sum", "num_iterations": 2, "beta": 0.1,
    "use_bias_correction_kl": False, "ref_model_sync_steps": 3, "mask_truncated_completions": True,
    "top_entropy_quantile": 0.2, "off_policy_mask_threshold": 0.5, "entropy_coef": 0.1, "entropy_target": 0.3,
    "sapo_temperature_neg": 2.0, "vespo_k_pos": 3.0,
}  # fmt: skip


@pytest.mark.parametrize("name", BY_THE_METHOD)
def test_a_setting_of_trl_that_the_method_decides_is_refused(name: str, tmp_path: Path) -> None:
    args = config(tmp_path, **{name: BY_THE_METHOD[name]})
    refused("grpo", args, rf"GRPOConfig\({name}=.*decided by the method grpo: by .*Leave {name} out")


@pytest.mark.parametrize("name", ["use_vllm", "use_liger_kernel", "use_transformers_continuous_batching"])
def test_an_engine_that_nobody_has_checked_is_refused(name: str, tmp_path: Path) -> None:
    args = config(tmp_path)
    setattr(args, name, True)
    refused("grpo", args, rf"GRPOConfig\({name}=True\).*has not been checked")


UNFIT: dict[str, tuple[Any, str]] = {
    "phases": ("remix", "runs in phases"),
    "experts": ("chord", r"chord changes how experience is collected \(with_experts\)"),
    "resampling": ("aepo", "how experience is collected"),
    "dynamic sampling": ("dapo", r"dynamic_sampling.*dapo\(batches=0\)"),
    "temperature of tokens": ("hapo+dapo(batches=0)", "act piece"),
    "demonstrations": ("sft", "collects by demonstrations"),
    "pairs": ("dpo", "pair"),
    "control": ("ppo", "method for environments"),
    "tracks": ("sac", "method for environments"),
    "optimiser": ("grpo+reinforce(lr=0.1)", r"update.lr=0.1.*the optimiser is TRL's.*learning_rate"),
    "clipping": ("grpo+reinforce(clip_norm=0.5)", r"update.clip=0.5.*max_grad_norm"),
    "wrapped update": (lambda: parse("grpo").wrap("update", find_wrap()), "the optimiser is TRL's"),
    "length": (lambda: parse("grpo").set("collect.new_tokens", 99), r"collect.new_tokens=99.*max_completion_length"),
    "group": (lambda: parse("grpo").set("collect.group", 5), "collect.group=5.*num_generations"),
    "revisit": (lambda: parse("grpo").set("collect.revisit", 0.5), "collect.revisit=0.5.*its data set"),
    "constant length": ("dr_grpo", rf"divided by 16 decisions.*dr_grpo\(length={LONGEST}\)"),
    "probe": (lambda: parse("grpo").then(held_out(every=5)), "probe piece held_out.*eval_dataset"),
    "mismatch": (lambda: parse("grpo").then(sampler_mismatch()), "does not report its sampler"),
    "rows": ("grpo(rows=3)", rf"rows=3 for each update.*= {ROWS}"),
}  # fmt: skip


def find_wrap() -> Any:
    from trimtab.stages.update import clipped

    return clipped(0.5)


@pytest.mark.parametrize("name", UNFIT)
def test_a_method_that_trls_loop_cannot_honour_is_refused_by_name(name: str, tmp_path: Path) -> None:
    method, sentence = UNFIT[name]
    refused(method() if callable(method) else method, config(tmp_path), sentence)


def test_batches_that_do_not_fit_the_method_are_refused(tmp_path: Path) -> None:
    two = {"per_device_train_batch_size": 2}
    refused(
        "grpo",
        config(tmp_path, 2, **two, steps_per_generation=4),
        r"one update of a whole batch.*makes 2 of 4 rows.*grpo\(rows=4\)",
    )
    refused(
        "grpo(rows=8)", config(tmp_path, 4, **two, steps_per_generation=6), "does not divide steps_per_generation=6"
    )


def test_a_sampler_that_would_have_to_be_known_is_refused(tmp_path: Path) -> None:
    trainer_of("grpo", tmp_path, config(tmp_path, top_p=0.9))
    refused("bapo", config(tmp_path, top_p=0.9), r"top_p=0.9.*bapo reads the sampler's log-probabilities")


def test_an_optimiser_that_capo_cannot_model_is_refused(tmp_path: Path) -> None:
    refused("capo", config(tmp_path, optim="adafactor"), "capo models the optimisers adamw and sgd.*adafactor")
    mine = (torch.optim.SGD([torch.zeros(1, requires_grad=True)]), None)
    refused("capo", config(tmp_path), "an optimizer of your own", optimizers=mine)


def test_what_generates_otherwise_is_refused(tmp_path: Path) -> None:
    refused("grpo", config(tmp_path), "was given rollout_func", rollout_func=lambda prompts, trainer: {})
    refused("gpro", config(tmp_path), r"there is no method 'gpro'\. Known: .*grpo")


def test_a_reference_needs_files(tmp_path: Path) -> None:
    model = load_policy("nano").model
    with pytest.raises(MethodError, match="Save it first"):
        trainer_of("grpo(kl=0.1)", tmp_path, config(tmp_path), model=model)


def test_another_version_of_trl_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl, "__version__", "1.17.0")
    refused("grpo", config(tmp_path), r"trl 1.17.0 is installed.*1.16")


def test_more_than_one_process_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = config(tmp_path)
    monkeypatch.setattr(type(args), "world_size", 2)
    refused("grpo", args, "one of 2")


def test_a_definition_and_a_method_do_as_well_as_an_expression(tmp_path: Path) -> None:
    given = [trainer_of(m, tmp_path, config(tmp_path)).method for m in ("grpo", find("grpo"), parse("grpo"))]
    assert len({m.fingerprint() for m in given}) == 1
    assert GROUP == 4
