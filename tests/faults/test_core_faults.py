"""Law 6: degenerate data has one documented outcome. Never a silent 0.0, never a NaN in the parameters."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.laws.checks import digest
from tests.spikes.tokens import TokenTask, case, token_rollouts
from trimtab.core.batch import Batch
from trimtab.core.errors import NonFiniteError
from trimtab.core.kit import Kit
from trimtab.core.loop import begin, run
from trimtab.core.method import Method
from trimtab.core.piece import Piece, piece
from trimtab.core.registry import find
from trimtab.core.state import load, save
from trimtab.stages.credit import group_mean, group_normalised, leave_one_out

torch.set_num_threads(1)

METHODS = ("reinforce", "rloo", "grpo")
CREDITS = [
    group_mean(), leave_one_out(), group_normalised(), group_normalised(scale="none"), group_normalised(scale="batch"),
    group_normalised(ddof=0), group_normalised(eps=0.0), group_normalised(scale="batch", eps=0.0),
]  # fmt: skip
EACH = pytest.mark.parametrize("name", METHODS)


@piece("collect", writes=("reward", "mask", "group", "keep"))
def spoiled(kit: Kit, *, inner: Any, how: str) -> Batch:
    """A wrap: the same rollouts with one thing gone wrong."""
    rows: Batch = inner()
    n = len(rows)
    last = rows.mask.cumsum(1) == rows.mask.sum(1, keepdim=True)
    last = last & rows.mask
    if how == "equal":
        return rows.put(reward=torch.where(last, 0.1, 0.0).double())
    if how == "alone":
        return rows.put(group=rows.group.max() + 1 + torch.arange(n))
    if how == "empty rows":
        empty = torch.arange(n) % 2 == 0
        return rows.put(mask=rows.mask & ~empty[:, None])
    if how == "nothing":
        return rows.put(mask=torch.zeros_like(rows.mask))
    if how == "nothing kept":
        return rows.put(keep=torch.zeros_like(rows.mask))
    if how in ("nan", "inf") and kit.clock.turns == 1:
        reward = rows.reward.clone()
        reward[3, 0] = float(how)
        return rows.put(reward=reward)
    return rows


def toy(name: str, how: str = "", **options: Any) -> Method:
    m = find(name)(**options).swap("collect", token_rollouts()).set("update.lr", 0.05)
    return m.wrap("collect", spoiled(how=how)) if how else m


def scored(rewards: list[float], groups: list[int]) -> Batch:
    n = len(rewards)
    reward = torch.zeros(n, 3, dtype=torch.float64)
    reward[:, 1] = torch.tensor(rewards, dtype=torch.float64)
    mask = torch.tensor([[True, True, False]]).expand(n, 3)
    return Batch(
        {"reward": reward, "mask": mask, "group": torch.tensor(groups), "source": torch.zeros(n, dtype=torch.long)}
    )


def credited(p: Piece, batch: Batch) -> Tensor:
    environment, models = case(0)
    m = toy("grpo").swap("credit", p)
    advantage: Tensor = Kit(begin(m, environment, models), m, None, False).annotate(m.get("credit"), batch).advantage
    return advantage


# -- credit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", CREDITS, ids=lambda p: f"{p.name}-{'-'.join(map(str, p.options.values()))}")
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3, -1e17, 1e-300])
def test_all_equal_groups_and_groups_of_one_get_exactly_zero(p: Piece, value: float) -> None:
    """0.1 + 0.1 + 0.1 is not 3 x 0.1: a mean of equal numbers may differ from each of them."""
    batch = scored([value] * 7 + [5.0] + [0.0, 1.0], [0] * 7 + [1] + [2, 2])
    a = credited(p, batch)
    assert a[:8].abs().max() == 0
    assert a[8:, :2].abs().min() > 0, "the group with a signal keeps it"
    assert a[:, 2].abs().max() == 0, "padding gets none"
    assert credited(p, scored([value], [4])).tolist() == [[0.0, 0.0, 0.0]]


def test_credit_by_hand() -> None:
    batch = scored([1.0, 0.0, 0.0, 3.0, 5.0], [0, 0, 0, 8, 8])
    s0, s1 = math.sqrt(2 / 3 / 2), math.sqrt(2.0)
    everyone = math.sqrt(sum((x - 1.8) ** 2 for x in (1, 0, 0, 3, 5)) / 4)
    expected = {
        "group_mean": (group_mean(), [2 / 3, -1 / 3, -1 / 3, -1, 1]),
        "leave_one_out": (leave_one_out(), [1, -0.5, -0.5, -2, 2]),
        "group": (group_normalised(eps=0.0), [2 / 3 / s0, -1 / 3 / s0, -1 / 3 / s0, -1 / s1, 1 / s1]),
        "eps": (
            group_normalised(eps=1.0),
            [2 / 3 / (s0 + 1), -1 / 3 / (s0 + 1), -1 / 3 / (s0 + 1), -1 / (s1 + 1), 1 / (s1 + 1)],
        ),
        "ddof": (group_normalised(eps=0.0, ddof=0), [2**0.5, -(0.5**0.5), -(0.5**0.5), -1, 1]),
        "batch": (group_normalised("batch", eps=0.0), [v / everyone for v in (2 / 3, -1 / 3, -1 / 3, -1, 1)]),
        "none": (group_normalised("none"), [2 / 3, -1 / 3, -1 / 3, -1, 1]),
    }
    for name, (p, rows) in expected.items():
        a = credited(p, batch)
        assert a[:, 0].tolist() == pytest.approx(rows, abs=1e-12), name
        assert torch.equal(a[:, 0], a[:, 1])


def test_a_reward_that_is_not_a_number_stays_in_its_group_and_is_not_hidden() -> None:
    batch = scored([1.0, 0.0, float("nan"), 0.0, 1.0], [0, 0, 1, 1, 2])
    for p in (group_mean(), leave_one_out(), group_normalised()):
        nan = credited(p, batch)[:, 0].isnan().tolist()
        assert nan == [False, False, True, True, False]


# -- whole runs --------------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("how", ["equal", "alone", "nothing", "nothing kept"])
@pytest.mark.parametrize("memory", [None, 5])
def test_without_a_signal_the_gradient_is_exactly_zero_and_nothing_moves(
    name: str, how: str, memory: int | None
) -> None:
    environment, models = case(0)
    before = {k: v.clone() for k, v in models["policy"].state_dict().items()}
    for step in run(toy(name, how), environment, models, until=3, memory=memory, debug=memory is None):
        assert step.logs["grad_norm"] == 0
        assert step.logs["loss"] == 0
        assert all(math.isfinite(v) for v in step.logs.values())
    for k, v in models["policy"].state_dict().items():
        assert torch.equal(v, before[k])


@EACH
def test_rows_with_an_empty_mask_have_credit_zero_and_the_others_learn(name: str) -> None:
    environment, models = case(0)
    steps = list(run(toy(name, "empty rows"), environment, models, until=3))
    assert steps[-1].logs["grad_norm"] > 0
    assert all(math.isfinite(v) for s in steps for v in s.logs.values())
    assert steps[0].batch.advantage[~steps[0].batch.mask.any(1)].abs().max() == 0


@EACH
@pytest.mark.parametrize("how", ["nan", "inf"])
@pytest.mark.parametrize("memory", [None, 5])
def test_a_reward_that_is_not_finite_stops_the_run_before_any_parameter_changes(
    name: str, how: str, memory: int | None, tmp_path: Path
) -> None:
    environment, models = case(0)
    m = toy(name, how)
    state = begin(m, environment, models)
    loop = run(m, environment, models, until=3, state=state, memory=memory)
    next(loop)
    before = {k: v for k, v in digest(state).items() if k.startswith(("/models", "/pieces"))}
    assert len(before) > 3
    with pytest.raises(NonFiniteError, match=r"'surrogate' in track 'policy' is not finite at update 1; no parameter"):
        next(loop)
    after = digest(state)
    assert {k: after[k] for k in before} == before
    save(state, tmp_path)  # and what is left can be kept


class Broken(TokenTask):
    """An environment that raises at the k-th score, once."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def score(self, *args: Any) -> Tensor:
        self.at -= 1
        if self.at == 0:
            raise OSError("the verifier went away")
        return super().score(*args)


@EACH
@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_environment_that_raises_leaves_the_checkpoint_before_it_whole(name: str, at: int, tmp_path: Path) -> None:
    m = toy(name)
    environment, models = case(0)
    straight = digest([s.state for s in run(m, environment, models, until=4)][-1])
    _, models = case(0)
    state = begin(m, Broken(at), models)
    save(state, tmp_path)
    loop = run(m, None, models, until=4, state=state)
    for _ in range(at - 1):
        save(next(loop).state, tmp_path)
    with pytest.raises(OSError, match="the verifier went away"):
        next(loop)
    assert state.clock.turns == at - 1
    with pytest.raises(StopIteration):
        next(loop)
    environment, models = case(5)
    resumed = begin(m, environment, models, seed=5)
    load(resumed, tmp_path)
    assert resumed.clock.turns == at - 1
    for _ in run(m, environment, models, until=4, state=resumed):
        pass
    assert digest(resumed) == straight


def test_an_environment_that_raises_does_not_spoil_the_live_state() -> None:
    """Going on in the same process redraws what failed; parameters are those of the last whole turn."""
    m = toy("grpo")
    _, models = case(0)
    state = begin(m, Broken(2), models)
    loop = run(m, None, models, until=4, state=state)
    next(loop)
    kept = models["policy"].state_dict()["logits"].clone()
    with pytest.raises(OSError):
        next(loop)
    assert torch.equal(models["policy"].state_dict()["logits"], kept)
    steps = list(run(m, None, models, until=4, state=state))
    assert [s.turn for s in steps] == [2, 3, 4]


def test_padding_that_holds_rubbish_changes_no_gradient() -> None:
    """What lies outside the mask may be anything: garbage tokens, infinite log-probabilities of a sampler."""

    @piece("collect", writes=("logp_behavior",))
    def dirty(kit: Kit, *, inner: Any) -> Batch:
        rows: Batch = inner()
        return rows.put(logp_behavior=rows.logp_behavior.masked_fill(~rows.mask, float("-inf")))

    ends = []
    for m in (toy("grpo", rows=8), toy("grpo", rows=8).wrap("collect", dirty())):
        environment, models = case(0)
        logs = [s.logs for s in run(m, environment, models, until=3)]
        assert all(math.isfinite(v) for log in logs for v in log.values())
        ends.append(models["policy"].state_dict()["logits"])
    assert torch.equal(*ends)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_penalty_at_the_reference_itself_is_zero(estimator: str) -> None:
    environment, models = case(0)
    options = {} if estimator == "k3" else {"kl_estimator": estimator}
    step = next(run(toy("grpo", "equal", kl=0.5, **options), environment,
                    models, until=1))  # fmt: skip
    assert step.logs["kl"] == 0
    assert step.logs["kl_loss"] == 0
    if estimator != "k1":  # k1's gradient is that of -log pi: it has one everywhere
        assert step.logs["grad_norm"] < 1e-12
