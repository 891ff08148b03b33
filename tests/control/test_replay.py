"""The ring, the collect that fills it, and the files of a checkpoint that hold its rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab.core import chunks
from trimtab.core.errors import CheckpointError, MethodError
from trimtab.core.loop import begin, run
from trimtab.core.registry import find
from trimtab.core.state import State, checkpoints, load, save
from trimtab.environments.toy import PointEnvironment
from trimtab.policies.networks import build_networks
from trimtab.stages.replay import Ring, replay

torch.set_num_threads(1)


def rows(start: int, count: int, numbered: bool = False) -> tuple[Tensor, ...]:
    """Transitions that say their number in every column."""
    k = torch.arange(start, start + count)
    obs = k[:, None] + torch.tensor([0.0, 0.25])
    action = k % 3 if numbered else k[:, None] + 0.5
    return obs, action, obs + 1, k.float(), k % 5 == 0, k % 7 == 0


@pytest.mark.parametrize("envs", [1, 3, 4])
@pytest.mark.parametrize("numbered", [False, True])
def test_a_ring_keeps_the_newest_and_gives_them_back_whole(envs: int, numbered: bool) -> None:
    ring = Ring(10)
    for start in range(0, 24, envs):
        ring.append(*rows(start, envs, numbered))
    assert len(ring) == 10
    assert ring.total == 24 + (-24) % envs
    made = ring.draw(500, torch.Generator().manual_seed(0))
    k = made["reward"][:, 0].long()
    assert sorted(set(k.tolist())) == list(range(ring.total - 10, ring.total))
    for name, value in zip(("obs", "action", "next_obs", "reward", "terminated", "truncated"), zip(*[
        [c[0] for c in rows(int(i), 1, numbered)] for i in k])):  # fmt: skip
        assert torch.equal(made[name][:, 0], torch.stack(value)), name
    assert made["action"].dtype == (torch.long if numbered else torch.float32)
    assert made["terminated"].dtype == torch.bool


def test_more_rows_at_once_than_fit() -> None:
    ring = Ring(4)
    ring.append(*rows(0, 10))
    assert ring.between(ring.first, ring.total)[:, 5].tolist() == [6.0, 7.0, 8.0, 9.0]


def test_sampling_is_uniform_over_what_is_there() -> None:
    ring = Ring(100)
    ring.append(*rows(0, 40))
    counts = torch.bincount(ring.draw(40_000, torch.Generator().manual_seed(1))["reward"][:, 0].long(), minlength=100)
    assert int(counts[40:].sum()) == 0
    chi = float(((counts[:40] - 1000) ** 2 / 1000).sum())
    assert chi < 73  # 39 degrees of freedom, one in a thousand


@pytest.mark.parametrize(
    ("options", "said"),
    [({"steps": 0}, "at least 1"), ({"batch": 0}, "at least 1"), ({"warmup": 20, "capacity": 10}, "between 0 and"),
     ({"warmup": -1}, "between 0 and")],
)  # fmt: skip
def test_replay_refuses_what_cannot_be(options: dict[str, int], said: str) -> None:
    with pytest.raises(MethodError, match=said):
        replay(**options)


def small(**options: Any) -> Any:
    made = {"batch": 6, "warmup": 10, "capacity": 50, "hidden": (8, 8), **options}
    return find("sac")(**made)


def started(method: Any, seed: int = 0) -> State:
    environment = PointEnvironment(seed=seed)
    return begin(method, environment, build_networks(method, environment, seed, dtype=torch.float64), seed=seed)


def advanced(state: State, method: Any, turns: int) -> State:
    for _, _ in zip(range(turns), run(method, state.environment, state.models, until=10_000, state=state)):
        pass
    return state


def test_warm_up_comes_before_the_first_update_and_is_counted() -> None:
    method = small()
    state = advanced(started(method), method, 1)
    ring = state.pieces["/replay"]
    assert ring.total == 12  # the first multiple of three environments that reaches 10
    assert state.clock.decisions == 12
    assert state.clock.rows == 6
    advanced(state, method, 1)
    assert state.clock.decisions == ring.total == 15


def test_episodes_cut_by_the_clock_go_on_and_ended_ones_do_not() -> None:
    method = small(batch=400, warmup=200, capacity=1000)
    environment = PointEnvironment()
    step = next(run(method, environment, build_networks(method, environment, 0, dtype=torch.float64), until=1))
    batch = step.batch
    assert bool(batch.terminated.any())
    assert bool(batch.truncated.any())
    assert not bool((batch.terminated & batch.truncated).any())
    # The true next observation, not the first of the next episode: the toy's own equation of motion.
    x = 0.9 * batch.obs[..., 0] + 0.6 * batch.action[..., 0].clamp(-1, 1) + 0.1 * batch.obs[..., 1]
    torch.testing.assert_close(batch.next_obs[..., 0], x, rtol=0, atol=1e-12)
    assert step.logs["return"] == step.logs["return"]


def test_raw_observations_are_kept_and_shown_as_the_policy_sees_them_now() -> None:
    class Shifting:
        """Sees twice the observation; learns how many it was shown."""

        shown = 0

        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def see(self, obs: Tensor) -> Tensor:
            return 2 * obs

        def learn(self, obs: Tensor) -> None:
            Shifting.shown += len(obs)

        def act(self, obs: Tensor, carry: Any, rng: torch.Generator) -> Any:
            return self.inner.act(self.see(obs), carry, rng)

    from trimtab.core.piece import piece

    @piece("act")
    def shifted(kit: Any, policy: Any) -> Any:
        return Shifting(policy)

    method = small().then(shifted())
    state = started(method)
    step = next(run(method, state.environment, state.models, until=1, state=state))
    kept = state.pieces["/replay"].between(0, 12)[:, :2]
    drawn = step.batch.obs[:, 0] / 2
    assert all(bool((kept == row).all(1).any()) for row in drawn)
    assert Shifting.shown == 15  # each once, the first ones too


# -- files of a checkpoint ---------------------------------------------------------------------------------------


def named(checkpoint: Path) -> list[str]:
    names: list[str] = json.loads((checkpoint / "manifest.json").read_text())["chunks"]
    return names


def test_a_run_goes_on_bitwise_and_saves_only_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK", 8)
    method = small(capacity=30)
    straight = advanced(started(method), method, 30)
    state = started(method)
    for turns in (4, 3, 5):
        save(advanced(state, method, turns), tmp_path, keep=2)
    first, second = checkpoints(tmp_path)
    shared = set(named(first)) & set(named(second))
    assert shared, "full chunks are not written again"
    on_disk = {p.name for p in (tmp_path / "chunks").iterdir()}
    assert on_disk == set(named(first)) | set(named(second)), "what no checkpoint names is gone"
    other = started(method, seed=5)
    load(other, tmp_path)
    assert other.pieces["/replay"].saved == state.pieces["/replay"].saved
    advanced(other, method, 18)
    for name, ours in straight.lookup().items():
        for p, q in zip(ours.parameters(), other.lookup()[name].parameters()):
            assert torch.equal(p, q), name
    a, b = straight.pieces["/replay"], other.pieces["/replay"]
    assert torch.equal(a.between(a.first, a.total), b.between(b.first, b.total))
    save(other, tmp_path, keep=1)
    assert {p.name for p in (tmp_path / "chunks").iterdir()} == set(named(checkpoints(tmp_path)[0]))


def test_saving_costs_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK", 100)
    ring = Ring(100_000)
    ring.append(*rows(0, 1050))
    width = ring.rows.shape[1] * 4
    assert chunks.write(ring, tmp_path) == 1050 * width
    ring.append(*rows(1050, 5))
    assert chunks.write(ring, tmp_path) == 55 * width  # the last chunk was not full
    assert chunks.write(ring, tmp_path / "elsewhere") == 1055 * width  # nothing is there yet
    assert torch.equal(chunks.read(ring.saved, 0, tmp_path / "elsewhere"), ring.between(0, 1055))


def test_an_older_checkpoint_can_be_gone_back_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK", 8)
    method, state = small(), None
    state = started(method)
    for _ in range(3):
        save(advanced(state, method, 4), tmp_path, keep=3)
    back = started(method, seed=3)
    load(back, checkpoints(tmp_path)[0])
    save(advanced(back, method, 2), tmp_path, keep=4)  # another future, in the same folder
    for path in checkpoints(tmp_path):
        again = started(method, seed=4)
        load(again, path)
        ring = again.pieces["/replay"]
        assert ring.total == again.clock.decisions


def test_a_kill_between_chunks_and_checkpoint_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.core import state as module

    method, state = small(), None
    state = started(method)
    save(advanced(state, method, 3), tmp_path)
    kept = {p.name for p in (tmp_path / "chunks").iterdir()}

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    advanced(state, method, 2)
    with monkeypatch.context() as patched:
        patched.setattr(module, "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            save(state, tmp_path)
    (tmp_path / "chunks" / ".writing").write_bytes(b"half")
    assert len(list((tmp_path / "chunks").iterdir())) == 3  # a chunk that nobody names, and half of one
    other = started(method, seed=5)
    load(other, tmp_path)
    assert other.clock.turns == 3
    save(advanced(other, method, 1), tmp_path, keep=2)
    left = {p.name for p in (tmp_path / "chunks").iterdir()}
    assert kept < left
    assert len(left) == 2


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_a_chunk_that_is_gone_or_damaged_is_said(tmp_path: Path, damage: str) -> None:
    method = small()
    save(advanced(started(method), method, 3), tmp_path)
    (file,) = (tmp_path / "chunks").iterdir()
    if damage == "missing":
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match=damage):
        load(started(method), tmp_path)


def test_a_ring_that_is_too_small_for_what_was_saved_is_refused(tmp_path: Path) -> None:
    ring = Ring(20)
    ring.append(*rows(0, 15))
    with pytest.raises(ValueError, match="holds 15 transitions, and capacity is 10"):
        Ring(10).restore(ring.about(), ring.between(0, 15))
