"""D3S: the numbers of its card, the exact subset search, ties, and what it stands on."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from tests.golden import test_golden
from tests.spikes.bapo import toy_grpo
from tests.spikes.tokens import case
from trimtab.core.batch import Batch
from trimtab.core.errors import MethodError
from trimtab.core.kit import Kit
from trimtab.core.loop import begin, run
from trimtab.core.method import Method, Track
from trimtab.core.piece import piece
from trimtab.core.registry import find, parse
from trimtab.core.schedules import linear
from trimtab.core.state import Clock
from trimtab.methods.language.d3s import ROWS, TOKENS
from trimtab.stages.downsample import down_sample, top_share, widest
from trimtab.stages.surrogate import score_function, surrogate
from trimtab.stages.update import sgd

d3s = find("d3s")
THREE, THIRD = 3**0.5, -(3**-0.5)
CARD = torch.tensor([THREE, THIRD, THIRD, THIRD, 0, 0, 0, 0, 1, 1, -1, -1], dtype=torch.float64)


def lots(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("m", range(2, 10))
def test_the_subset_is_the_widest_of_all(m: int) -> None:
    for seed in range(4):
        a = torch.randn(m, generator=lots(seed), dtype=torch.float64).round(decimals=1)
        for n in range(2, m + 1):
            best = max(float(a[list(c)].var(correction=0)) for c in itertools.combinations(range(m), n))
            for rng in (None, lots(seed)):
                got = widest(a, n, rng)
                assert len(set(got.tolist())) == n
                assert float(a[got].var(correction=0)) == pytest.approx(best, abs=1e-12)


def test_the_card_keeps_what_the_card_keeps() -> None:
    assert float(CARD.var(correction=0)) == pytest.approx(2 / 3)
    for n, variance, kept in ((4, 1.4665, [-1, -1, 1, THREE]), (6, 1.1852, [-1, -1, THIRD, 1, 1, THREE])):
        got = CARD[widest(CARD, n, lots())]
        assert sorted(got.tolist()) == kept
        assert float(got.var(correction=0)) == pytest.approx(variance, abs=1e-4)


def test_inside_a_group_the_widest_advantages_are_the_widest_rewards() -> None:
    for seed in range(10):
        r = torch.randn(8, generator=lots(seed), dtype=torch.float64)
        a = (r - r.mean()) / r.std()
        for n in (2, 3, 5):
            assert set(widest(a, n).tolist()) == set(widest(r, n).tolist())


def test_scale_and_sign_change_no_row_and_no_token_and_a_shift_only_tokens() -> None:
    a = torch.randn(9, generator=lots(3), dtype=torch.float64)
    h = torch.rand(9, 4, generator=lots(4), dtype=torch.float64)
    on = torch.ones(9, 4, dtype=torch.bool)

    def tokens(x: torch.Tensor) -> list[Any]:
        return top_share(x.abs()[:, None] * h, on, 0.3, lots()).nonzero().tolist()

    for other in (3.0 * a, -a):
        assert set(widest(other, 4).tolist()) == set(widest(a, 4).tolist())
        assert tokens(other) == tokens(a)
    assert set(widest(a + 5, 4).tolist()) == set(widest(a, 4).tolist())
    assert tokens(a + 5) != tokens(a)


def test_tokens_are_ranked_together() -> None:
    key = torch.tensor([2.0, -1.0])[:, None].abs() * torch.tensor([[0.1, 1.0], [0.3, 0.5]])
    assert key.flatten().tolist() == pytest.approx([0.2, 2.0, 0.3, 0.5])
    kept = top_share(key, torch.ones(2, 2, dtype=torch.bool), 0.5, lots())
    assert kept.nonzero().tolist() == [[0, 1], [1, 1]]


def test_ties_are_decided_by_lot_and_padding_is_never_chosen() -> None:
    flat, on = torch.zeros(6, 3), torch.arange(3) < torch.tensor([1, 2, 3, 1, 2, 3])[:, None]
    rows, places = set(), set()
    for seed in range(20):
        got = widest(torch.zeros(6), 3, lots(seed))
        assert len(got) == 3
        rows.add(tuple(sorted(got.tolist())))
        kept = top_share(flat, on, 0.5, lots(seed))
        assert int(kept.sum()) == 6
        assert not bool((kept & ~on).any())
        places.add(tuple(kept.flatten().tolist()))
    assert min(len(rows), len(places)) > 5, "the first of equals must not win every time"


def test_the_schedule_relaxes_with_progress() -> None:
    for schedule, ends in ((ROWS, (0.25, 0.75)), (TOKENS, (0.1, 0.5))):
        got = [schedule(Clock(turns=t, budget={"turns": 4})) for t in (0, 2, 4)]
        assert got == pytest.approx([ends[0], sum(ends) / 2, ends[1]])
    environment, models = case(0)
    logs = [s.logs for s in run(d3s(toy_grpo()), environment, models, until=4)]
    assert [round(log["kept_rows"] * 24) for log in logs] == [6, 9, 12, 15]
    assert all(log["useful_rows"] > 0 for log in logs)


@pytest.mark.parametrize("scope", ["batch", "group"])
def test_only_kept_decisions_learn(scope: str) -> None:
    environment, models = case(1)
    logits: Any = models["policy"].logits
    before = logits.detach().clone()
    step = next(run(d3s(toy_grpo(), share=0.3, tokens=0.4, scope=scope), environment, models, until=1))
    touched = ((logits.detach() - before).abs().sum(-1) > 0).nonzero().tolist()
    batch = step.batch
    kept = {(int(batch.prompt[i, 0]), t) for i, t in batch.keep.nonzero().tolist()}
    assert 0 < int(batch.keep.sum()) < int(batch.mask.sum())
    assert not bool((batch.keep & ~batch.mask).any())
    assert touched
    assert {tuple(cell) for cell in touched} <= kept
    if scope == "group":
        rows = batch.keep.any(1)
        assert max(int(rows[batch.group == g].sum()) for g in batch.group.unique()) <= 2


def test_constant_groups_teach_nothing_and_give_no_nan() -> None:
    batch = Batch({
        "advantage": torch.zeros(6, 3), "entropy_old": torch.zeros(6, 3), "group": torch.arange(6) // 3,
        "mask": torch.ones(6, 3, dtype=torch.bool), "keep": torch.ones(6, 3, dtype=torch.bool),
        "source": torch.zeros(6, dtype=torch.long),
    })  # fmt: skip
    environment, models = case(0)
    method = d3s(toy_grpo())
    kit = Kit(begin(method, environment, models), method, None, False)
    made = kit.annotate(down_sample(share=0.5, tokens=0.5), batch)
    assert int(made.keep.sum()) == round(0.5 * 9), "four or five of the nine tokens of three rows"
    assert int(made.keep.any(1).sum()) <= 3
    logs = kit.drain()
    assert logs["useful_rows"] == 0
    assert all(math.isfinite(v) for v in logs.values())


def test_the_mean_over_rows_is_one_over_kept_rows() -> None:
    """With half of the rows kept and every token, per="row" must not shrink the step by half."""
    gradients = {}
    for name, per in (("token", "token"), ("row", "row")):
        environment, models = case(2)
        base = test_golden.toy(find("grpo")(per=per)).set("update.lr", 1.0)
        start = models["policy"].state_dict()["logits"].clone()
        step = next(run(d3s(base, share=0.5, tokens=1.0), environment, models, until=1))
        gradients[name] = start - models["policy"].state_dict()["logits"]
        rows = step.batch.keep.any(1)
        by_hand = step.batch.take(rows)
        environment, models = case(2)
        policy: Any = models["policy"]
        logp = policy.evaluate(by_hand, {"logp"})["logp"]
        loss = -(by_hand.advantage * logp)
        mask = by_hand.mask
        total = loss.sum() / mask.sum() if per == "token" else (loss.sum(1) / mask.sum(1)).mean()
        (expected,) = torch.autograd.grad(total, policy.logits)
        assert float((gradients[name] - expected).abs().max()) < 1e-12


def test_gspo_keeps_its_ratio_of_whole_sequences() -> None:
    method = parse("d3s+gspo")
    assert {"over_kept(surrogate)", "surrogate.ratio"} <= method.flatten().keys()
    assert method.get("surrogate.ratio").name == "sequence_ratio"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"share": 0.0}, r"share=0\.0 must be in \(0, 1\]"),
        ({"share": 1.5}, r"share=1\.5 must be"),
        ({"tokens": -0.1}, r"tokens=-0\.1 must be"),
        ({"share": linear(0.0, 0.5)}, "must be in"),
        ({"tokens": linear(0.5, 2.0)}, "must be in"),
        ({"scope": "all"}, "Known: batch, group"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(MethodError, match=match):
        d3s(**options)


# -- rows that are no text ---------------------------------------------------------------------------------------


@piece("collect", writes=("obs", "action", "mask", "reward", "logp_behavior", "source"))
def actions(kit: Kit, *, steps: int = 12) -> Batch:
    """Single actions with an advantage each, as a control method makes them."""
    policy: Any = kit.models["policy"]
    obs = torch.randn(steps, 1, 2, generator=kit.rng("obs"), dtype=torch.float64)
    action = torch.randint(3, (steps, 1), generator=kit.rng("act"))
    return Batch({
        "obs": obs, "action": action, "mask": torch.ones(steps, 1, dtype=torch.bool),
        "reward": torch.randn(steps, 1, generator=kit.rng("reward"), dtype=torch.float64),
        "logp_behavior": policy.logp(obs, action), "source": torch.zeros(steps, dtype=torch.long),
    })  # fmt: skip


@piece("credit", reads=("reward", "mask"), writes=("advantage",))
def by_step(batch: Batch) -> Batch:
    return batch.put(advantage=(batch.reward - batch.reward.mean()) / batch.reward.std())


class Choice(torch.nn.Module):
    """A linear categorical policy over vectors."""

    def __init__(self, provides: frozenset[str] = frozenset({"logp", "entropy"})) -> None:
        super().__init__()
        self.provides = provides
        self.weight = torch.nn.Parameter(torch.randn(2, 3, generator=lots(), dtype=torch.float64))

    def logp(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return (obs @ self.weight).log_softmax(-1).gather(-1, action[..., None])[..., 0].detach()

    def evaluate(self, batch: Batch, want: set[str]) -> dict[str, torch.Tensor]:
        every = (batch.obs @ self.weight).log_softmax(-1)
        return {"logp": every.gather(-1, batch.action[..., None])[..., 0], "entropy": -(every.exp() * every).sum(-1)}


def control() -> Method:
    loss = surrogate(shape=score_function())
    return Method("actions", (actions(), by_step()), (Track("policy", "policy", (loss,), sgd(lr=0.1)),))


def test_it_selects_among_actions_of_any_kind() -> None:
    steps = list(run(d3s(control(), share=0.5, tokens=0.5), None, Choice(), until=3, debug=True))
    for step in steps:
        assert step.logs["kept_rows"] == pytest.approx(0.5)
        assert int(step.batch.keep.sum()) == 3
    first = steps[0].batch
    key = (first.advantage.abs() * first.entropy_old)[:, 0]
    assert float(key[first.keep[:, 0]].min()) > 0


def test_a_policy_without_entropy_is_refused_before_the_first_step() -> None:
    with pytest.raises(MethodError, match=r"entropy_old of d3s.* wants 'entropy' from the model 'policy'"):
        next(run(d3s(control()), None, Choice(frozenset({"logp"})), until=1))
