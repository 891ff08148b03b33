"""Toy tokens: a tabular policy over short sequences, with a verifiable reward. Also the smallest case of many laws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.batch import Batch
from trimtab.core.kit import Kit
from trimtab.core.piece import piece
from trimtab.core.terms import SOURCES


class TokenTask:
    """`contexts` prompts; a response is right when its tokens sum to the prompt's target modulo 4."""

    def __init__(self, contexts: int = 6, length: int = 4, vocabulary: int = 5, seed: int = 0) -> None:
        self.contexts, self.length, self.vocabulary = contexts, length, vocabulary
        self.cursor = 0
        self.target = torch.randint(4, (contexts,), generator=torch.Generator().manual_seed(seed))

    def draw(self, n: int) -> Tensor:
        picked = (self.cursor + torch.arange(n)) % self.contexts
        self.cursor = int(self.cursor + n) % self.contexts
        return picked

    def score(self, context: Tensor, action: Tensor, mask: Tensor) -> Tensor:
        return ((action * mask).sum(1) % 4 == self.target[context]).double()

    def demonstration(self, context: Tensor) -> Tensor:
        action = torch.zeros(len(context), self.length, dtype=torch.long)
        action[:, 0] = self.target[context]
        return action

    def state_dict(self) -> dict[str, Any]:
        return {"cursor": self.cursor}

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        self.cursor = tree["cursor"]


class TableTokens(nn.Module):
    """One table of logits per context and place; token 0 ends a row early with some rows, so lengths differ."""

    provides = frozenset({"logp", "entropy", "hidden", "topk", "topk_ids"})

    def __init__(self, task: TokenTask, seed: int = 0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        start = torch.randn(task.contexts, task.length, task.vocabulary, generator=g, dtype=torch.float64)
        self.logits = nn.Parameter(0.5 * start)

    def evaluate(self, batch: Batch, want: frozenset[str]) -> dict[str, Tensor]:
        length = batch.action.shape[1]
        table = self.logits[batch.prompt[:, 0]][:, : self.logits.shape[1]]
        if length > table.shape[1]:  # padding beyond what the policy ever decides
            table = torch.cat([table, table.new_zeros(len(table), length - table.shape[1], table.shape[2])], 1)
        logp = table[:, :length].log_softmax(-1)
        made = {}
        if "logp" in want:
            made["logp"] = logp.gather(-1, batch.action[..., None])[..., 0] * batch.mask
        if "entropy" in want:
            made["entropy"] = -(logp.exp() * logp).sum(-1) * batch.mask
        if "hidden" in want:  # the table as a linear layer: of one 1 among `contexts x places`
            place = (batch.prompt * self.logits.shape[1] + torch.arange(length)) * batch.mask
            width = self.logits.shape[0] * self.logits.shape[1] + length  # beyond the table: padding
            made["hidden"] = torch.nn.functional.one_hot(place, width).to(logp.dtype) * batch.mask[..., None]
        if want & {"topk", "topk_ids"}:
            top = logp.detach().topk(logp.shape[-1], -1)
            made |= {"topk": top.values * batch.mask[..., None], "topk_ids": top.indices * batch.mask[..., None]}
        return {name: value for name, value in made.items() if name in want}


@piece("collect", state={"ids": lambda kit, options: {"group": 0}},
       writes=("prompt", "action", "mask", "reward", "logp_behavior", "group", "source", "age"))  # fmt: skip
def token_rollouts(kit: Kit, *, prompts: int = 4, group: int = 6, temperature: float = 1.0) -> Batch:
    """Ragged sampled rows with a verifiable reward at their last token."""
    policy: Any = kit.models["policy"]
    context = kit.environment.draw(prompts).repeat_interleave(group)
    n, length = len(context), policy.logits.shape[1]
    uniform = torch.rand(n, length, generator=kit.rng("rollout"), dtype=torch.float64)
    probs = (policy.logits[context] / temperature).softmax(-1)
    action = (probs.cumsum(-1) < uniform[..., None]).sum(-1).clamp_max(probs.shape[-1] - 1)
    lengths = torch.randint(1, length + 1, (n,), generator=kit.rng("lengths"))
    mask = torch.arange(length) < lengths[:, None]
    action = action * mask
    logp = probs.log().gather(-1, action[..., None])[..., 0] * mask
    score = kit.environment.score(context, action, mask)
    last = torch.arange(length) == lengths[:, None] - 1
    start = kit.state["ids"]["group"]
    kit.state["ids"] = {"group": start + prompts}
    kit.log("reward", score.mean())
    return Batch(
        {
            "prompt": context[:, None],
            "action": action,
            "mask": mask,
            "reward": score[:, None] * last,
            "logp_behavior": logp,
            "group": start + torch.arange(prompts).repeat_interleave(group),
            "source": torch.zeros(n, dtype=torch.long),
            "age": torch.zeros(n, dtype=torch.long),
        }
    )


def expert_batch(environment: Any, n: int) -> Batch:
    """`n` demonstrations as rows of source "expert"."""
    context = environment.draw(n)
    action = environment.demonstration(context)
    return Batch(
        {
            "prompt": context[:, None],
            "action": action,
            "mask": torch.ones_like(action, dtype=torch.bool),
            "source": torch.full((n,), SOURCES.index("expert")),
            "age": torch.zeros(n, dtype=torch.long),
        }
    )


def case(seed: int = 0) -> tuple[TokenTask, dict[str, nn.Module]]:
    task = TokenTask()
    return task, {"policy": TableTokens(task, seed)}


@piece("collect", writes=("prompt", "action", "mask", "source", "age"))
def token_demonstrations(kit: Kit, *, prompts: int = 4) -> Batch:
    """Demonstrations alone, for supervised learning."""
    return expert_batch(kit.environment, prompts)


@piece("collect", writes=("prompt", "action", "mask", "source", "age", "pair", "preferred"))
def token_pairs(kit: Kit, *, pairs: int = 5) -> Batch:
    """Preference pairs: the demonstration, and random tokens of another length."""
    chosen = expert_batch(kit.environment, pairs)
    rng = kit.rng("rejected")
    length = torch.randint(1, chosen.mask.shape[1] + 1, (pairs, 1), generator=rng)
    mask = torch.arange(chosen.mask.shape[1]) < length
    action = torch.randint(1, kit.environment.vocabulary, chosen.action.shape, generator=rng) * mask
    both = Batch.cat([chosen, chosen.put(action=action, mask=mask)])
    return both.put(pair=torch.arange(pairs).repeat(2), preferred=torch.arange(2 * pairs) < pairs)


@piece("collect", writes=("logp_behavior",))
def mismatched(kit: Kit, *, inner: Any) -> Batch:
    """A wrap: a sampler whose log-probabilities differ from the trainer's, as every fast sampler's do."""
    rows: Batch = inner()
    noise = torch.randn(rows.mask.shape, generator=kit.rng("mismatch"), dtype=torch.float64)
    return rows.put(logp_behavior=(rows.logp_behavior + 0.3 * noise) * rows.mask)


@piece("collect", writes=("reward",))
def graded(kit: Kit, *, inner: Any) -> Batch:
    """A wrap: rewards with a random part, so that all of them differ."""
    rows: Batch = inner()
    last = rows.mask & (rows.mask.cumsum(1) == rows.mask.sum(1, keepdim=True))
    extra = torch.rand(len(rows), 1, generator=kit.rng("grades"), dtype=torch.float64)
    return rows.put(reward=rows.reward + extra * last)
