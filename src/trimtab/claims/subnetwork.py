"""Sub-networks on a small transformer: is the update sparse as stored, does RL make it so, and is the mask enough?

The problem of the card: a transformer (2 layers, width 128, 308k weights) is taught sums of numbers up to 30 in float32
until about half of the held-out ones are right, and cast to bfloat16; from there every arm makes as many AdamW steps at
the same learning rate, in float32. Arms differ in what they learn from: GRPO on its own answers; its own right answers
alone, imitated (rejection sampling); right answers in the form that was taught; right answers in a form that never was.
Then GRPO anew from the same start, with the weights alone that had changed (as stored), and with as many of each matrix
drawn by lot.

Differences from the card: sums of numbers up to 30, not of all two-digit ones; the imitation of right answers in the
taught form is an arm of ours, since it tells foreign data from supervised learning.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.claims.core import RUNS, Arm, Claim, Part, Study, above, within
from trimtab.claims.effect import LARGER, for_tiny, load, on_tiny
from trimtab.core.batch import Batch
from trimtab.core.kit import Kit
from trimtab.core.loop import run
from trimtab.core.method import Method
from trimtab.core.piece import piece
from trimtab.core.registry import find
from trimtab.evaluation import evaluate
from trimtab.stages.collect import expert_rows, first_id
from trimtab.stages.credit import spread
from trimtab.stages.sparsity import Tensors, changes, parameters, scattered, sparsity
from trimtab.stages.subnetwork import base_of, write_mask

SUMS, TAUGHT, TOKENS = "toy:sum(limit=30)", 150, 14
TURNS, LR, PROMPTS, GROUP = 60, 1.5e-5, 16, 8


# -- the start -----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def taught() -> dict[str, Tensor]:
    """The weights that every arm starts from: taught sums in float32, then rounded to bfloat16."""
    model, tokenizer = _blank()
    dice = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01)
    for _ in range(TAUGHT):
        numbers = [(dice.randint(0, 30), dice.randint(0, 30)) for _ in range(64)]
        loss = _imitation(model, tokenizer, [(f"{a}+{b}=", f" {a + b}") for a, b in numbers])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return {name: p.detach().bfloat16().float() for name, p in model.named_parameters()}


def _blank() -> tuple[Any, Any]:
    from trimtab.policies.builtin import character_llama, character_tokenizer

    tokenizer = character_tokenizer()
    model = character_llama(
        tokenizer, 0, spread=0.05, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return model, tokenizer


def _imitation(model: Any, tokenizer: Any, pairs: list[tuple[str, str]]) -> Tensor:
    """Cross-entropy of the answers' characters and their ends."""
    from trimtab.policies.tiny import examples

    ids, target = examples(tokenizer, pairs)
    logits = model(input_ids=ids[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=-100)


def started(seed: int) -> tuple[Any, Any]:
    """(environment, policy) at the start; the seed is that of the problems' order."""
    from trimtab.environments.text import load_environment
    from trimtab.policies.language import LanguagePolicy

    (model, tokenizer), weights = _blank(), taught()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])
    policy = LanguagePolicy(model, tokenizer, name="taught", source="", compute=torch.float32)
    return load_environment(SUMS, seed=seed), policy


# -- the arms ------------------------------------------------------------------------------------------------------


@piece("credit", reads=("reward", "group", "mask"), writes=("advantage",))
def right_ones(batch: Batch) -> Batch:
    """`A_i = R_i`: right answers are imitated, wrong ones left out."""
    return spread(batch, batch.score())


@piece("collect", state={"ids": first_id}, writes=("prompt", "prompt_mask", "action", "mask", "episode", "source",
       "age", "question", "response"))  # fmt: skip
def restyled(kit: Kit, *, prompts: int = 16, style: str = "{answer}") -> Batch:
    """Reference answers in another form, as rows to imitate."""
    pairs = [(problem, style.format(answer=text)) for problem, text in kit.environment.demonstrations(prompts)]
    ids = kit.state["ids"]
    kit.state["ids"] = {**ids, "episode": ids["episode"] + prompts}
    return expert_rows(kit.models["policy"], pairs).put(episode=ids["episode"] + torch.arange(prompts))


FOREIGN = "the sum is {answer}."


def sized(method: Method) -> Method:
    """As many rows, tokens and steps, and the same optimiser, for every arm."""
    for path, value in (("collect.prompts", PROMPTS), ("collect.group", GROUP), ("collect.new_tokens", 4)):
        method = method.set(path, value)
    return method.set("update.lr", LR)


def grpo() -> Method:
    return sized(find("grpo")())


def imitation(style: str) -> Method:
    return find("sft")().swap("collect", restyled(prompts=PROMPTS * GROUP, style=style)).set("update.lr", LR)


def confined(method: Method, mask: Path) -> Method:
    made: Method = find("subnetwork")(method, mask=str(mask))
    return made


@lru_cache(maxsize=1)
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="trimtab-claim-")


@dataclass(frozen=True)
class Outcome:
    """Parameters and score, before and after."""

    start: Tensors
    end: Tensors
    before: float
    after: float


def trained(method: Method, seed: int) -> Outcome:
    environment, policy = started(seed)

    def now() -> tuple[Tensors, float]:
        with torch.no_grad():
            score = evaluate(policy, environment, problems=None, new_tokens=TOKENS).mean
        return {name: p.clone() for name, p in parameters({"policy": policy}).items()}, score

    start, before = now()
    for _ in run(method, environment, policy, until=TURNS, seed=seed):
        pass
    end, after = now()
    return Outcome(start, end, before, after)


@lru_cache(maxsize=8)
def full_run(seed: int) -> Outcome:
    """GRPO on all weights."""
    return trained(grpo(), seed)


def mask_for(seed: int, by_lot: bool) -> Path:
    """The file of the weights that the full run changed, as stored; or of as many of each matrix, drawn by lot."""
    path = Path(_folder().name) / f"{'lot' if by_lot else 'changed'}-{seed}.safetensors"
    _, policy = started(seed)
    masks = changes(parameters({"policy": policy}), full_run(seed).end)
    write_mask(path, scattered(masks, seed) if by_lot else masks, {"policy": base_of(policy)}, {"seed": seed})
    return path


ARMS = {
    "grpo": Arm("GRPO on its own answers, all weights", lambda seed: grpo()),
    "own right answers": Arm(
        "its own right answers imitated (rejection sampling)",
        lambda seed: sized(find("reinforce")()).swap("credit", right_ones()),
    ),
    "taught form": Arm("right answers imitated, in the form that was taught", lambda seed: imitation("{answer}")),
    "foreign form": Arm(f"right answers imitated, as {FOREIGN!r}, a form never seen", lambda seed: imitation(FOREIGN)),
    "masked": Arm(
        "GRPO with the weights alone that GRPO had changed, as stored",
        lambda seed: confined(grpo(), mask_for(seed, False)),
    ),
    "random mask": Arm(
        "GRPO with as many weights of each matrix, drawn by lot", lambda seed: confined(grpo(), mask_for(seed, True))
    ),
}


def mechanism(method: Method, seed: int) -> dict[str, float]:
    """sparsity: share of weights unchanged in bfloat16, within 1e-5. unchanged_float32: not moved at all in float32.
    score: greedy accuracy on the held-out sums. gain: what it rose by. agreement: share of weights equal, in bfloat16
    within 1e-5, to those of the full GRPO run of this seed.
    """
    made = trained(method, seed)
    found = sparsity(made.start, made.end).total
    return {
        "sparsity": found.sparsity,
        "unchanged_float32": found.share("moved_float32"),
        "score": made.after,
        "gain": made.after - made.before,
        "agreement": sparsity(full_run(seed).end, made.end).total.sparsity,
    }


PARTS = (
    Part("as stored, GRPO leaves more weights unchanged than imitating a foreign form does, by more than 0.2",
         "sparsity", "grpo", "foreign form", ("own right answers", "taught form"), above(0.2)),
    Part("it is the data, not RL: so does imitating its own right answers, by more than 0.1", "sparsity",
         "own right answers", "foreign form", ("grpo", "taught form"), above(0.1)),
    Part("in float32 there is no such difference (less than 0.05)", "unchanged_float32", "grpo", "foreign form",
         ("own right answers", "taught form"), within(-0.05, 0.05)),
    Part("trained alone, the changed weights reach the full run's score, to 2 points", "score", "masked", "grpo",
         ("random mask",), above(-0.02)),
    Part("they end nearer to the full run's weights than as many drawn by lot, by more than 0.1", "agreement", "masked",
         "random mask", ("grpo",), above(0.1)),
    Part("they score better than as many drawn by lot", "score", "masked", "random mask", ("grpo",), above(0.0)),
)  # fmt: skip

# -- on a language model -------------------------------------------------------------------------------------------

DECISIONS = 150_000


def tiny_mask(seed: int, by_lot: bool) -> Path:
    """As `mask_for`, for `tiny`: one run makes both files of a seed, and they are kept; another base refuses them."""
    paths = {lot: RUNS / "subnetwork" / f"{'lot' if lot else 'changed'}-{seed}.safetensors" for lot in (False, True)}
    if all(path.exists() for path in paths.values()):
        return paths[by_lot]
    environment, policy = load(seed)
    start, base = {n: p.clone() for n, p in parameters({"policy": policy}).items()}, base_of(policy)
    for _ in run(for_tiny(find("grpo")()), environment, policy, until={"decisions": DECISIONS}, seed=seed):
        pass
    environment.close()
    masks = changes(start, parameters({"policy": policy}))
    for lot, path in paths.items():
        write_mask(path, scattered(masks, seed) if lot else masks, {"policy": base}, {"seed": seed})
    return paths[by_lot]


def tiny_arm(what: str, by_lot: bool) -> Arm:
    return Arm(what, lambda seed: confined(for_tiny(find("grpo")()), tiny_mask(seed, by_lot)))


TINY: Mapping[str, Arm] = {
    "grpo": Arm(ARMS["grpo"].what, lambda seed: for_tiny(find("grpo")())),
    "masked": tiny_arm(ARMS["masked"].what, False),
    "random mask": tiny_arm(ARMS["random mask"].what, True),
}

CLAIM = Claim(
    method="subnetwork",
    statement="As stored in bfloat16, RL leaves most weights of a language model as they were, because it learns from "
    "data close to the model's own; and training the changed ones alone gives the same scores and nearly the same "
    "weights.",
    mechanism=Study(arms=ARMS, parts=PARTS, measure=mechanism, seeds=5),
    full=Study(
        arms=TINY,
        parts=(
            Part("tiny's held-out greedy accuracy is the full run's, to 2 points", "accuracy", "masked", "grpo",
                 ("random mask",), above(-0.02)),
            Part("it ends above that of as many weights drawn by lot", "accuracy", "masked", "random mask", ("grpo",),
                 above(0.0)),
        ),
        measure=on_tiny(DECISIONS),
        seeds=5,
        about=f"tiny on {LARGER}, {DECISIONS} decisions",
    ),
)  # fmt: skip
