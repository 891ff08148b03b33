"""One work of `benchmarks/language.py` on one side, in a process of its own: prints one JSON object as its last line.

    python benchmarks/language_work.py ours step '{"prompts": 8, ...}'
    .venv-peers/bin/python benchmarks/language_work.py theirs step '{"prompts": 8, ...}'

Both sides get the same model folder, prompts, lengths and threads. Only what the side needs is imported.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

Size = dict[str, Any]
Made = dict[str, Any]


# -- what both sides share -----------------------------------------------------------------------------------------
def questions(n: int) -> list[str]:
    """Short prompts of about the same length, all different."""
    return [f"What is {11 + i} plus {87 - i}? Give only the number." for i in range(n)]


def token_prompts(n: int, length: int, seed: int = 0) -> list[list[int]]:
    """Prompts of exactly `length` tokens, all different: random ids of ordinary words."""
    dice = torch.Generator().manual_seed(seed)
    return torch.randint(1000, 40000, (n, length), generator=dice).tolist()


def graded(text: str) -> float:
    """A reward in [0, 1) that differs between the responses of a group, so that every row teaches something."""
    return sum(map(ord, text)) % 97 / 97


def resident(name: str) -> int:
    """`VmRSS` or `VmHWM` of this process in bytes; 0 where the system does not say."""
    table = Path("/proc/self/status")
    lines = table.read_text().splitlines() if table.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


@contextmanager
def memory() -> Iterator[Made]:
    """Peak memory of the process, and how much of it grew inside."""
    # Not getrusage: a process that was started by a large one inherits its peak there.
    loaded, before, clear = resident("VmHWM"), resident("VmRSS"), Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    made: Made = {}
    yield made
    highest = resident("VmHWM")
    made["peak_bytes"], made["grown_bytes"] = max(loaded, highest), max(0, highest - before)


def timed(work: Callable[[], Any], size: Size) -> Made:
    """Median wall and CPU seconds of a work, after one that warms up."""
    work()
    wall, cpu = [], []
    for _ in range(size["repeats"]):
        start = time.perf_counter(), time.process_time()
        work()
        wall.append(time.perf_counter() - start[0])
        cpu.append(time.process_time() - start[1])
    return {"seconds": statistics.median(wall), "cpu_seconds": statistics.median(cpu)}


# -- ours ----------------------------------------------------------------------------------------------------------
class Asked:
    """An environment of fixed questions and the reward above."""

    def __init__(self, n: int) -> None:
        from trimtab.environments.problem import Problem

        self.problems = [Problem(str(i), q, q, None, {}, "") for i, q in enumerate(questions(n))]

    def draw(self, n: int) -> list[Any]:
        return self.problems[:n]

    def score(self, problems: Any, texts: list[str]) -> list[float]:
        return [graded(text) for text in texts]

    def state_dict(self) -> Made:
        return {}

    def load_state_dict(self, state: Made) -> None:
        """Nothing to restore."""


def policy(size: Size) -> Any:
    """SmolLM2 whose responses never end early: every one has exactly the asked length, on both sides."""
    from trimtab.policies.builtin import load_policy

    made = load_policy("smollm2", lora=size.get("lora", 0), dtype="bfloat16", chat=False)
    made.sampler.ends = torch.empty(0, dtype=torch.long)
    return made


def ours_step(size: Size) -> Made:
    """`repeats` turns of grpo after one that warms up."""
    import trimtab

    sizes = {f"collect.{name}": size[name] for name in ("prompts", "group", "new_tokens")}
    method = trimtab.parse("grpo").set("update.lr", 1e-6)
    for path, value in sizes.items():
        method = method.set(path, value)
    with memory() as used:
        turns = size["repeats"] + 1
        loop = trimtab.run(method, Asked(size["prompts"]), policy(size), until=turns, memory=size.get("memory"))
        made = timed(lambda: next(loop), size)
    return {**made, **used}


def ours_decode(size: Size) -> Made:
    from trimtab.policies.sampler import Sampling

    made, prompts = policy(size), token_prompts(size["rows"], size["prompt"])
    seeds, sampling = torch.arange(size["rows"]), Sampling(new_tokens=size["new_tokens"])
    with memory() as used:
        took = timed(lambda: made.sampler.sample(prompts, 1, seeds, sampling), size)
    return {**took, **used, "tokens_per_second": size["rows"] * size["new_tokens"] / took["seconds"]}


def ours_train(size: Size) -> Made:
    from trimtab.core.batch import Batch

    made, (prompt, action) = policy(size), training_rows(size)
    batch = Batch(
        {
            "prompt": prompt,
            "prompt_mask": torch.ones_like(prompt, dtype=torch.bool),
            "action": action,
            "mask": torch.ones_like(action, dtype=torch.bool),
        }
    )
    trained = [p for p in made.parameters() if p.requires_grad]

    def work() -> None:
        loss = -made.evaluate(batch, {"logp"})["logp"].mean()
        torch.autograd.grad(loss, trained)

    with memory() as used:
        took = timed(work, size)
    return {**took, **used}


def training_rows(size: Size) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts `[group, prompt]`, one for all rows or (`shared` false) a different one for each; random responses."""
    distinct = 1 if size["shared"] else size["group"]
    prompt = torch.tensor(token_prompts(distinct, size["prompt"])).expand(size["group"], -1).contiguous()
    return prompt, torch.tensor(token_prompts(size["group"], size["new_tokens"], seed=1))


# -- theirs --------------------------------------------------------------------------------------------------------
def plain_model(size: Size, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(size["folder"], dtype=dtype)


def theirs_step(size: Size) -> Made:
    """TRL's GRPOTrainer: the same prompts, one optimiser step a batch, no gradient checkpointing, no evaluation."""
    import tempfile

    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    marks: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            marks.append((time.perf_counter(), time.process_time()))

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            marks.append((time.perf_counter(), time.process_time()))

    def reward(completions: list[str], **more: Any) -> list[float]:
        return [graded(text) for text in completions]

    lora = LoraConfig(r=size["lora"], lora_alpha=2 * size["lora"], target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder, memory() as used:
        config = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=size["prompts"] * size["group"],
            num_generations=size["group"],
            max_completion_length=size["new_tokens"],
            generation_kwargs={"min_new_tokens": size["new_tokens"]},
            temperature=1.0,
            top_k=0,
            learning_rate=1e-6,
            beta=0.0,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=size["checkpointing"],
            max_steps=size["repeats"] + 1,
            model_init_kwargs={"dtype": size["weights"]},
            logging_steps=1000,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=size["folder"],
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": questions(size["prompts"])}),
            peft_config=lora if size["lora"] else None,
            callbacks=[Clock()],
        )
        trainer.train()
    wall, cpu = ([b[i] - a[i] for a, b in pairwise(marks[1:])] for i in (0, 1))
    return {"seconds": statistics.median(wall), "cpu_seconds": statistics.median(cpu), **used}


def theirs_decode(size: Size) -> Made:
    """transformers' `generate` on bfloat16 weights."""
    model = plain_model(size, torch.bfloat16).eval()
    prompts = torch.tensor(token_prompts(size["rows"], size["prompt"]))
    length = {"min_new_tokens": size["new_tokens"], "max_new_tokens": size["new_tokens"]}

    def work() -> None:
        model.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            pad_token_id=2, **length,
        )  # fmt: skip

    with memory() as used:
        took = timed(work, size)
    return {**took, **used, "tokens_per_second": size["rows"] * size["new_tokens"] / took["seconds"]}


def theirs_train(size: Size) -> Made:
    """A plain forward and backward over prompt and response of every row, logits of the response alone."""
    model = plain_model(size, torch.float32).train()
    prompt, action = training_rows(size)
    ids, last = torch.cat([prompt, action], 1), action.shape[1]
    trained = [p for p in model.parameters() if p.requires_grad]

    def work() -> None:
        with torch.autocast(ids.device.type, torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=last + 1).logits[:, :-1]
        logp = logits.float().log_softmax(-1).gather(2, action[..., None]).squeeze(2)
        torch.autograd.grad(-logp.mean(), trained)

    with memory() as used:
        took = timed(work, size)
    return {**took, **used}


def versions() -> dict[str, str]:
    from importlib import metadata, util

    names = ("torch", "transformers", "peft", "trl", "accelerate", "trimtab")
    return {n: metadata.version(n) for n in names if util.find_spec(n)}


def main() -> None:
    side, work, size = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    torch.set_num_threads(size["threads"])
    torch.manual_seed(0)
    works = {
        ("ours", "step"): ours_step,
        ("ours", "decode"): ours_decode,
        ("ours", "train"): ours_train,
        ("theirs", "step"): theirs_step,
        ("theirs", "decode"): theirs_decode,
        ("theirs", "train"): theirs_train,
    }
    if side == "ours":  # as our command line does
        from trimtab.machine import keep_freed_memory

        keep_freed_memory()
    made = works[side, work](size)
    print(json.dumps({**made, "versions": versions()}))


if __name__ == "__main__":
    main()
