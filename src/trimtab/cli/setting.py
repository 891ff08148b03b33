"""What a run needs besides its method, as options of the command line."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, UseAppendAction, arg

Expression = Annotated[
    Positional[str],
    arg(metavar="EXPR", help="A method, or several: grpo, rloo, 'd3s+bapo', 'grpo(kl=0.04, per=\"row\")'."),
]
Folder = Annotated[Positional[str], arg(metavar="DIR", help="A run folder.")]


@dataclass(frozen=True)
class Shared:
    """What a run needs besides its method and its environment."""

    policy: str = ""
    """smollm2, tiny, nano, a Hugging Face id, or a model or adapter folder; for a control method an earlier run."""
    steps: int | None = None
    """Turns: one batch and its updates (default: 60; of a control method, 100,000 decisions)."""
    decisions: int | None = None
    """Instead of --steps: stop after the first turn that reaches this many decisions: tokens, or actions."""
    set: UseAppendAction[tuple[str, ...]] = ()
    """piece.option=value, once per option, for example --set update.lr=1e-5 --set collect.group=16."""
    envs: int | None = None
    """Environments stepped together (default: 1)."""
    rows: int | None = None
    """Rows per update (default: the method's)."""
    memory: int | None = None
    """Rows in memory at once; changes nothing beyond rounding (default: what the policy reads well)."""
    passes: int | None = None
    """Passes over each batch (default: the method's)."""
    lora: int = 0
    """Rank of a low-rank adapter; 0 trains all parameters."""
    dtype: Literal["auto", "bfloat16", "float32", "float64"] = "auto"
    """How the forward pass computes; parameters stay float32."""
    checkpointing: bool = False
    """Compute each layer again in the backward: less memory for long texts, a fifth to a half more time."""
    chat: bool | None = None
    """Put prompts into the chat template (default: if the tokenizer has one)."""
    reward: str | None = None
    """exact, math-verify, or module:function (default: the data set's own scorer)."""
    prompt: str | None = None
    """A template such as 'Answer with a number. {question}'."""
    eval_every: int | None = None
    """Turns between evaluations (default: 10; in control, evaluated 20 times in all)."""
    eval_problems: int | None = None
    """Held-out problems per evaluation (default: 50), or episodes (default: 10)."""
    eval_env: str | None = None
    """Another environment to be held out on, with the same reward and prompt (default: the one trained on)."""
    eval_samples: int = 1
    """Answers to each held-out problem; more than one needs a temperature above 0."""
    eval_k: str = ""
    """For pass@k: 1,4 for example, each at most the number of samples."""
    eval_temperature: float = 0.0
    """Of evaluated answers; 0 is greedy."""
    save_every: int | None = None
    """Turns between checkpoints (default: 25; in control, 10 in all); one is always made at the end and on Ctrl-C."""
    threads: int = 0
    """CPU threads; 0 chooses: the idle cores for a real model, 1 for a small one."""
    tensorboard: bool = False
    """Also write OUT/tensorboard, to be read by `tensorboard --logdir` (needs the extra `tensorboard`)."""

    def request(self, method: str, env: str, out: str, **more: Any) -> Any:
        """The whole request. Raises MethodError for two budgets."""
        from trimtab.runs.commands import one_budget
        from trimtab.runs.request import Request

        one_budget(self.steps, self.decisions)
        wanted = {f.name: getattr(self, f.name) for f in fields(self)}
        return Request(method, env=env, out=out, **wanted, **more)

    def task(self, method: str, *envs: str) -> str:
        """A short name of what is trained on what, for a folder."""
        from trimtab.runs.worlds import world_of

        world, name = "-".join(env.partition("(")[0] for env in envs), Path(self.policy).name
        if self.policy and world_of(method) == "control":
            return f"{world}-from-{name}"
        return name or world


@dataclass(frozen=True)
class Setting:
    """What a run needs besides its method."""

    env: str
    """'reasoning-gym:NAME(key=value, ...)', FILE.jsonl, 'datasets:NAME(...)', or a Gymnasium id."""
    rest: Annotated[Shared, arg(name="")]

    def request(self, method: str, out: str, **more: Any) -> Any:
        """The whole request. Raises MethodError for two budgets."""
        return self.rest.request(method, self.env, out, **more)

    def task(self, method: str) -> str:
        """A short name of what is trained on what, for a folder."""
        return self.rest.task(method, self.env)


Settings = Annotated[Setting, arg(name="")]
Others = Annotated[Shared, arg(name="")]
