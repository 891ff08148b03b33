"""Select: which decisions may learn. Each piece shrinks `keep`."""

from __future__ import annotations

from trimtab.core.batch import Batch
from trimtab.core.piece import piece


@piece("select", slot="finished_only", reads=("truncated", "keep"), writes=("keep",))
def finished_only(batch: Batch) -> Batch:
    """Rows that met the length limit before they ended learn nothing: their outcome was never reached."""
    return batch.put(keep=batch.keep & ~batch.truncated[:, None])
