"""Sampling error: how far the actions in a batch are, by chance or by design, from what a policy would do."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.batch import Batch
from trimtab.core.kit import Kit
from trimtab.core.piece import piece
from trimtab.core.terms import mask_of


def count_error(probs: Tensor, obs: Tensor, action: Tensor) -> float:
    """`sum_s n_s / N KL(counts(.|s) / n_s || pi(.|s))` of numbered states and actions, in nats.

    probs [S, A]; obs, action long `[N]`. Never negative; 0 where the counts are proportional to the policy. On policy
    its expectation is about `S_visited (A - 1) / (2 N)`.
    """
    counts = torch.zeros_like(probs).index_put_((obs, action), torch.ones(len(obs), dtype=probs.dtype), True)
    share = counts / counts.sum(1, keepdim=True).clamp_min(1)
    return float((torch.xlogy(counts, share) - torch.xlogy(counts, probs)).sum() / len(obs))


def _last_layer(policy: nn.Module) -> list[nn.Parameter]:
    """What may fit the actions: the last linear layer of the policy, and what belongs to no linear layer (log std)."""
    actor: nn.Module = getattr(policy, "actor", policy)
    linear = [m for m in actor.modules() if isinstance(m, nn.Linear)]
    hidden = {id(p) for m in linear[:-1] for p in m.parameters()}
    return [p for p in actor.parameters() if id(p) not in hidden]


def _sane(options: Mapping[str, Any]) -> str | None:
    for name in ("every", "epochs"):
        if options[name] < 1:
            return f"{name}={options[name]} must be at least 1"
    return None if options["lr"] > 0 else f"lr={options['lr']} must be above 0"


@piece("annotate", slot="sampling_error", reads=("obs", "action", "mask", "keep"), validate=_sane)
def sampling_error(kit: Kit, batch: Batch, *, every: int = 10, epochs: int = 250, lr: float = 1e-3) -> Batch:
    """Log `sampling_error`, `mean [log pi_MLE(a|s) - log pi(a|s)]` over the batch, in nats.

    `pi_MLE` begins as the policy; its last layer and its log std are fitted to the batch by `epochs` Adam steps of size
    `lr` on all of it, so the number is at least 0 up to how well that went. It looks before the policy is updated on
    what it measures, so it stands among the annotations and not among the probes (`method.then(sampling_error())`).
    The batch and the run are as without it. every: in each so many-th turn.
    Corrado and Hanna 2023, arXiv 2311.08290, and its released code.
    """
    if kit.clock.turns % every:
        return batch
    fitted: Any = copy.deepcopy(kit.models["policy"])
    plain, mask = batch.guarded(None), mask_of(batch)
    weight = mask / mask.sum().clamp_min(1)
    chosen = _last_layer(fitted)
    with torch.enable_grad():
        optimizer = torch.optim.Adam(chosen, lr=lr)
        start = None
        for _ in range(epochs):
            likely = (fitted.evaluate(plain, frozenset({"logp"}))["logp"] * weight).sum()
            start = likely.detach() if start is None else start
            for parameter, grad in zip(chosen, torch.autograd.grad(-likely, chosen, materialize_grads=True)):
                parameter.grad = grad
            optimizer.step()
    assert start is not None
    end = (fitted.evaluate(plain, frozenset({"logp"}))["logp"] * weight).sum()
    kit.log("sampling_error", end.detach() - start)
    return batch
