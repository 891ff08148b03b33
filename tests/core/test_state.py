"""Checkpoints: every leaf comes back exactly, a kill loses nothing that was complete, damage is named."""

from __future__ import annotations

import math
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.laws.checks import digest
from tests.spikes.bapo import toy_grpo
from tests.spikes.tokens import case
from trimtab.core import state as module
from trimtab.core.batch import Batch
from trimtab.core.errors import CheckpointError
from trimtab.core.loop import begin, run
from trimtab.core.method import Method
from trimtab.core.piece import piece
from trimtab.core.state import State, _restore, checkpoints, load, save

torch.set_num_threads(1)


def fresh(seed: int = 0, method: Method | None = None) -> State:
    environment, models = case(seed)
    return begin(method or toy_grpo(), environment, models, seed=seed)


def at_turn(turns: int, seed: int = 0) -> State:
    state = fresh(seed)
    for _ in run(toy_grpo(), state.environment, state.models, until=turns, state=state):
        pass
    return state


def through(value: Any, folder: Path) -> Any:
    """`value` as a piece's state, saved and loaded into a run that had none."""
    state = fresh()
    state.pieces["/x"] = value
    other = fresh()
    load_from = save(state, folder)
    load(other, load_from)
    return other.pieces["/x"]


# -- leaves ------------------------------------------------------------------------------------------------------

TENSORS = [
    torch.tensor([True, False]), torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    torch.tensor(2.0, dtype=torch.float16),
    torch.arange(6).reshape(2, 3).T, torch.zeros(0, 3), torch.zeros(()), torch.tensor([255], dtype=torch.uint8),
    torch.tensor([float("nan"), float("inf"), -0.0], dtype=torch.float64), torch.tensor([-(2**62)]),
    torch.tensor([1 + 2j], dtype=torch.complex64), torch.randn(3, 4)[:, 1],
]  # fmt: skip


@pytest.mark.parametrize("value", TENSORS, ids=lambda t: f"{t.dtype}-{list(t.shape)}")
def test_tensors_come_back_bit_for_bit(value: torch.Tensor, tmp_path: Path) -> None:
    got = through(value, tmp_path)
    assert got.dtype == value.dtype
    assert got.shape == value.shape
    if value.numel():
        plain = value.contiguous().reshape(-1)
        assert torch.equal(got.reshape(-1).view(torch.uint8), plain.view(torch.uint8))


LEAVES: list[Any] = [
    None, True, 0, -1, 2**70, 0.1, -0.0, 1e-320, math.inf, "", "text \u00fc \U0001f600 \"'\\\n", [], {}, (),
    (1,), [(), [{}]],
    {1: "int", "1": "text", None: 0, False: 1, 2.5: 3, (1, "a"): 4}, {"$tensor": "no", "$dict": [1]},
    {"a": (1, [2, (3.0,)])},
]  # fmt: skip


@pytest.mark.parametrize("value", LEAVES, ids=range(len(LEAVES)))
def test_plain_leaves_keep_value_and_type(value: Any, tmp_path: Path) -> None:
    got = through(value, tmp_path)
    assert got == value
    assert repr(got) == repr(value), "1 is not 1.0, and a tuple is not a list"


def test_nan_comes_back(tmp_path: Path) -> None:
    assert math.isnan(through(float("nan"), tmp_path))


@pytest.mark.parametrize(
    "value",
    [np.arange(6, dtype=np.int32).reshape(2, 3), np.array(3.5), np.zeros((0, 2)), np.array([True]), np.ones(5)[::-2],
     np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.array([1, 2], dtype=np.uint16),
     np.array([0.5], dtype=np.float16)],
    ids=lambda a: f"{a.dtype}-{a.shape}",
)  # fmt: skip
def test_numpy_arrays_keep_dtype_and_shape(value: np.ndarray, tmp_path: Path) -> None:
    got = through(value, tmp_path)
    assert isinstance(got, np.ndarray)
    assert (got.dtype, got.shape) == (value.dtype, value.shape)
    np.testing.assert_array_equal(got, value)


@pytest.mark.parametrize("value", [np.float32(0.1), np.float64(0.1), np.int8(-3), np.bool_(True), np.uint64(2**63)])
def test_numpy_numbers_keep_their_precision(value: Any, tmp_path: Path) -> None:
    """A running mean in float32 that resumed in float64 would round differently from then on."""
    got = through(value, tmp_path)
    assert type(got) is type(value)
    assert got == value


def test_keys_that_read_alike_do_not_mix_their_tensors(tmp_path: Path) -> None:
    one, two = torch.ones(2), torch.zeros(3)
    got = through({1: one, "1": two, "a/b": one, "a": {"b": two}}, tmp_path)
    assert torch.equal(got[1], one)
    assert torch.equal(got["1"], two)
    assert torch.equal(got["a/b"], one)
    assert torch.equal(got["a"]["b"], two)


@pytest.mark.parametrize(
    "value", [{1, 2}, b"bytes", object(), 1j, np.array(["text"]), np.array([None]), lambda: 0, [1, [range(3)]],
              torch.zeros(2, dtype=torch.complex128)], ids=lambda v: type(v).__name__
)  # fmt: skip
def test_what_a_checkpoint_cannot_hold_is_named_with_its_place(value: Any, tmp_path: Path) -> None:
    save(at_turn(1), tmp_path)
    state = at_turn(2)
    state.pieces["/odd"] = {"deep": value}
    with pytest.raises(CheckpointError, match=r"/pieces//odd/deep\S* holds a \w+, which a checkpoint cannot hold"):
        save(state, tmp_path)
    assert [p.name for p in checkpoints(tmp_path)] == ["turn-00000001"]


def test_live_objects_are_restored_in_place(tmp_path: Path) -> None:
    def objects(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        net = nn.Linear(2, 2)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.1 * (seed + 1))
        net(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        return {
            "optimizer": optimizer, "net": net, "g": torch.Generator().manual_seed(seed),
            "several": [torch.Generator().manual_seed(seed + k) for k in (1, 2)], "pair": (nn.Linear(1, 1), seed),
        }  # fmt: skip

    state, other = fresh(), fresh()
    state.pieces["/x"], other.pieces["/x"] = objects(0), objects(1)
    mine = dict(other.pieces["/x"])
    load(other, save(state, tmp_path))
    got, want = other.pieces["/x"], state.pieces["/x"]
    assert got["optimizer"] is mine["optimizer"]
    assert got["net"] is mine["net"]
    assert torch.equal(got["net"].weight, want["net"].weight)
    assert got["optimizer"].param_groups[0]["lr"] == 0.1
    assert torch.equal(
        got["optimizer"].state_dict()["state"][0]["exp_avg"], want["optimizer"].state_dict()["state"][0]["exp_avg"]
    )
    assert torch.equal(torch.rand(3, generator=got["g"]), torch.rand(3, generator=want["g"]))
    for a, b in zip(got["several"], want["several"]):
        assert isinstance(a, torch.Generator), "a list of generators must not come back as a list of bytes"
        assert torch.equal(torch.rand(3, generator=a), torch.rand(3, generator=b))
    assert isinstance(got["pair"], tuple)
    assert torch.equal(got["pair"][0].weight, want["pair"][0].weight)


def test_a_batch_comes_back_as_one(tmp_path: Path) -> None:
    got = through({"replay": Batch({"reward": torch.ones(2), "text": ["a", None]})}, tmp_path)["replay"]
    assert isinstance(got, Batch)
    assert got.reward.tolist() == [1.0, 1.0]
    assert got.text == ["a", None]


def test_a_key_that_was_not_saved_does_not_survive_loading() -> None:
    target = {"a": 1, "stale": 2, "deep": {"b": 1, "stale": 2}}
    assert _restore(target, {"a": 3, "deep": {"b": 4}}, "x") == {"a": 3, "deep": {"b": 4}}


def test_loading_restores_every_stream_and_the_global_ones(tmp_path: Path) -> None:
    state = at_turn(2)
    path = save(state, tmp_path)
    want = (torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random(),
            torch.rand(2, generator=state.stream("rollout")).tolist())  # fmt: skip
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    other = fresh(5)
    load(other, path)
    got = (torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random(),
           torch.rand(2, generator=other.stream("rollout")).tolist())  # fmt: skip
    assert got == want
    assert other.seed == 0, "streams that are opened later must follow the saved seed"


def test_loaded_tensors_do_not_share_memory_with_the_file_or_the_run(tmp_path: Path) -> None:
    state = at_turn(1)
    path = save(state, tmp_path)
    other = fresh(1)
    load(other, path)
    expected = digest(other)
    for p in state.models["policy"].parameters():
        p.data.fill_(7.0)
    for file in path.iterdir():
        file.write_bytes(b"")
    assert digest(other) == expected


# -- which checkpoint --------------------------------------------------------------------------------------------


def test_the_newest_n_are_kept(tmp_path: Path) -> None:
    state = fresh()

    def at(turn: int) -> State:
        state.clock.turns = turn
        return state

    for turn in (1, 2, 3, 4):
        path = save(at(turn), tmp_path, keep=3)
        assert path.name == f"turn-{turn:08d}"
    assert [p.name[-1] for p in checkpoints(tmp_path)] == ["2", "3", "4"]
    save(at(5), tmp_path, keep=1)
    assert [p.name[-1] for p in checkpoints(tmp_path)] == ["5"]
    assert [p.name for p in tmp_path.iterdir()] == ["turn-00000005"], "nothing else is left behind"
    for keep in (0, -1):
        with pytest.raises(CheckpointError, match=f"keep={keep} would leave no checkpoint"):
            save(at(6), tmp_path, keep=keep)


def test_what_was_just_written_is_never_the_one_removed(tmp_path: Path) -> None:
    """A run that began anew, or went back, in a folder that holds later turns."""
    for turn in (8, 9):
        state = fresh()
        state.clock.turns = turn
        save(state, tmp_path)
    path = save(at_turn(1), tmp_path, keep=2)
    assert path.exists()
    load(fresh(), path)
    assert len(checkpoints(tmp_path)) == 2


def test_the_same_turn_saved_twice_is_the_second(tmp_path: Path) -> None:
    state = at_turn(1)
    first = save(state, tmp_path)
    state.models["policy"].logits.data.fill_(3.0)  # type: ignore[union-attr, operator]
    assert save(state, tmp_path) == first
    other = fresh(2)
    load(other, tmp_path)
    assert other.models["policy"].logits.unique().tolist() == [3.0]  # type: ignore[union-attr, operator]
    assert len(list(tmp_path.iterdir())) == 1


def test_without_a_checkpoint_loading_says_so(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=r"there is no complete checkpoint in .*"):
            load(fresh(), folder)


def test_another_method_is_refused_naming_both(tmp_path: Path) -> None:
    save(at_turn(1), tmp_path)
    other = fresh(0, toy_grpo().set("update.lr", 0.06))
    before = digest(other)
    with pytest.raises(CheckpointError, match=r"was written by grpo \(\w{16}\), but this run is grpo \(\w{16}\)"):
        load(other, tmp_path)
    assert digest(other) == before


def test_another_set_of_models_is_refused(tmp_path: Path) -> None:
    save(at_turn(1), tmp_path)
    environment, models = case(0)
    state = begin(toy_grpo(), environment, {**models, "critic": nn.Linear(1, 1)})
    with pytest.raises(
        CheckpointError, match=r"holds the models \['policy'\], and this run has \['critic', 'policy'\]"
    ):
        load(state, tmp_path)


def test_a_model_of_another_shape_is_refused(tmp_path: Path) -> None:
    from tests.spikes.tokens import TableTokens, TokenTask

    save(at_turn(1), tmp_path)
    task = TokenTask(length=7)
    with pytest.raises(CheckpointError, match=r"the saved models\.policy does not fit this run"):
        load(begin(toy_grpo(), task, {"policy": TableTokens(task)}), tmp_path)


def test_differences_of_the_machine_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(at_turn(1), tmp_path)
    assert load(fresh(), tmp_path) == []
    now = module.here()
    monkeypatch.setattr(module, "here", lambda: {**now, "threads": 8, "torch": "0.1"})
    said = load(fresh(), tmp_path)
    assert len(said) == 2
    assert "threads was 1 when this checkpoint was written and is 8 here; results may differ in rounding" in said


# -- damage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
@pytest.mark.parametrize("how", ["truncated", "tampered", "missing", "empty"])
def test_damage_names_the_file_and_changes_nothing(name: str, how: str, tmp_path: Path) -> None:
    file = save(at_turn(1), tmp_path) / name
    data = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
    else:
        data[len(data) // 2] ^= 1
        file.write_bytes({"truncated": data[:-7], "tampered": data, "empty": b""}[how])
    other = fresh(3)
    before = digest(other)
    with pytest.raises(CheckpointError, match=rf"{name} is damaged.*Delete that folder to go on"):
        load(other, tmp_path)
    assert digest(other) == before


def test_a_damaged_manifest_is_named_and_a_missing_one_is_no_checkpoint(tmp_path: Path) -> None:
    save(at_turn(1), tmp_path)
    newest = save(at_turn(2), tmp_path)
    manifest = newest / "manifest.json"
    manifest.write_text(manifest.read_text()[:40])
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        load(fresh(), tmp_path)
    manifest.unlink()
    other = fresh(4)
    load(other, tmp_path)
    assert other.clock.turns == 1


def test_a_later_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FORMAT", 2)
    save(at_turn(1), tmp_path)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="has format 2; this version reads format 1"):
        load(fresh(), tmp_path)


# -- interruption ------------------------------------------------------------------------------------------------

STEPS = [
    "Path.mkdir",
    "_encode",
    "save_file",
    "Path.write_text",
    "_digest",
    "here",
    "_sync",
    "Path.rename",
    "shutil.rmtree",
]


@pytest.mark.parametrize("again", [False, True], ids=["next turn", "same turn"])
@pytest.mark.parametrize("step", STEPS)
def test_whatever_step_fails_a_complete_checkpoint_stays_loadable(
    step: str, again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill is simulated by raising at the first, second, third ... call of each step of a save."""
    owner = {"Path": Path, "shutil": module.shutil}.get(step.split(".")[0], module)
    name = step.split(".")[-1]
    original = getattr(owner, name)
    old, new = at_turn(1), at_turn(1 if again else 2)
    new.models["policy"].logits.data.add_(1.0)  # type: ignore[union-attr, operator]
    survivors = [digest(old), digest(new)]
    for nth in range(5):
        folder = tmp_path / str(nth)
        save(old, folder)
        countdown = [nth]

        def failing(*args: Any, countdown: list[int] = countdown, **more: Any) -> Any:
            countdown[0] -= 1
            if countdown[0] == -1:
                raise KeyboardInterrupt
            return original(*args, **more)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing)
            try:
                save(new, folder, keep=1)
            except KeyboardInterrupt:
                interrupted = True
            else:
                interrupted = False
        loaded = fresh(6)
        load(loaded, folder)
        assert digest(loaded) in survivors
        save(at_turn(3), folder, keep=1)
        assert [p.name for p in folder.iterdir()] == ["turn-00000003"], "leftovers stay behind"
        if not interrupted:
            break
    assert nth or step == "shutil.rmtree"


def test_a_process_killed_amid_saves_leaves_a_checkpoint_that_loads(tmp_path: Path) -> None:
    for kill in range(8):
        folder, state = tmp_path / str(kill), at_turn(1)
        heard, tell = os.pipe()
        child = os.fork()
        if child == 0:  # save for ever, each turn twice, and say which turn is on disk
            os.close(heard)
            while True:
                save(state, folder)
                state.models["policy"].logits.data.fill_(state.clock.turns)  # type: ignore[union-attr, operator]
                save(state, folder)
                os.write(tell, state.clock.turns.to_bytes(4, "big"))
                state.clock.turns += 1
        os.close(tell)
        said = os.read(heard, 4)
        time.sleep(0.005 * kill)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(heard, "rb") as pipe:
            said = (said + pipe.read())[-4:]
        loaded = fresh(1)
        load(loaded, folder)
        lost = int.from_bytes(said, "big") - loaded.clock.turns
        assert lost in (0, -1), "a turn that was said to be on disk is gone"
        save(loaded, folder)
        assert not list(folder.glob(".writing-*"))
        for _ in run(toy_grpo(), loaded.environment, loaded.models, until=loaded.clock.turns + 1, state=loaded):
            pass


# -- state of pieces ---------------------------------------------------------------------------------------------


def test_a_piece_state_that_changes_shape_resumes_exactly(tmp_path: Path) -> None:
    @piece("annotate", state={"book": lambda kit, options: {"first": 1, "log": []}})
    def booked(kit: Any, batch: Any) -> Any:
        book = kit.state["book"]
        kit.state["book"] = {
            "log": [*book["log"], (kit.clock.turns, np.float32(0.1) * len(batch))],
            kit.clock.turns: batch.mask,
        }
        return batch

    method = toy_grpo().then(booked())

    def go(turns: int, state: State) -> State:
        for _ in run(method, state.environment, state.models, until=turns, state=state):
            pass
        return state

    straight = digest(go(4, fresh(0, method)))
    save(go(2, fresh(0, method)), tmp_path)
    state = fresh(8, method)
    load(state, tmp_path)
    assert digest(go(4, state)) == straight
    assert set(state.pieces["/book"]) == {"log", 3}
