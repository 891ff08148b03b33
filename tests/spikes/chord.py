"""Spike: `chord(d3s(bapo()))` on toy tokens (cards `d3s`, `chord`): a collect wrap, a select, a bound, two losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from trimtab.core.batch import Batch
from trimtab.core.kit import Kit
from trimtab.core.method import Method
from trimtab.core.piece import Schedule, piece
from trimtab.core.registry import Neutral, method
from trimtab.core.schedules import complement, linear
from trimtab.core.terms import Term
from trimtab.methods.language.bases import grpo
from trimtab.stages.surrogate import scaled

from .tokens import expert_batch

# -- D3S ---------------------------------------------------------------------------------------------------------


@piece("annotate", slot="entropy_old", reads=("action", "mask"), writes=("entropy_old",))
def entropy_old(kit: Kit, batch: Batch) -> Batch:
    """Entropy of each decision under the policy at the start of this batch's updates, `[N, T]`."""
    return batch.put(entropy_old=kit.evaluate("policy", batch, {"entropy"})["entropy"])


def widest(a: Tensor, n: int) -> Tensor:
    """Indices of the `n` values with the largest variance: k smallest and n-k largest of the sorted list."""
    order = torch.argsort(a, stable=True)
    best, kept = -math.inf, order[:n]
    for k in range(n + 1):
        chosen = torch.cat([order[:k], order[len(a) - (n - k) :]])
        variance = float(a[chosen].var(correction=0))
        if variance > best + 1e-12:
            best, kept = variance, chosen
    return kept


@piece("select", slot="down_sample", reads=("advantage", "entropy_old", "mask"), writes=("keep",))
def down_sample(kit: Kit, batch: Batch, *, share: float = 0.5, tokens: float = 0.3) -> Batch:
    """Keep the `share` of rows of largest advantage variance, and of these the share `tokens` by |A| entropy."""
    mask = batch.mask.bool()
    a = (batch.advantage * mask).sum(1) / mask.sum(1).clamp_min(1)
    jitter = torch.randperm(len(a), generator=kit.rng("ties"))  # binary rewards tie all the time
    n = max(2, round(share * len(a)))
    kept = jitter[widest(a[jitter], n)]
    on = torch.zeros(len(a), dtype=torch.bool).index_fill_(0, kept, True)[:, None] & mask
    if tokens >= 1:
        return batch.put(keep=on)
    key = torch.where(on, batch.advantage.abs() * batch.entropy_old, -math.inf).flatten()
    count = max(1, round(tokens * int(on.sum())))
    keep = torch.zeros_like(key, dtype=torch.bool).index_fill_(0, key.topk(count).indices, True)
    return batch.put(keep=keep.reshape(mask.shape))


ROWS, TOKENS = linear(0.25, 0.75), linear(0.1, 0.5)


@method(world="language", title="D3S (spike)", base=grpo, case="tokens", register=False,
        neutral=Neutral({"share": 1.0, "tokens": 1.0}, level="exact"))  # fmt: skip
def d3s(base: Method, *, share: float | Schedule = ROWS, tokens: float | Schedule = TOKENS) -> Method:
    """Edits to grpo: learn from the rows of largest advantage variance and their tokens of largest |A| entropy."""
    return base.then(entropy_old(), down_sample(share=share, tokens=tokens))


# -- CHORD -------------------------------------------------------------------------------------------------------


@piece("collect", writes=("source",))
def with_experts(kit: Kit, *, inner: Callable[[], Batch], experts: int = 4) -> Batch:
    """A wrap: `experts` demonstrations after the rows of the collect inside."""
    rows = inner()
    return Batch.cat([rows, expert_batch(kit.environment, experts)]) if experts else rows


@piece("loss", slot="imitation", reads=("mask",), wants=("logp",), rows="expert")
def imitation(kit: Kit, batch: Batch, now: Mapping[str, Tensor], *, mu: float = 0.1, phi: bool = True) -> Term:
    """`mu * -sg(p (1 - p)) log p` on expert tokens; without phi the plain negative log-likelihood."""
    logp = now["logp"]
    p = logp.detach().exp()
    return Term(-mu * (p * (1 - p) if phi else torch.ones_like(p)) * logp, "imitation")


@method(world="language", title="CHORD (spike)", base=grpo, case="tokens", register=False,
        neutral=Neutral({"mu": 0.0, "experts": 0}, level="exact"))  # fmt: skip
def chord(base: Method, *, mu: float | Schedule = 0.1, phi: bool = True, experts: int = 4) -> Method:
    """Edits to grpo: expert rows join the batch; the loss is `(1 - mu) surrogate + mu imitation`."""
    return (
        base.wrap("collect", with_experts(experts=experts))
        .wrap("surrogate", scaled(by=complement(mu)))
        .then(imitation(mu=mu, phi=phi))
    )
