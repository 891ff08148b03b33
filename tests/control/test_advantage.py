"""Generalised advantages: the card's numbers, ends of both kinds, and normalisation within an update."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trimtab.core.batch import Batch
from trimtab.core.errors import MethodError
from trimtab.core.piece import Piece
from trimtab.stages.advantage import gae, last_decisions, normalised


class Bare:
    """A kit that has nothing."""

    def of(self, piece: Piece) -> Any:
        return self


BARE = Bare()


def batch(reward: list[float], value: list[float], bootstrap: float, **ends: int) -> Batch:
    """One row; `terminated=1` ends the episode after step 1."""
    n = len(reward)
    flags = {name: torch.zeros(1, n, dtype=torch.bool) for name in ("terminated", "truncated")}
    for name, at in ends.items():
        flags[name][0, at] = True
    after = [*value[1:], bootstrap]
    return Batch(
        {
            "reward": torch.tensor([reward], dtype=torch.float64),
            "value": torch.tensor([value], dtype=torch.float64),
            "next_value": torch.tensor([after], dtype=torch.float64),
            "mask": torch.ones(1, n, dtype=torch.bool),
            **flags,
        }
    )


def advantage(given: Batch, **options: Any) -> list[float]:
    return gae(**options)(BARE, given)["advantage"][0].tolist()


CARD = ([1.0, 0.0, 2.0], [0.5, 0.4, 0.3], 0.2)


def test_card_check_1() -> None:
    made = gae(gamma=0.99, lam=0.95)(BARE, batch(*CARD))
    assert made["advantage"][0].tolist() == pytest.approx([2.477986, 1.682069, 1.898], abs=1e-6)
    assert made["value_target"][0].tolist() == pytest.approx([2.977986, 2.082069, 2.198], abs=1e-6)


def test_an_end_cuts_the_recursion() -> None:
    third = 1.898
    second = 0 - 0.4  # terminated: no value after it, and nothing of the third step
    first = 1 + 0.99 * 0.4 - 0.5 + 0.99 * 0.95 * second
    assert advantage(batch(*CARD, terminated=1)) == pytest.approx([first, second, third], abs=1e-9)


def test_a_cut_is_bootstrapped_and_cuts_the_recursion_all_the_same() -> None:
    given = batch(*CARD, truncated=1)
    beyond = given["next_value"].clone()
    beyond[0, 1] = 7.0  # the value of the true next observation, not of the episode that began after the cut
    given = given.put(next_value=beyond)
    second = 0 + 0.99 * 7.0 - 0.4
    first = 1 + 0.99 * 0.4 - 0.5 + 0.99 * 0.95 * second
    assert advantage(given) == pytest.approx([first, second, 1.898], abs=1e-9)
    done = advantage(given, truncation="done")
    assert done == pytest.approx(advantage(batch(*CARD, terminated=1)), abs=1e-12)


def test_card_check_2_lambda_1_is_the_discounted_return() -> None:
    made = gae(gamma=0.9, lam=1.0)(BARE, batch(*CARD))
    returns = [1 + 0.81 * 2 + 0.729 * 0.2, 0.9 * 2 + 0.81 * 0.2, 2 + 0.9 * 0.2]
    assert made["value_target"][0].tolist() == pytest.approx(returns, abs=1e-12)


def test_lambda_0_is_the_td_error() -> None:
    expected = [1 + 0.99 * 0.4 - 0.5, 0.99 * 0.3 - 0.4, 2 + 0.99 * 0.2 - 0.3]
    assert advantage(batch(*CARD), lam=0.0) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("options", [{"gamma": 1.5}, {"lam": -0.1}, {"truncation": "stop"}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(MethodError, match=next(iter(options))):
        gae(**options)


def test_last_decisions_of_padded_rows() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]], dtype=torch.bool)
    assert last_decisions(mask).tolist() == [[False, True, False], [False, False, True]]


# -- normalisation within an update --------------------------------------------------------------------------------


def scaled(values: list[float], keep: list[bool] | None = None, piece: Piece | None = None) -> list[float]:
    column = torch.tensor(values, dtype=torch.float64)[:, None]
    flags = torch.tensor(keep or [True] * len(values))[:, None]
    rows = Batch({"advantage": column, "keep": flags, "mask": torch.ones_like(flags)})
    return (piece or normalised())(BARE, rows, {})["advantage"][:, 0].tolist()


def test_normalised_has_mean_0_and_unbiased_deviation_1() -> None:
    made = torch.tensor(scaled([1.0, 2.0, 4.0, 9.0]), dtype=torch.float64)
    assert float(made.mean()) == pytest.approx(0, abs=1e-12)
    assert float(made.std()) == pytest.approx(1, abs=1e-7)  # ddof 1; 1e-8 is added to the deviation


@pytest.mark.parametrize("values", [[0.1] * 5, [1e9 + 0.1] * 3, [3.7]])
def test_card_check_11_equal_advantages_and_a_single_one_become_exactly_0(values: list[float]) -> None:
    assert scaled(values) == [0.0] * len(values)


def test_only_kept_decisions_count() -> None:
    made = scaled([1.0, 3.0, 100.0], [True, True, False])
    assert made == pytest.approx([-(0.5**0.5), 0.5**0.5, 0.0], abs=1e-7)
