"""BNPO: the numbers of its card."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.faults.test_core_faults import credited, scored
from tests.golden import test_golden, twins
from trimtab.core.errors import MethodError
from trimtab.core.registry import find
from trimtab.methods.language.bnpo import beta_law, beta_normalised, inverse_density
from trimtab.stages.credit import group_mean, group_normalised


def rates(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def groups(*right: int, n: int = 8) -> Any:
    """One group of `n` responses for each number, so many of them right."""
    rewards: list[float] = []
    ids: list[int] = []
    for g, k in enumerate(right):
        rewards += [1.0] * k + [0.0] * (n - k)
        ids += [g] * n
    return scored(rewards, ids)


@pytest.mark.parametrize(
    ("p", "law", "weights"),
    [
        ((0.25, 0.5, 0.75, 0.5), (1.833333, 1.833333), (0.889838, 0.700157, 0.889838, 0.700157)),
        ((1 / 8, 1 / 4, 1 / 2, 1 / 8), (1.416667, 2.25), (0.703551, 0.639072, 0.794758, 0.703551)),
    ],
)
def test_the_law_and_the_weights_of_the_card(p: Any, law: Any, weights: Any) -> None:
    found = beta_law(rates(*p), 1 / 3)
    assert found == pytest.approx(law, abs=1e-6)
    assert inverse_density(rates(*p), *found, 1e6).tolist() == pytest.approx(weights, abs=1e-6)


def test_advantages_of_the_card() -> None:
    a = credited(beta_normalised(), groups(2, 4, 6, 4))[:, 0]
    assert a[0].item() == pytest.approx(0.667379, abs=1e-6)
    assert a[7].item() == pytest.approx(-0.222460, abs=1e-6)
    assert a.view(4, 8).sum(1).abs().max() < 1e-12, "each group's advantages sum to zero"


def test_reinforce_and_grpo_are_members() -> None:
    batch = groups(1, 3, 5, 7)
    flat = credited(beta_normalised(alpha=1.0, beta=1.0), batch)
    assert torch.equal(flat, credited(group_mean(), batch))
    half = credited(beta_normalised(alpha=1.5, beta=1.5), batch)
    population = credited(group_normalised(ddof=0, eps=0.0), batch)
    assert torch.allclose(half, math.pi / 8 * population, atol=1e-12, rtol=0)
    assert 1 / float(inverse_density(rates(0.5), 1.5, 1.5, 1e6)) == pytest.approx(4 / math.pi)


def test_flipping_rewards_flips_the_law_and_the_advantages() -> None:
    assert beta_law(rates(0.1, 0.3, 0.2), 1 / 3) == pytest.approx(beta_law(rates(0.9, 0.7, 0.8), 1 / 3)[::-1])
    a, b = credited(beta_normalised(), groups(1, 3, 6)), credited(beta_normalised(), groups(7, 5, 2))
    assert torch.allclose(a.sort(0).values, (-b).sort(0).values, atol=1e-12)


@pytest.mark.parametrize(
    ("a", "b", "reinforce", "grpo", "ours"),
    [
        (1, 1, 0.16667, 0.15421, 0.14887),
        (2, 6, 0.16667, 0.15421, 0.07764),
        (3, 3, 0.21429, 0.15421, 0.13889),
        (1.5, 1.5, 0.18750, 0.15421, 0.15421),
        (0.5, 3, 0.09524, 0.154, 0.05804),
    ],
)
def test_no_beta_density_gives_a_smaller_second_moment(
    a: float, b: float, reinforce: float, grpo: float, ours: float
) -> None:
    def area(x: float, y: float) -> float:
        return math.lgamma(x) + math.lgamma(y) - math.lgamma(x + y)

    def moment(alpha: float, beta: float) -> float:
        """Int f_D p (1 - p) / f_N^2 dp, in closed form."""
        power = area(a + 1 - 2 * (alpha - 1), b + 1 - 2 * (beta - 1))
        return math.exp(power + 2 * area(alpha, beta) - area(a, b))

    best = (1 + a / 3, 1 + b / 3)
    assert moment(1, 1) == pytest.approx(reinforce, abs=1e-5)
    assert moment(1.5, 1.5) == pytest.approx(grpo, abs=3e-4)
    assert moment(*best) == pytest.approx(ours, abs=1e-5)
    assert moment(*best) == pytest.approx(math.exp(3 * area(*best) - area(a, b)))
    for da in (-0.05, 0.05):
        for db in (-0.05, 0.05):
            assert moment(best[0] + da, best[1] + db) > moment(*best)


def test_degenerate_batches_have_one_outcome() -> None:
    a = credited(beta_normalised(), groups(0, 8, 2, 4))
    assert torch.isfinite(a).all()
    assert a[:16].abs().max() == 0, "density 0 and no signal: exactly 0, not 1e6 times 0 or nan"
    assert a[16:, :2].abs().min() > 0
    assert beta_law(rates(0.25), 1 / 3) == (1.0, 1.0), "one prompt"
    assert beta_law(rates(0.5, 0.5, 0.5), 1 / 3) == (1.0, 1.0), "equal rates"
    assert beta_law(rates(0.0, 0.0), 1 / 3) == (1.0, 1.0)
    assert beta_law(rates(0.0, 1.0), 1 / 3) == (1.0, 1.0), "a variance above mu (1 - mu) goes to the floor"
    alone = credited(beta_normalised(), scored([1.0, 1.0, 0.0, 0.0, 1.0], [0, 1, 1, 2, 2]))
    assert alone[0].abs().max() == 0, "a group of one"
    assert alone[1:, :2].abs().min() > 0


def test_rewards_outside_the_range_are_refused_and_another_range_is_mapped() -> None:
    with pytest.raises(MethodError, match=r"rewards in \[0.0, 1.0\] and got 2.0"):
        credited(beta_normalised(), scored([2.0, 0.0, 1.0], [0, 0, 0]))
    wide = scored([1.0, -1.0, -1.0, 1.0, -1.0, 1.0], [0, 0, 0, 1, 1, 1])
    unit = scored([1.0, 0.0, 0.0, 1.0, 0.0, 1.0], [0, 0, 0, 1, 1, 1])
    mapped = credited(beta_normalised(lower=-1.0), wide)
    assert torch.equal(mapped, credited(beta_normalised(), unit))


def test_the_largest_weight_holds() -> None:
    p = rates(*[0.5 + 0.01 * (-1) ** i for i in range(10)], 0.05)
    law = beta_law(p, 1 / 3)
    assert inverse_density(p, *law, 10.0).max() == 10.0
    assert inverse_density(p, *law, 1e6).max() > 10.0


@pytest.mark.parametrize("strength", [0.0, 1 / 6, 1 / 3])
def test_strength_agrees_with_the_twin(strength: float) -> None:
    method = test_golden.toy(find("bnpo")(test_golden.stale(), strength=strength))
    test_golden.agree("bnpo", method, twins.bnpo, 4, strength=strength)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"alpha": 1.5}, "both or neither"),
        ({"alpha": 0.5, "beta": 2.0}, "U-shaped"),
        ({"upper": 0.0}, "must be above"),
        ({"most": 0.0}, "above 0"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(MethodError, match=match):
        find("bnpo")(**options)
