"""What the columns of a batch say: each number by hand, and that looking changes no bit of a run."""

from __future__ import annotations

import math

import pytest
import torch

from tests.laws.checks import digest
from tests.laws.table import table
from trimtab.core.batch import Batch
from trimtab.core.errors import MethodError
from trimtab.core.loop import begin, run
from trimtab.core.terms import SOURCES
from trimtab.stages.annotate import sampler_mismatch
from trimtab.stages.signals import (
    FEWEST,
    entropy_push,
    explained_variance,
    measured,
    mismatch,
    numbers,
    signals,
    silent_groups,
)

torch.set_num_threads(1)


def entropy(p):
    return -(p * p.log()).sum()


def drawn(p):
    """Every action as often as it is likely: a batch whose means are expectations."""
    return torch.repeat_interleave(torch.arange(len(p)), (p * 64).round().long())


@pytest.mark.parametrize("advantage", [[1.0, -1.0, 0.0, 0.0], [-2.0, 1.0, 3.0, 0.5], [0.0, 0.0, -1.0, 2.0]])
def test_the_push_is_the_slope_of_the_entropy_along_the_step(advantage):
    p = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
    a = torch.tensor(advantage, dtype=torch.float64)
    seen = drawn(p)
    push = entropy_push(p.log()[seen], a[seen])["both"]
    eta = 1e-5
    ends = [entropy((p.log() + step * a).softmax(0)) for step in (eta, -eta)]
    assert float(push) == pytest.approx(float(ends[0] - ends[1]) / (2 * eta), abs=1e-8)


def test_each_side_pushes_as_the_cards_say():
    p = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
    seen = drawn(p)

    def of(action, a):
        made = entropy_push(p.log()[seen], torch.where(seen == action, a, 0.0))
        assert float(made["both"]) == float(made["positive"] + made["negative"])
        return float(made["positive"]), float(made["negative"])

    likely, rare = 0, 3
    assert of(likely, 1.0)[0] < 0, "a likely decision made likelier"
    assert of(rare, 1.0)[0] > 0, "a rare decision made likelier (what a wider upper bound lets through)"
    assert of(likely, -1.0)[1] > 0
    assert of(rare, -1.0)[1] < 0, "a rare decision made rarer"
    assert of(rare, 1.0)[1] == of(rare, -1.0)[0] == 0
    assert float(entropy_push(torch.full((64,), -2.0), torch.randn(64))["both"]) == 0, "uniform: nothing to lose"


def test_mismatch_by_hand():
    logp, reported = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.0, -2.5, -2.0])
    made = {name: float(value) for name, value in mismatch(logp, reported).items()}
    assert made["gap"] == pytest.approx(0.5)
    assert made["max"] == 1.0
    assert made["kl"] == pytest.approx((math.exp(0.5) - 1.5 + math.exp(-1.0)) / 3)
    assert all(float(value) == 0 for value in mismatch(logp, logp).values())


def test_explained_variance_by_hand():
    target = torch.tensor([1.0, 2.0, 3.0])
    assert float(explained_variance(target, target)) == 1
    assert float(explained_variance(torch.full((3,), 2.0), target)) == 0
    assert float(explained_variance(-target, target)) == pytest.approx(-3)
    assert numbers({"x": explained_variance(target, torch.ones(3))}) == {}, "equal targets: nothing to explain"


def test_silent_groups_prefer_no_response():
    advantage = torch.tensor([[1.0, 1.0], [-1.0, 9.0], [0.0, 0.0], [0.0, 7.0], [2.0, 2.0]])
    on = torch.tensor([[True, True], [True, False], [True, True], [True, False], [False, False]])
    group = torch.tensor([7, 7, 3, 3, 5])
    assert float(silent_groups(advantage, on, group)) == pytest.approx(2 / 3), "padding does not count, 5 has nothing"


def rows(n=4, t=16, **more):
    logp = -torch.arange(n * t, dtype=torch.float64).reshape(n, t) / 20
    columns = {"mask": torch.ones(n, t, dtype=torch.bool), "advantage": torch.ones(n, t, dtype=torch.float64)}
    return Batch({**columns, "group": torch.arange(n) // 2, "logp_behavior": logp, **more})


def test_measured_takes_what_is_there():
    assert set(measured(rows())) == {"silent_groups", "entropy_push", "entropy_push_positive", "entropy_push_negative"}
    with_old = measured(rows(logp_old=rows()["logp_behavior"] + 0.5))
    assert float(with_old["sampler_max"]) == pytest.approx(0.5)
    assert float(with_old["sampler_kl"]) == pytest.approx(math.exp(0.5) - 1.5)
    assert set(measured(rows(n=2))) == {"silent_groups"}, f"fewer than {FEWEST} decisions"
    assert measured(Batch({"mask": torch.ones(2, 2)})) == {}


def test_only_decisions_of_our_policy_that_may_learn_count():
    plain = measured(rows())
    nan = float("nan")
    more = {name: torch.cat([column, torch.full_like(column[:1], 1 if column.dtype == torch.bool else 3)])
            for name, column in rows().columns.items()}  # fmt: skip
    more["logp_behavior"][-1] = more["advantage"][-1] = nan  # what an expert's row holds there
    more["source"] = torch.tensor([0, 0, 0, 0, SOURCES.index("expert")])
    assert measured(Batch(more)) == plain
    more = {name: torch.cat([column, column[:, :1]], 1) if column.dim() > 1 else column
            for name, column in rows().columns.items()}  # fmt: skip
    more["advantage"][:, -1] = 1e6
    more["keep"] = torch.cat([rows()["mask"], torch.zeros(4, 1, dtype=torch.bool)], 1)
    assert measured(Batch(more)) == plain


@pytest.mark.parametrize("name", ["grpo", "bapo", "ppo", "a2c"])
def test_a_probe_changes_no_bit(name, monkeypatch):
    monkeypatch.setattr("trimtab.stages.signals.FEWEST", 2)
    models, logs = [], []
    for probed in (False, True):
        entry = table()[name]
        environment, made = entry.make(3)
        method = entry.build().then(signals()) if probed else entry.build()
        state = begin(method, environment, made, seed=3)
        logs.append([s.logs for s in run(method, environment, made, until=3, state=state, debug=probed)])
        state.fingerprint = ""  # the probe is part of the method, so that alone differs
        models.append(digest(state))
    assert models[0] == models[1]
    for before, after in zip(*logs):
        assert {name: after[name] for name in before} == before
    new = logs[1][0].keys() - logs[0][0].keys()
    assert {"entropy_push", "explained_variance" if name in ("ppo", "a2c") else "silent_groups"} <= new


def test_a_rhythm_that_is_none_is_refused():
    for probe in (signals, sampler_mismatch):
        with pytest.raises(MethodError, match="every=0"):
            probe(every=0)
