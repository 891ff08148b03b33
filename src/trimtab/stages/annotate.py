"""No-gradient columns on demand."""

from __future__ import annotations

from trimtab.core.batch import Batch
from trimtab.core.kit import Kit
from trimtab.core.piece import piece


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
