"""What the core expects of a policy, an environment and an update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from trimtab.core.batch import Batch

# Results of a policy, and what turns their gradients into those of its parameters.
Pullback = tuple[dict[str, Tensor], Callable[[Mapping[str, Tensor]], list[Tensor]]]


class Policy(Protocol):
    """Any `nn.Module` that can say what it thinks of decisions.

    provides: the names `evaluate` can return, out of logp, entropy, hidden, topk, topk_ids, mean, std, value, score,
    energy. A method whose pieces want anything else is refused before the first step.
    """

    provides: frozenset[str]

    def evaluate(self, batch: Batch, want: frozenset[str]) -> Mapping[str, Tensor]:
        """Exactly what was asked, `[N, T, ...]` or `[N, ...]`, with gradient unless it is off; 0 where `mask` is 0.

        It must not depend on padding or on which rows are evaluated together, beyond rounding.

        A policy may also have `pullback(batch, want)`: the same results without a graph, and a function from their
        gradients (by name) to those of `parameters()`, in order; or None where it has no such short cut. It is taken
        where one gradient at the current parameters is asked for, and must agree with `evaluate` to rounding.
        """


class Decision(NamedTuple):
    """What was decided for each of E observations: `action` `[E, *A]`, and its log-probability `[E]` if it has one."""

    action: Tensor
    logp: Tensor | None = None


class Actor(Protocol):
    """A policy that decides one step at a time (environments); `carry` is whatever it remembers between steps.

    An `act` wrap surrounds one with another. Where it changes what the policy sees it also has `see(obs)`, the same
    change without a decision, and where it learns from what it sees (running moments) `learn(obs)`, which nobody but
    collect calls. A wrap passes on what it does not have itself (`__getattr__`).
    """

    def act(self, obs: Any, carry: Any, rng: torch.Generator) -> tuple[Any, Any]:
        """A `Decision` for each observation `[E, *O]`, and the new carry. All randomness comes from `rng`."""

    def mode(self, obs: Any) -> Any:
        """The most likely action for each observation, `[E, *A]`: how an evaluation without chance acts."""


class Environment(Protocol):
    """What answers decisions. Its state is part of the state tree; collect pieces know its other methods."""

    def state_dict(self) -> Mapping[str, Any]:
        """Everything that changes while it is used, of tensors, numbers, text, lists and dicts."""

    def load_state_dict(self, state: Any) -> None:
        """Go on exactly where `state_dict` was taken."""


class Update(Protocol):
    """A piece of stage "update": moves the track's parameters and says what happened."""

    def __call__(self, kit: Any, closure: Any, **options: Any) -> tuple[Mapping[str, float | Tensor], bool]:
        """Logs, and whether this track should stop for the rest of the batch.

        `closure(params, where, create_graph)` gives loss and gradient on any rows at any parameters, `closure.terms`
        and `closure.micro` the un-reduced terms.
        """
