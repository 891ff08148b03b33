"""A policy for environments with numbered states: one row of logits for each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.batch import Batch
from trimtab.core.contracts import Decision


class TableSoftmax(nn.Module):
    """`pi(a|s) = softmax(logits[s])_a`, and a table of values `V(s)` beside it if asked for; float64.

    scale: logits begin `N(0, scale^2)`, drawn from `seed`; uniform at 0. critic: whether there are values, 0 at first.
    """

    def __init__(self, states: int, actions: int, *, scale: float = 0.0, critic: bool = False, seed: int = 0) -> None:
        super().__init__()
        draw = torch.randn(states, actions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.logits = nn.Parameter(scale * draw)
        self.values = nn.Parameter(torch.zeros(states, dtype=torch.float64)) if critic else None
        self.provides = frozenset({"logp", "entropy"} | ({"value"} if critic else set()))

    @property
    def probs(self) -> Tensor:
        """`pi`, `[S, A]`, with gradient."""
        return self.logits.softmax(-1)

    def evaluate(self, batch: Batch, want: frozenset[str]) -> dict[str, Tensor]:
        obs, mask = batch["obs"], batch["mask"]
        # A gather of rows and not `[obs]`, whose second derivative is forty times as slow.
        logp = self.logits.log_softmax(-1).index_select(0, obs.flatten()).view(*obs.shape, -1)
        made: dict[str, Tensor] = {}
        if "logp" in want:
            made["logp"] = logp.gather(-1, batch["action"][..., None])[..., 0] * mask
        if "entropy" in want:
            made["entropy"] = -(logp.exp() * logp).sum(-1) * mask
        if "value" in want and self.values is not None:
            made["value"] = self.values[obs] * mask
        return made

    def act(self, obs: Tensor, carry: Any, rng: torch.Generator) -> tuple[Decision, Any]:
        with torch.inference_mode():
            logp = self.logits.log_softmax(-1)[obs]
            dice = torch.rand(len(obs), 1, generator=rng, dtype=logp.dtype)
            action = (logp.exp().cumsum(-1) < dice).sum(-1).clamp_max(logp.shape[-1] - 1)
            return Decision(action, logp.gather(-1, action[:, None])[:, 0]), carry

    def mode(self, obs: Tensor) -> Tensor:
        """The most likely action of each state."""
        return self.logits[obs].argmax(-1)
