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
    """draw: `(n, rng) -> obs [n, ...]`. score: `(obs [N, ...], action [N, T]) -> reward [N]`. Nothing is remembered."""

    draw: Callable[[int, torch.Generator], Tensor]
    score: Callable[[Tensor, Tensor], Tensor]

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
def toy_rollouts(kit: Kit, *, prompts: int, group: int) -> Batch:
    """`prompts x group` rows of the policy: `group` tries at each thing drawn; the last decision is paid."""
    policy: Any = kit.actor("policy")
    obs = kit.environment.draw(prompts, kit.rng("prompts")).repeat_interleave(group, 0)
    logp = policy.logits(obs).log_softmax(-1)
    n, length, choices = logp.shape
    dice = torch.rand(n, length, 1, generator=kit.rng("rollout"), dtype=logp.dtype)
    action = (logp.exp().cumsum(-1) < dice).sum(-1).clamp_max(choices - 1)
    score = kit.environment.score(obs, action)
    mask = torch.ones(n, length, dtype=torch.bool)
    reward = torch.zeros(n, length, dtype=logp.dtype)
    reward[:, -1] = score
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
            "logp_behavior": logp.gather(-1, action[..., None])[..., 0],
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
