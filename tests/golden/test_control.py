"""Law 7 for options of the on-policy control methods, and for ragged episodes; `test_twins` has the methods."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.golden import control_twins as twins
from tests.golden.compared import agreed
from tests.golden.control_runs import built, params, ppo
from trimtab.core.loop import run
from trimtab.core.registry import find
from trimtab.methods.cases import case
from trimtab.stages.steps import episodes

torch.set_num_threads(1)


@pytest.mark.parametrize("options", [{"value_clip": None, "value_coef": 0.5, "entropy_coef": 0.01}])
@pytest.mark.parametrize("seed", [0, 1])
def test_ppo_options_agree_with_the_twin(seed: int, options: dict[str, Any]) -> None:
    assert agreed(ppo(seed, **options), "ppo") == 2


def test_advantages_of_ragged_episodes_agree_with_the_sum_that_defines_them() -> None:
    method = find("a2c")().swap("collect", episodes(count=5)).drop("flat").set("credit.lam", 0.8)
    environment, models = built(method, 4)
    start = params(models["policy"])
    batch = next(run(method, environment, models, until=1, seed=4)).batch
    assert not bool(batch["mask"].all())
    expected = twins.advantages(batch, lambda s: float(twins.value(start, "critic.", s)), 0.99, 0.8)
    for (i, t), (a, target) in expected.items():
        assert float(batch["advantage"][i, t]) == pytest.approx(a, abs=1e-12)
        assert float(batch["value_target"][i, t]) == pytest.approx(target, abs=1e-12)
    assert bool((batch["advantage"][~batch["mask"]] == 0).all())


def test_cases_have_both_kinds_of_ends() -> None:
    k = case("steps", 0)
    method = k.shrink(find("a2c")(horizon=40))
    batch = next(run(method.set("collect.horizon", 40), k.environment, k.models_of(method), until=1)).batch
    assert int(batch["terminated"].sum()) > 0
    assert int(batch["truncated"].sum()) > 0
