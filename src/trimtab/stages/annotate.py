"""No-gradient columns on demand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.core.batch import Batch
from trimtab.core.kit import Kit
from trimtab.core.piece import piece
from trimtab.stages.signals import mismatch


@piece("annotate", slot="logp_old", reads=("action", "mask"), writes=("logp_old",))
def logp_old(kit: Kit, batch: Batch, *, always: bool = False) -> Batch:
    """`logp_old` [N, T]: log-probability of each decision under the policy at the start of this batch's updates.

    Left out when the batch gives exactly one gradient: the current policy *is* the old one then, so a ratio takes
    its own log-probability, detached, and a forward pass over the batch is saved. always: write it all the same, for
    a piece that reads it before the update.
    """
    if kit.single and not always:
        return batch
    return batch.put(logp_old=kit.evaluate("policy", batch, {"logp"})["logp"])


@piece("annotate", slot="logp_ref", reads=("action", "mask"), writes=("logp_ref",), uses=("reference",))
def logp_ref(kit: Kit, batch: Batch) -> Batch:
    """`logp_ref` [N, T]: log-probability of each decision under the copy named "reference"."""
    return batch.put(logp_ref=kit.evaluate("reference", batch, {"logp"})["logp"])


def _every_sane(options: Mapping[str, Any]) -> str | None:
    every = options["every"]
    return None if isinstance(every, int) and every >= 1 else f"every={every!r} must be a whole number, at least 1"


@piece("annotate", slot="sampler_mismatch", reads=("action", "mask", "logp_behavior"), validate=_every_sane)
def sampler_mismatch(kit: Kit, batch: Batch, *, every: int = 1) -> Batch:
    """How far the sampler's log-probabilities are from the trainer's, before the first update of each `every`th batch.

    With d = log pi(a) - logp_behavior over the decisions, logs `mismatch` = mean |d|, `mismatch_max` = max |d| and
    `mismatch_kl` = mean(exp(d) - 1 - d) (see `signals.mismatch`). It costs a forward pass:
    `method.then(sampler_mismatch(every=10))`. The mean |d| of every update is logged without it (`sampler_gap`).
    """
    if kit.clock.turns % every:
        return batch
    decisions = batch.mask.bool()
    if bool(decisions.any()):
        logp = kit.evaluate("policy", batch, {"logp"})["logp"]
        for name, value in mismatch(logp[decisions], batch.logp_behavior[decisions]).items():
            kit.log("mismatch" if name == "gap" else f"mismatch_{name}", value)
    return batch
