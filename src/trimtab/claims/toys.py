"""Toy problems of claims: small enough for minutes, run through the same loop, pieces and methods as everything else.

A toy is an environment (what is seen, what is right) and a policy that gives logits for what is seen; one collect piece
serves all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.batch import Batch
from trimtab.core.closure import Closure
from trimtab.core.kit import Kit
from trimtab.core.method import Method
from trimtab.core.piece import Piece, piece
from trimtab.core.terms import SOURCES
from trimtab.stages.collect import first_id
from trimtab.stages.update import report, sgd


@dataclass(frozen=True)
class Toy:
    """draw: `(n, rng) -> obs [n, ...]`. score: `(obs [N, ...], action [N, T]) -> reward [N]`. Nothing is remembered.

    ends: a choice after which a row makes no more decisions; None: every row makes all of them.
    """

    draw: Callable[[int, torch.Generator], Tensor]
    score: Callable[[Tensor, Tensor], Tensor]
    ends: int | None = None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing is remembered."""


class ToyPolicy(nn.Module):
    """Categorical decisions with logits `of(parameters, obs)`, `[N, T, choices]`; float64."""

    provides = frozenset({"logp", "entropy"})

    def __init__(self, start: Tensor, of: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.table = nn.Parameter(start.double())
        self._of = of

    def logits(self, obs: Tensor) -> Tensor:
        return self._of(self.table, obs)

    def evaluate(self, batch: Batch, want: frozenset[str]) -> dict[str, Tensor]:
        logp = self.logits(batch["obs"]).log_softmax(-1)
        made = {}
        if "logp" in want:
            made["logp"] = logp.gather(-1, batch["action"][..., None])[..., 0] * batch["mask"]
        if "entropy" in want:
            made["entropy"] = -(logp.exp() * logp).sum(-1) * batch["mask"]
        return made


@piece("collect", state={"ids": first_id}, writes=("obs", "action", "mask", "reward", "terminated", "truncated",
       "logp_behavior", "group", "episode", "turn", "source", "age"))  # fmt: skip
def toy_rollouts(kit: Kit, *, prompts: int, group: int, temperature: float = 1.0) -> Batch:
    """`prompts x group` rows of the policy: `group` tries at each thing drawn; the last decision is paid."""
    policy: Any = kit.actor("policy")
    obs = kit.environment.draw(prompts, kit.rng("prompts")).repeat_interleave(group, 0)
    logp = (policy.logits(obs) / temperature).log_softmax(-1)
    n, length, choices = logp.shape
    dice = torch.rand(n, length, 1, generator=kit.rng("rollout"), dtype=logp.dtype)
    action = (logp.exp().cumsum(-1) < dice).sum(-1).clamp_max(choices - 1)
    mask = torch.ones(n, length, dtype=torch.bool)
    if kit.environment.ends is not None:
        ended = action == kit.environment.ends
        mask = ended.cumsum(1) - ended.long() == 0
        action = action * mask
    score = kit.environment.score(obs, action)
    last = torch.arange(length) == mask.sum(1, keepdim=True) - 1
    reward = torch.where(last, score[:, None], torch.zeros(n, length, dtype=logp.dtype))
    ids = kit.state["ids"]
    kit.state["ids"] = {"group": ids["group"] + prompts, "episode": ids["episode"] + n}
    kit.log("reward", score.mean())
    return Batch(
        {
            "obs": obs,
            "action": action,
            "mask": mask,
            "reward": reward,
            "terminated": torch.ones(n, dtype=torch.bool),
            "truncated": torch.zeros(n, dtype=torch.bool),
            "logp_behavior": logp.gather(-1, action[..., None])[..., 0] * mask,
            "group": ids["group"] + torch.arange(prompts).repeat_interleave(group),
            "episode": ids["episode"] + torch.arange(n),
            "turn": torch.zeros(n, dtype=torch.long),
            "source": torch.full((n,), SOURCES.index("policy")),
            "age": torch.zeros(n, dtype=torch.long),
        }
    )


@piece("update", one_gradient=True)
def equal_step(kit: Kit, closure: Closure, *, length: float) -> tuple[dict[str, float | Tensor], bool]:
    """`theta <- theta - length grad / |grad|`: every step equally long; none where the gradient is zero."""
    made = closure()
    with torch.no_grad():
        for name, parameter in closure.params.items():
            parameter.sub_(length / made.norm.clamp_min(1e-12) * made.grads[name])
    return report(made), False


def on_toy(method: Method, *, prompts: int, group: int, lr: float) -> Method:
    """The method with its experience from a toy and plain gradient steps; whatever else it is stays."""
    collect: Piece = toy_rollouts(prompts=prompts, group=group)
    return method.swap("collect", collect).swap("update", sgd(lr=lr))


# -- tokens ------------------------------------------------------------------------------------------------------

MODULUS = 4


def token_task(prompts: int = 16, length: int = 6, vocabulary: int = 8, seed: int = 0) -> tuple[Toy, ToyPolicy]:
    """A table of logits per prompt and place, uniform at first; right when the tokens sum to the prompt's target mod 4.

    Every batch sees the prompts in turn; `draw(n)` wants a multiple of them.
    """
    target = torch.randint(MODULUS, (prompts,), generator=torch.Generator().manual_seed(seed))

    def draw(n: int, rng: torch.Generator) -> Tensor:
        return (torch.arange(n) % prompts)[:, None]

    def score(obs: Tensor, action: Tensor) -> Tensor:
        return (action.sum(1) % MODULUS == target[obs[:, 0]]).double()

    policy = ToyPolicy(torch.zeros(prompts, length, vocabulary), lambda table, obs: table[obs[:, 0]])
    policy.register_buffer("target", target)
    return Toy(draw, score), policy


@torch.no_grad()
def token_reward(policy: ToyPolicy) -> float:
    """The expected reward of a token policy, exactly: its sums modulo 4 by convolution over the places."""
    p = policy.table.softmax(-1)  # [prompts, length, vocabulary]
    residue = torch.arange(p.shape[-1]) % MODULUS
    place = torch.zeros(*p.shape[:2], MODULUS, dtype=p.dtype).index_add_(2, residue, p)
    total = place[:, 0]
    missing = (torch.arange(MODULUS)[:, None] - torch.arange(MODULUS)) % MODULUS  # [sum, so far] -> what it takes
    for t in range(1, p.shape[1]):
        total = (total[:, None] * place[:, t, missing]).sum(2)
    target: Tensor = policy.target  # type: ignore[assignment]
    return float(total.gather(1, target[:, None]).mean())


@torch.no_grad()
def token_entropy(policy: ToyPolicy) -> float:
    """The mean entropy of a decision, in nats, over prompts and places."""
    logp = policy.table.log_softmax(-1)
    return float(-(logp.exp() * logp).sum(-1).mean())


# -- skill -------------------------------------------------------------------------------------------------------

DRIFT = 0.8


def skill_task(features: int = 16, bias: float = -2.0) -> tuple[Toy, ToyPolicy]:
    """One decision, right or wrong: `P(right | x) = sigmoid(w . x + b + 0.8 sum(x))`, `x ~ N(0, 4/features I)`.

    Learned: `w` (zero at first) and the bias `b`, `features + 1` weights.
    """

    def draw(n: int, rng: torch.Generator) -> Tensor:
        x = torch.randn(n, features, generator=rng, dtype=torch.float64) * (4 / features) ** 0.5
        return torch.cat([x, torch.ones(n, 1, dtype=x.dtype)], 1)

    def score(obs: Tensor, action: Tensor) -> Tensor:
        return action[:, 0].double()

    def logits(table: Tensor, obs: Tensor) -> Tensor:
        right = obs @ table + DRIFT * obs[:, :-1].sum(1)
        return torch.stack([torch.zeros_like(right), right], 1)[:, None]

    start = torch.zeros(features + 1)
    start[-1] = bias
    return Toy(draw, score), ToyPolicy(start, logits)


@torch.no_grad()
def skill_reward(environment: Toy, policy: ToyPolicy, prompts: int = 4096) -> float:
    """The mean success probability over the same `prompts` fresh prompts every time."""
    obs = environment.draw(prompts, torch.Generator().manual_seed(12345))
    return float(policy.logits(obs).softmax(-1)[:, 0, 1].mean())


# -- bandit ------------------------------------------------------------------------------------------------------


def bandit_task(rewards: tuple[float, ...], start: tuple[float, ...]) -> tuple[Toy, ToyPolicy]:
    """One decision among arms of fixed rewards; `start` are the first probabilities."""
    table = torch.tensor(rewards, dtype=torch.float64)

    def draw(n: int, rng: torch.Generator) -> Tensor:
        return torch.zeros(n, 1, dtype=torch.long)

    def score(obs: Tensor, action: Tensor) -> Tensor:
        return table[action[:, 0]]

    policy = ToyPolicy(torch.tensor(start, dtype=torch.float64).log(), lambda t, obs: t.expand(len(obs), 1, -1))
    return Toy(draw, score), policy


# -- phrases -----------------------------------------------------------------------------------------------------

DECIDING = (0, 2, 4)


def phrase_task(
    seed: int, contexts: int = 64, features: int = 24, length: int = 8, words: int = 8, taught: float = 0.04
) -> tuple[Toy, ToyPolicy]:
    """Rows of 1 to 8 tokens from a linear softmax on random features; right when three of the places hold the words of
    a linear teacher, whatever the others hold. Token 0 ends a row. Taught until 4% are right.
    """
    g = torch.Generator().manual_seed(seed)
    seen = torch.randn(contexts, features, generator=g, dtype=torch.float64) / features**0.5
    teacher = torch.randn(len(DECIDING), features, words - 1, generator=g, dtype=torch.float64)
    target = torch.einsum("nf,tfv->ntv", seen, teacher).argmax(-1) + 1

    def draw(n: int, rng: torch.Generator) -> Tensor:
        return torch.randint(contexts, (n, 1), generator=rng)

    def score(obs: Tensor, action: Tensor) -> Tensor:
        return (action[:, DECIDING] == target[obs[:, 0]]).all(1).double()

    def logits(table: Tensor, obs: Tensor) -> Tensor:
        return torch.einsum("nf,tfv->ntv", seen[obs[:, 0]], table)

    policy = ToyPolicy(0.5 * torch.randn(length, features, words, generator=g, dtype=torch.float64), logits)
    policy.register_buffer("target", target)
    every = torch.arange(contexts)[:, None]
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.02)
    while phrase_success(policy) < taught:
        right = policy.logits(every).log_softmax(-1)[:, DECIDING].gather(-1, target[..., None])
        (grad,) = torch.autograd.grad(-right.mean(), policy.table)
        policy.table.grad = grad
        optimizer.step()
    policy.table.grad = None
    return Toy(draw, score, ends=0), policy


@torch.no_grad()
def phrase_success(policy: ToyPolicy) -> float:
    """The chance of a right phrase, exactly, over all contexts: its words, and no end before the last of them."""
    target: Tensor = policy.target  # type: ignore[assignment]
    p = policy.logits(torch.arange(len(target))[:, None]).softmax(-1)
    right = p[:, DECIDING].gather(-1, target[..., None])[..., 0].prod(1)
    between = [t for t in range(DECIDING[-1]) if t not in DECIDING]
    return float((right * (1 - p[:, between, 0]).prod(1)).mean())


@torch.no_grad()
def phrase_entropy(policy: ToyPolicy) -> float:
    """The mean entropy over contexts and places, in nats."""
    target: Tensor = policy.target  # type: ignore[assignment]
    logp = policy.logits(torch.arange(len(target))[:, None]).log_softmax(-1)
    return float(-(logp.exp() * logp).sum(-1).mean())


# -- recall ------------------------------------------------------------------------------------------------------


class RecallPolicy(nn.Module):
    """Tokens for a context, `z_t = W tanh(e_context + e_place)`: one hidden layer that all contexts share; float64."""

    provides = frozenset({"logp", "entropy", "hidden", "topk", "topk_ids"})

    def __init__(self, contexts: int, length: int, width: int, words: int, g: torch.Generator) -> None:
        super().__init__()

        def normal(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=g, dtype=torch.float64))

        self.context, self.place, self.outer = normal(contexts, width), normal(length, width), normal(words, width)
        with torch.no_grad():
            self.outer.mul_(width**-0.5)

    def hidden(self, obs: Tensor) -> Tensor:
        return (self.context[obs[:, 0], None] + self.place).tanh()

    def logits(self, obs: Tensor) -> Tensor:
        return self.hidden(obs) @ self.outer.T

    def evaluate(self, batch: Batch, want: frozenset[str]) -> dict[str, Tensor]:
        x, mask = self.hidden(batch["obs"]), batch["mask"]
        logp = (x @ self.outer.T).log_softmax(-1)
        top = logp.detach().topk(logp.shape[-1], -1)
        made = {
            "logp": logp.gather(-1, batch["action"][..., None])[..., 0] * mask,
            "entropy": -(logp.exp() * logp).sum(-1) * mask,
            "hidden": x * mask[..., None],
            "topk": top.values * mask[..., None],
            "topk_ids": top.indices * mask[..., None],
        }
        return {name: value for name, value in made.items() if name in want}


def recall_task(
    seed: int, contexts: int = 64, length: int = 4, words: int = 10, width: int = 48, taught: float = 0.63
) -> tuple[Toy, RecallPolicy]:
    """Every context has four words of its own; right when all of them are said. Taught until that happens 63% of the
    time."""
    g = torch.Generator().manual_seed(seed)
    policy = RecallPolicy(contexts, length, width, words, g)
    target = torch.randint(words, (contexts, length), generator=g)
    policy.register_buffer("target", target)

    def draw(n: int, rng: torch.Generator) -> Tensor:
        return torch.randint(contexts, (n, 1), generator=rng)

    def score(obs: Tensor, action: Tensor) -> Tensor:
        return (action == target[obs[:, 0]]).all(1).double()

    optimizer = torch.optim.Adam(policy.parameters(), lr=0.01)
    while recall_success(policy) < taught:
        optimizer.zero_grad()
        logp = policy.logits(torch.arange(contexts)[:, None]).log_softmax(-1)
        (-logp.gather(-1, target[..., None]).mean()).backward()
        optimizer.step()
    optimizer.zero_grad()
    return Toy(draw, score), policy


@torch.no_grad()
def recall_success(policy: RecallPolicy) -> float:
    """The chance of four right words, exactly, over all contexts."""
    target: Tensor = policy.target  # type: ignore[assignment]
    p = policy.logits(torch.arange(len(target))[:, None]).softmax(-1)
    return float(p.gather(-1, target[..., None])[..., 0].prod(1).mean())
