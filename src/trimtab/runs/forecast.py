"""Whether what a run will save fits on the disk."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.core.disk import size_words
from trimtab.core.state import State, checkpoints


def checkpoint_bytes(state: State) -> int:
    """About how large a checkpoint will be: all tensors of the state tree; text and numbers are not counted.

    An optimiser that has made no step holds nothing yet; it is counted as AdamW's two moments, as large as what it
    trains.
    """
    optimizers = [p for p in state.pieces.values() if isinstance(p, torch.optim.Optimizer) and not p.state]
    trained = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    return _bytes(state.tree()) + 2 * sum(p.nbytes for p in trained)


def _bytes(value: Any) -> int:
    if isinstance(value, (Tensor, np.ndarray)):
        return int(value.nbytes)
    if isinstance(value, Mapping):
        return sum(map(_bytes, value.values()))
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0


def disk_notes(state: State, folder: Path, keep: int) -> list[str]:
    """One sentence when the checkpoints still to come do not fit beside what is on the disk; else nothing.

    While one is written `keep` older ones are there; those that `folder` holds already take no more room.
    """
    each, free = checkpoint_bytes(state), shutil.disk_usage(folder).free
    needed = each * max(1, keep + 1 - len(checkpoints(folder)))
    if needed <= free:
        return []
    return [
        f"A checkpoint takes about {size_words(each)}, and with keep={keep} the run needs {size_words(needed)} for "
        f"them while one is written, but {size_words(free)} are free below {folder}. Make room or keep fewer, or a "
        f"save will fail."
    ]
