"""Law 7 for the options and presets of the off-policy methods; `test_twins` has the methods themselves."""

from __future__ import annotations

import pytest
import torch

from tests.golden.compared import agreed
from tests.golden.control_runs import TWINS
from tests.golden.replay_runs import CASES, turns

torch.set_num_threads(1)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", sorted(set(CASES) - set(TWINS)))
def test_settings_agree_with_the_twin(name: str, seed: int) -> None:
    assert agreed(turns(name, seed), name) == CASES[name][3]
