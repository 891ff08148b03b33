"""The loop: what is counted, which rows an update gets, when tracks run, how a run ends and goes on, debug mode."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.laws.checks import digest
from tests.spikes.bapo import toy_grpo
from tests.spikes.chord import chord
from tests.spikes.tokens import case, token_rollouts
from trimtab.core.batch import Batch
from trimtab.core.errors import ColumnError, MethodError, PurityError
from trimtab.core.kit import Kit
from trimtab.core.loop import begin, run
from trimtab.core.method import Method, Track
from trimtab.core.piece import piece
from trimtab.core.registry import find
from trimtab.core.state import State
from trimtab.core.terms import Term
from trimtab.stages.annotate import logp_old

torch.set_num_threads(1)

SEEN: list[tuple[str, int, list[int]]] = []


@piece("collect", writes=("row", "pair", "mask", "source"))
def numbered(kit: Kit, *, n: int = 10) -> Batch:
    """Rows 0..n-1; the last three are an expert's, which are not our decisions. Pairs are (0, 1), (2, 3) ..."""
    source = (torch.arange(n) >= n - 3).long()
    mask = torch.ones(n, 2, dtype=torch.bool)
    return Batch({"row": torch.arange(n), "pair": torch.arange(n) // 2, "mask": mask, "source": source})


@piece("update")
def noted(kit: Kit, closure: Any, *, stop_at: int = -1) -> Any:
    SEEN.append((closure.track.name, kit.clock.updates, closure.batch.row.tolist()))
    return {}, kit.clock.updates == stop_at


def track(name: str = "policy", *, stop_at: int = -1, **facts: Any) -> Track:
    return Track(name, trains="policy", pieces=(), update=noted(stop_at=stop_at), **facts)


def method(*tracks: Track, **fields: Any) -> Method:
    return replace(Method("numbers", pieces=(numbered(),), tracks=tracks or (track(),)), **fields)


def go(m: Method, until: Any = 1, state: State | None = None, **more: Any) -> State:
    SEEN.clear()
    models: dict[str, nn.Module] = {"policy": nn.Linear(1, 1)}
    state = state or begin(m, None, models)
    for _ in run(m, None, models, until=until, state=state, **more):
        pass
    return state


# -- counting and ending -----------------------------------------------------------------------------------------


def test_the_clock_counts_turns_updates_decisions_and_rows() -> None:
    state = go(method(rows=4, passes=2), 3)
    assert state.clock.counts() == {"turns": 3, "updates": 3 * 2 * 3, "decisions": 3 * 14, "rows": 30}


@pytest.mark.parametrize(
    ("until", "turns"),
    [(0, 0), (4, 4), ({"turns": 2}, 2), ({"updates": 7}, 3), ({"decisions": 42}, 3), ({"decisions": 43}, 4),
     ({"rows": 1}, 1),     ({"turns": 5, "rows": 20}, 2), ({"turns": 1, "rows": 20}, 1)],
)  # fmt: skip
def test_a_run_ends_when_the_first_budget_is_reached(until: Any, turns: int) -> None:
    assert go(method(rows=4), until).clock.turns == turns


def test_an_unknown_budget_is_refused() -> None:
    with pytest.raises(MethodError, match=r"until='turn' is not counted.*Did you mean 'turns'"):
        go(method(), {"turn": 3})


def test_each_turn_gives_its_batch_its_numbers_and_the_state() -> None:
    environment, models = case(0)
    steps = list(run(toy_grpo(), environment, models, until=2))
    assert [s.turn for s in steps] == [1, 2]
    assert {"reward", "loss", "grad_norm", "surrogate", "clip_high", "lr"} <= set(steps[0].logs)
    assert all(isinstance(v, float) for v in steps[0].logs.values())
    assert steps[0].batch.group.min() == 0
    assert steps[1].batch.group.min() == 4, "ids are unique in the run"
    assert "advantage" in steps[0].batch


# -- which rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 4, 9, 10, 99, None])
@pytest.mark.parametrize("passes", [1, 3])
def test_every_pass_partitions_the_batch(rows: int | None, passes: int) -> None:
    go(method(rows=rows, passes=passes), 2)
    per_pass = 1 if rows is None else -(-10 // rows)
    assert len(SEEN) == 2 * passes * per_pass
    for start in range(0, len(SEEN), per_pass):
        part = [r for _, _, rows_ in SEEN[start : start + per_pass] for r in rows_]
        assert sorted(part) == list(range(10))
    assert [u for _, u, _ in SEEN] == list(range(len(SEEN)))


def test_rows_are_shuffled_by_seed_anew_in_every_pass() -> None:
    m = method(rows=5, passes=4)
    orders = []
    for seed in (0, 0, 1):
        go(m, 2, begin(m, None, {"policy": nn.Linear(1, 1)}, seed=seed))
        orders.append([tuple(r) for _, _, r in SEEN])
    assert orders[0] == orders[1] != orders[2]
    assert len(set(orders[0])) == len(orders[0])


def test_an_update_never_cuts_a_unit() -> None:
    @piece("loss", unit="pair")
    def paired(batch: Batch, now: Any) -> Term: ...

    m = method(replace(track(), pieces=(paired(),)), rows=3, passes=5)
    go(m, 2)
    for _, _, rows in SEEN:
        assert Counter(r // 2 for r in rows).most_common()[-1][1] == 2


# -- tracks ------------------------------------------------------------------------------------------------------


def test_tracks_run_in_written_order_every_kth_and_on_the_last() -> None:
    m = method(track("a"), track("b", every=3), track("c", on="last"), rows=5, passes=2)
    go(m, 2)
    assert [(name, u) for name, u, _ in SEEN] == [
        ("a", 0), ("b", 0), ("a", 1), ("a", 2), ("a", 3), ("b", 3), ("c", 3),
        ("a", 4), ("a", 5), ("a", 6), ("b", 6), ("a", 7), ("c", 7),
    ]  # fmt: skip
    assert all(len(rows) == (10 if name == "c" else 5) for name, _, rows in SEEN), "the last one sees the whole batch"


def test_stop_ends_a_track_for_this_batch_and_all_of_them_end_the_batch() -> None:
    state = go(method(track("a", stop_at=1), rows=2), 2)
    assert [u for _, u, _ in SEEN] == [0, 1, 2, 3, 4, 5, 6], "the batch is left, the next one is whole"
    assert state.clock.updates == 7
    go(method(track("a", stop_at=1), track("b"), rows=5, passes=2), 1)
    assert [(n, u) for n, u, _ in SEEN] == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("b", 2), ("b", 3)]


def test_the_column_of_old_log_probabilities_is_left_out_only_where_it_is_the_current_policy() -> None:
    def has(m: Method) -> bool:
        environment, models = case(0)
        return "logp_old" in next(run(m, environment, models, until=1)).batch

    @piece("update")
    def twice(kit: Kit, closure: Any, *, inner: Any) -> Any:
        inner(closure)
        return inner(closure)

    assert not has(toy_grpo().but(rows=None, passes=1))
    assert has(toy_grpo().but(rows=None))
    assert has(toy_grpo().but(passes=1))
    assert has(toy_grpo().but(rows=None, passes=1).wrap("update", twice())), "its second gradient is at another policy"


def test_probes_keep_state_of_their_track() -> None:
    seen = []

    @piece("probe", state={"count": lambda kit, options: 0}, reads=("row",))
    def counting(kit: Kit, batch: Batch) -> None:
        kit.state["count"] += len(batch.row)
        seen.append((kit.model, kit.state["count"]))
        kit.log("count", kit.state["count"])

    m = method(replace(track("learner"), pieces=(counting(),)))
    for debug in (False, True):
        seen.clear()
        state = go(m, 2, debug=debug)
        assert seen == [("policy", 10), ("policy", 20)]
        assert state.pieces == {"learner/count": 20}


# -- going on ----------------------------------------------------------------------------------------------------


def test_a_run_goes_on_exactly_from_its_state() -> None:
    environment, models = case(0)
    straight = list(run(toy_grpo(), environment, models, until=6))
    environment, models = case(0)
    logs = [s.logs for s in run(toy_grpo(), environment, models, until=2)]
    del logs
    environment, models = case(0)
    parts, state = [], None
    for until in (1, 1, 4, 6):
        for step in run(toy_grpo(), environment, models, until=until, state=state):
            parts.append(step)
            state = step.state
    assert [s.logs for s in parts] == [s.logs for s in straight]
    assert state is not None
    assert digest(state) == digest(straight[-1].state)


def test_a_generator_closed_early_leaves_a_state_that_goes_on() -> None:
    environment, models = case(0)
    whole = digest([s.state for s in run(toy_grpo(), environment, models, until=4)][-1])
    environment, models = case(0)
    loop = run(toy_grpo(), environment, models, until=4)
    state = next(loop).state
    next(loop)
    loop.close()
    assert state.clock.turns == 2
    for _ in run(toy_grpo(), environment, models, until=4, state=state):
        pass
    assert digest(state) == whole


def test_begin_seeds_the_global_generators() -> None:
    def draws(seed: int) -> list[float]:
        environment, models = case(0)
        begin(toy_grpo(), environment, models, seed=seed)
        return [float(torch.rand(())), float(np.random.rand()), random.random()]

    first = draws(3)
    torch.rand(5)
    assert draws(3) == first
    assert all(a != b for a, b in zip(first, draws(4)))
    draws(2**40)  # numpy takes 32 bits


def test_streams_do_not_depend_on_each_other_nor_on_the_order_of_their_first_use() -> None:
    def state() -> State:
        environment, models = case(0)
        return begin(toy_grpo(), environment, models)

    one, other = state(), state()
    a = torch.rand(3, generator=one.stream("a"))
    torch.rand(9, generator=other.stream("b"))
    assert torch.equal(a, torch.rand(3, generator=other.stream("a")))
    assert not torch.equal(torch.rand(3, generator=one.stream("b")), a)


@pytest.mark.parametrize("memory", [1, 5, 100])
def test_memory_changes_nothing_beyond_rounding(memory: int) -> None:
    runs = []
    for given in (None, memory):
        environment, models = case(0)
        runs.append([s.logs for s in run(chord(toy_grpo()), environment, models, until=2, memory=given)])
    for whole, cut in zip(*runs):
        assert cut == pytest.approx(whole, abs=1e-9)


def test_one_module_is_the_policy() -> None:
    environment, models = case(0)
    step = next(run(toy_grpo(), environment, models["policy"], until=1))
    assert list(step.state.models) == ["policy"]


def test_a_null_method_runs() -> None:
    """With null stages a turn costs next to nothing; how little is measured by the benchmarks."""

    @piece("collect", writes=("mask",))
    def null(kit: Kit, *, batch: Batch) -> Batch:
        return batch

    @piece("update")
    def rest(kit: Kit, closure: Any) -> Any:
        return {}, False

    batch = Batch({"mask": torch.ones(8, 1, dtype=torch.bool)})
    m = Method("null", pieces=(null(batch=batch),), tracks=(Track("policy", "policy", (), rest()),))
    assert sum(1 for _ in run(m, None, nn.Linear(1, 1), until=300)) == 300


# -- rows of several sources -------------------------------------------------------------------------------------


def mixed(writes: tuple[str, ...], fn: Any, *, stage: str = "credit") -> Batch:
    """What a piece that concerns policy rows makes of a batch whose last three rows are an expert's."""
    made = piece(stage, writes=writes, reads=("row", "mask"))(fn)
    m = Method("m", pieces=(numbered(), made()), tracks=(track(),))
    return next(run(m, None, nn.Linear(1, 1), until=1)).batch


def test_credit_concerns_policy_rows_and_the_others_get_zeros_of_the_same_type() -> None:
    def credited(batch: Batch) -> Batch:
        assert len(batch) == 7
        return batch.put(advantage=batch.row[:, None].double().expand(-1, 2), flag=batch.row > 2, big=batch.row + 2**40)

    batch = mixed(("advantage", "flag", "big"), credited)
    assert batch.advantage[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 0, 0]
    assert batch.flag.dtype == torch.bool
    assert batch.flag.tolist() == [False] * 3 + [True] * 4 + [False] * 3
    assert batch.big.tolist() == [i + 2**40 for i in range(7)] + [0] * 3, "ids do not survive a detour over float32"


def test_a_declared_column_need_not_be_written() -> None:
    def partly(batch: Batch) -> Batch:
        return batch.put(advantage=batch.row[:, None].double())

    assert "extra" not in mixed(("advantage", "extra"), partly)


def test_rows_it_does_not_concern_keep_what_they_had() -> None:
    def fewer(batch: Batch) -> Batch:
        return batch.put(keep=torch.zeros_like(batch.mask))

    assert mixed(("keep",), fewer, stage="select").keep.any(1).tolist() == [False] * 7 + [True] * 3

    def dropping(batch: Batch) -> Batch:
        return batch.take(batch.row < 3)

    assert mixed((), dropping, stage="select").row.tolist() == [0, 1, 2, 7, 8, 9], "a select drops rows of its own"
    with pytest.raises(MethodError, match=r"dropping \(credit\) gives 3 rows for 7"):
        mixed(("advantage",), dropping)


# -- debug mode --------------------------------------------------------------------------------------------------


def guilty(kind: str) -> Any:
    def fn(kit: Kit, batch: Batch, *now: Any) -> Any:
        policy: Any = kit.models["policy"]
        if kind == "reads":
            batch.reward.sum()
        elif kind == "asks":
            batch.get("reward")
        elif kind == "writes":
            return batch.put(keep=batch.mask)
        elif kind == "parameters":
            policy.logits.add_(1.0)
        elif kind == "state":
            kit.state["x"] = 1
        return batch

    return fn


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [("reads", ColumnError, "guilty reads column 'reward' without declaring it"),
     ("asks", ColumnError, "guilty reads column 'reward' without declaring it"),
     ("writes", ColumnError, "guilty writes column 'keep' without declaring it"),
     ("parameters", PurityError, r"guilty is a \w+ piece but changed the parameters of \['policy'\]"),
     ("state", PurityError, "guilty uses state 'x' without declaring it")],
)  # fmt: skip
@pytest.mark.parametrize("stage", ["annotate", "select", "probe"])
def test_debug_mode_holds_pieces_to_what_they_declare(stage: str, kind: str, error: type, words: str) -> None:
    fn = guilty(kind)
    fn.__name__ = "guilty"
    made = piece(stage, reads=("mask",), state={"mine": lambda kit, options: 0})(fn)()
    environment, models = case(0)
    m = toy_grpo().then(made)
    with pytest.raises(error, match=words):
        list(run(m, environment, models, until=1, debug=True))
    environment, models = case(0)
    if kind != "state":  # undeclared state is refused always: it would be lost by a checkpoint
        assert len(list(run(m, environment, models, until=1))) == 1


def test_debug_mode_holds_losses_to_it_too() -> None:
    @piece("loss", wants=("logp",))
    def guilty_loss(batch: Batch, now: Mapping[str, Tensor]) -> Term:
        return Term(now["logp"] * batch.reward, "x")

    environment, models = case(0)
    with pytest.raises(ColumnError, match="guilty_loss reads column 'reward' without declaring it"):
        list(run(toy_grpo().then(guilty_loss()), environment, models, until=1, debug=True))


def test_debug_mode_changes_no_number() -> None:
    ends = []
    for debug in (False, True):
        environment, models = case(0)
        ends.append(digest([s.state for s in run(chord(toy_grpo()), environment, models, until=2, debug=debug)][-1]))
    assert ends[0] == ends[1]


def test_logp_old_is_that_of_the_start_of_the_batch() -> None:
    environment, models = case(0)
    m = toy_grpo()
    assert any(p == logp_old() for p in m.pieces)
    before = {k: v.clone() for k, v in models["policy"].state_dict().items()}
    batch = next(run(m, environment, models, until=1)).batch
    models["policy"].load_state_dict(before)
    policy: Any = models["policy"]
    assert torch.equal(batch.logp_old, policy.evaluate(batch, {"logp"})["logp"])


def test_a_collect_that_keeps_state_can_say_what_it_decided() -> None:
    """The clock counts what was decided, not what was replayed; a stateful piece has a kit of its own."""

    @piece("collect", state={"seen": lambda kit, options: 0})
    def replaying(kit: Kit, *, inner: Any) -> Batch:
        rows: Batch = inner()
        kit.state["seen"] += len(rows)
        kit.decided(7)
        return rows

    environment, models = case(0)
    method = find("reinforce")().swap("collect", token_rollouts()).wrap("collect", replaying())
    steps = [s.state.clock.decisions for s in run(method, environment, models, until=2)]
    assert steps == [7, 14]
