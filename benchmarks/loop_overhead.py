"""What a turn of the loop costs when the method does nothing: the price of the core itself.

    python benchmarks/loop_overhead.py [--turns 5000]

Prints the median, over blocks of 100 turns, of microseconds a turn, with an update that never asks for a gradient.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch import nn

from trimtab.core.batch import Batch
from trimtab.core.kit import Kit
from trimtab.core.loop import run
from trimtab.core.method import Method, Track
from trimtab.core.piece import piece

ROWS = Batch({"mask": torch.ones(8, 4, dtype=torch.bool), "reward": torch.zeros(8, 4)})


@piece("collect", writes=("mask", "reward"))
def nothing_new(kit: Kit) -> Batch:
    return ROWS


@piece("update")
def nothing(kit: Kit, closure: Any) -> tuple[dict[str, float], bool]:
    return {}, False


class Still:
    """An environment without state."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, tree: Any) -> None:
        """Nothing to restore."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5000)
    turns = parser.parse_args().turns
    torch.set_num_threads(1)
    method = Method("null", pieces=(nothing_new(),), tracks=(Track("policy", "policy", (), nothing()),))
    times, started = [], time.perf_counter()
    for step in run(method, Still(), nn.Linear(4, 4), until=turns):
        if step.turn % 100 == 0:
            now = time.perf_counter()
            times.append((now - started) * 1e4)
            started = now
    spread = f"{min(times):.0f} to {max(times):.0f}"
    print(f"{statistics.median(times):.0f} us a turn (median of {len(times)} blocks; {spread})")


if __name__ == "__main__":
    main()
