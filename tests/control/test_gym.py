"""Gymnasium environments: what a step gives, whole episodes, exact resume, and every fault as a sentence."""

from __future__ import annotations

import itertools
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from tests.control.worlds import register
from trimtab.core.errors import CheckpointError, EnvironmentFailure, NonFiniteError
from trimtab.environments.gym import GymEnvironment
from trimtab.environments.transition import episode_seed

register()


def acted(env: GymEnvironment, steps: int, seed: int = 0) -> list[Any]:
    """Random steps, and what they gave."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(steps):
        before = env.obs
        if isinstance(env.action_space, gym.spaces.Discrete):
            action = torch.from_numpy(rng.integers(env.action_space.n, size=env.envs))
        else:
            action = torch.from_numpy(rng.normal(size=(env.envs, *env.action_space.shape)))
        made.append((before, *env.step(action)))
    return made


def same(a: list[Any], b: list[Any]) -> bool:
    return all(torch.equal(x, y) for s, t in zip(a, b, strict=True) for x, y in zip(s, t, strict=True))


@pytest.mark.parametrize("spec", ["Pendulum-v1", "CartPole-v1", "Hopper-v5", "MiniGrid-Empty-5x5-v0", "FrozenLake-v1"])
def test_a_resumed_environment_goes_on_to_the_same_bits(spec: str) -> None:
    env = GymEnvironment(spec, envs=2, seed=3)
    acted(env, 37)
    state = env.state_dict()
    expected = acted(env, 300, seed=1)
    other = GymEnvironment(spec, envs=2, seed=3)
    other.load_state_dict(state)
    assert same(acted(other, 300, seed=1), expected)
    assert other.state_dict()["total"] == env.state_dict()["total"]
    assert [f for f in other.finished if f in env.finished] == other.finished


def test_a_step_gives_what_the_bare_environment_gives() -> None:
    env, bare = GymEnvironment("CartPole-v1", seed=5), gym.make("CartPole-v1")
    seen, _ = bare.reset(seed=episode_seed(5, 0))
    episode = 0
    for action in itertools.islice(itertools.cycle([0, 1, 1]), 200):
        assert torch.equal(env.obs[0], torch.from_numpy(seen))
        made = env.step(torch.tensor([action]))
        seen, reward, terminated, truncated, _ = bare.step(action)
        assert torch.equal(made.next_obs[0], torch.from_numpy(seen))
        assert (made.reward.item(), made.terminated.item(), made.truncated.item()) == (reward, terminated, truncated)
        assert made.episode.item() == episode
        if terminated or truncated:
            episode += 1
            seen, _ = bare.reset(seed=episode_seed(5, episode))
    assert episode > 5
    assert [f.episode for f in env.finished] == list(range(episode))
    assert all(f.total == f.length for f in env.finished)


def test_a_time_limit_truncates_and_the_end_of_an_episode_terminates() -> None:
    cut = GymEnvironment("TrimtabCounter-v0(max_episode_steps=3)", envs=2)
    ends = [cut.step(torch.zeros(2, 1)) for _ in range(6)]
    assert [bool(e.truncated.all()) for e in ends] == [False, False, True] * 2
    assert not any(bool(e.terminated.any()) for e in ends)
    whole = GymEnvironment("TrimtabCounter-v0(max_episode_steps=5)")
    last = [whole.step(torch.zeros(1, 1)) for _ in range(5)][-1]
    assert (last.terminated.item(), last.truncated.item()) == (True, False)
    assert last.next_obs[0, 0] == pytest.approx(0.5)
    assert whole.obs[0, 0] == 0


def test_episodes_are_numbered_once_and_seeded_by_their_number_alone() -> None:
    one, three = GymEnvironment("TrimtabCounter-v0", seed=2), GymEnvironment("TrimtabCounter-v0", envs=3, seed=2)
    starts = {}
    for env in (one, three):
        for _ in range(15):
            first = env.obs
            made = env.step(torch.zeros(env.envs, 1))
            for i in range(env.envs):
                if made.next_obs[i, 0] == pytest.approx(0.1):
                    assert starts.setdefault(int(made.episode[i]), float(first[i, 1])) == float(first[i, 1])
    assert sorted(starts) == list(range(9))
    assert len(set(starts.values())) == 9


def test_actions_are_clipped_to_their_box_and_discrete_ones_begin_where_the_space_does() -> None:
    env = GymEnvironment("TrimtabCounter-v0")
    env.step(torch.tensor([[7.0]], dtype=torch.float64))
    env.step(torch.tensor([[-0.5]]))
    acts = env._worlds[0].unwrapped.acts
    assert [a.tolist() for a in acts] == [[1.0], [-0.5]]
    assert all(a.dtype == np.float32 for a in acts)
    choice = GymEnvironment("TrimtabChoice-v0", envs=2)
    choice.step(torch.tensor([0, 2]))
    assert [w.unwrapped.acts for w in choice._worlds] == [[2], [4]]


def test_observations_become_one_box_and_those_of_minigrid_what_is_asked() -> None:
    shapes = {
        spec: GymEnvironment(spec).obs.shape[1:]
        for spec in (
            "MiniGrid-Empty-5x5-v0",
            "MiniGrid-Empty-5x5-v0(observation=image)",
            "MiniGrid-Empty-5x5-v0(observation=words)",
            "MiniGrid-Fetch-5x5-N2-v0",
            "FrozenLake-v1",
        )
    }
    flat, image, words, varies, lake = shapes.values()
    assert (flat, image, lake) == ((7 * 7 * 3 + 4,), (7, 7, 3), (16,))
    assert words == varies  # a mission that varies must be read
    assert words[0] > 1000


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("Pendulun-v1", ["no Gymnasium environment 'Pendulun-v1'", "Did you mean 'Pendulum-v1'"]),
        ("halfcheetah", ["Did you mean 'HalfCheetah-v5'"]),
        ("Hopper-v9", ["Did you mean 'Hopper-v5'"]),
        ("Hopper-v3", ["cannot be made", "There is a newer version: 'Hopper-v5'"]),
        ("no_such_module:Thing-v0", ["cannot be had", "no_such_module"]),
        ("", ["no id"]),
        ("Pendulum-v1(g=9.8", ["must end with ')'"]),
        ("Pendulum-v1(gg=9.8)", ["no parameter 'gg'", "Did you mean 'g'"]),
        ("Pendulum-v1(max_episode_steps=0)", ["max_episode_steps=0", "at least 1"]),
        ("Pendulum-v1(render_mode=human)", ["trimtab watch"]),
        ("Pendulum-v1(observation=flat)", ["of MiniGrid environments"]),
        ("MiniGrid-Empty-5x5-v0(observation=imago)", ["Did you mean 'image'"]),
        ("TrimtabWorded-v0", ["cannot be flattened"]),
        ("TrimtabTangled-v0", ["Box, Discrete and MultiDiscrete"]),
    ],
)
def test_an_environment_that_cannot_be_had_says_why(spec: str, parts: list[str]) -> None:
    with pytest.raises(EnvironmentFailure) as refused:
        GymEnvironment(spec)
    for part in parts:
        assert part in str(refused.value)


@pytest.mark.parametrize(
    ("fault", "part"),
    [
        ("nan observation", "gave a nan or infinite observation"),
        ("nan reward", "gave a nan or infinite reward"),
        ("infinite reward", "gave a nan or infinite reward"),
        ("raises", "raised RuntimeError: the arm fell off"),
        ("os error", "raised OSError: [Errno 5] the camera is gone"),
    ],
)
def test_what_goes_wrong_in_an_episode_is_said_with_the_place(fault: str, part: str) -> None:
    env = GymEnvironment(f"TrimtabCounter-v0(fault={fault!r})", envs=2, seed=4)
    env.step(torch.zeros(2, 1))
    env.step(torch.zeros(2, 1))
    with pytest.raises(EnvironmentFailure) as refused:
        env.step(torch.zeros(2, 1))
    for piece in (part, "environment 0 of 2", "episode 0", "step ", f"reset with seed {episode_seed(4, 0)}"):
        assert piece in str(refused.value)


def test_an_episode_that_never_ends_is_stopped_and_says_how_to_limit_it() -> None:
    env = GymEnvironment("TrimtabCounter-v0(fault='never ends')", longest=50)
    with pytest.raises(EnvironmentFailure, match=r"does not end. Give it one: 'TrimtabCounter-v0\(max_episode_steps"):
        acted(env, 60)


def test_an_environment_that_is_not_deterministic_cannot_be_resumed() -> None:
    env = GymEnvironment("TrimtabCounter-v0(fault='not deterministic')")
    env.step(torch.zeros(1, 1))
    other = GymEnvironment("TrimtabCounter-v0(fault='not deterministic')")
    with pytest.raises(CheckpointError, match="not deterministic"):
        other.load_state_dict(env.state_dict())


def test_actions_that_do_not_fit_are_refused() -> None:
    box, choice = GymEnvironment("TrimtabCounter-v0", envs=2), GymEnvironment("TrimtabChoice-v0")
    with pytest.raises(EnvironmentFailure, match=r"of shape \[2, 1\], and these have \[2\]"):
        box.step(torch.zeros(2))
    with pytest.raises(NonFiniteError, match="nan or infinite"):
        box.step(torch.tensor([[0.0], [float("nan")]]))
    with pytest.raises(NonFiniteError, match="nan or infinite"):
        box.step(torch.tensor([[0.0], [float("inf")]]))
    with pytest.raises(EnvironmentFailure, match="the actions 0 to 2, and was given 3"):
        choice.step(torch.tensor([3]))
    with pytest.raises(EnvironmentFailure, match="envs=0"):
        GymEnvironment("TrimtabCounter-v0", envs=0)


def test_what_a_step_returned_is_never_written_into_again() -> None:
    env = GymEnvironment("TrimtabCounter-v0", envs=2)
    kept = acted(env, 12)
    before = [tuple(t.clone() for t in row) for row in kept]
    acted(env, 12, seed=1)
    assert same(kept, before)
