"""The gradient methods on a table of logits, turn by turn beside their twins."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tests.golden.compared import Compared
from tests.golden.momentum_twins import Twin
from trimtab.core.loop import run
from trimtab.core.registry import find
from trimtab.environments.tabular import TabularEnvironment, random_mdp
from trimtab.policies.tabular import TableSoftmax

BUILT = {
    "gpomdp": lambda **o: find("gpomdp")(**o),
    "n_sgdm": lambda **o: find("n_sgdm")(**o),
    "n_pg_igt": lambda **o: find("n_pg_igt")(**o),
    "harpg": lambda **o: find("harpg")(**o),
    "n_harpg": lambda **o: find("harpg")(preset="normalised", **o),
}


def fresh(seed: int, **how: Any) -> tuple[TabularEnvironment, TableSoftmax]:
    how = {"states": 4, "horizon": 5, **how}
    return random_mdp(**how, seed=seed), TableSoftmax(how["states"], 3, scale=1.0, seed=seed)


def tables(policy: TableSoftmax) -> list[list[float]]:
    made: list[list[float]] = policy.logits.detach().tolist()
    return made


def turns(name: str, seed: int) -> Iterator[Compared]:
    """Five turns of whole episodes of several lengths."""
    environment, policy = fresh(seed, final=True)
    method = BUILT[name](lr=0.7).set("collect.count", 3)
    method = method.set("collect.also.count", 2) if "harpg" in name else method
    twin, lengths = Twin(name, tables(policy), 0.7), set()
    before = policy.logits.detach().clone()
    for step in run(method, environment, {"policy": policy}, until=5, seed=seed):
        between = step.state.copies.get("midpoint")
        twin.update(step.batch, between.memory["q"] if between else None)
        lengths |= set(step.batch.mask.sum(1).tolist())
        got, expected = policy.logits.detach().clone(), torch.tensor(twin.theta, dtype=torch.float64)
        yield Compared({"logits": got}, {"logits": expected}, {"logits": before})
        before = got
    assert len(lengths) > 1, "rows of one length were compared"
