"""A probe looks and leaves no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.laws.checks import digest
from trimtab.core.batch import Batch
from trimtab.core.copies import best
from trimtab.core.errors import EnvironmentFailure, MethodError
from trimtab.core.kit import Kit
from trimtab.core.loop import begin, run
from trimtab.core.method import Method
from trimtab.core.piece import piece
from trimtab.core.registry import parse
from trimtab.core.state import State, load, save
from trimtab.environments.text import load_environment
from trimtab.evaluation import evaluate
from trimtab.methods.cases import case
from trimtab.policies.sampler import Rollout, Sampling
from trimtab.stages import probe
from trimtab.stages.probe import held_out

torch.set_num_threads(1)
SAMPLED: dict[str, Any] = {"temperature": 1.0, "samples": 3, "k": (1, 3), "problems": 4}


class Noisy:
    """An acting policy that uses the run's random streams, the global one, and a state of its own."""

    def __init__(self, kit: Kit, policy: Any) -> None:
        self.kit, self.policy, self.sampler = kit, policy, self
        self.encode, self.decode, self.device = policy.encode, policy.decode, policy.device

    def sample(self, prompts: Any, copies: int, seeds: Any, sampling: Sampling) -> Rollout:
        self.kit.state["count"][0] += 1
        self.kit.log("acted", self.kit.state["count"][0])
        shift = torch.randint(100, seeds.shape, generator=self.kit.rng("act")) + torch.randint(100, seeds.shape)
        return self.policy.sampler.sample(prompts, copies, seeds + shift, sampling)


@piece("act", state={"count": lambda kit, options: [0]})
def noisy(kit: Kit, policy: Any) -> Noisy:
    """Wraps the policy in `Noisy`."""
    return Noisy(kit, policy)


def built(*probes: Any, acting: bool = False) -> tuple[Method, Any, Any]:
    made = case("text")
    method = made.shrink(parse("grpo"))
    if acting:
        method = method.then(noisy())
    return method.then(*probes), made.environment, made.models


def after(method: Method, environment: Any, models: Any, turns: int = 4, **more: Any) -> tuple[State, list[Any]]:
    steps = list(run(method, environment, models, until=turns, **more))
    return steps[-1].state, [s.logs for s in steps]


@pytest.mark.parametrize("acting", [False, True], ids=["policy", "act wrap"])
@pytest.mark.parametrize("env", [None, "toy:sum(limit=7)"])
def test_a_run_with_the_probe_is_bitwise_the_run_without(env: str | None, acting: bool) -> None:
    plain, logs = after(*built(acting=acting))
    probed, seen = after(*built(held_out(every=2, env=env, **SAMPLED), acting=acting))
    ours, theirs = digest(plain), digest(probed)
    assert {k: v for k, v in theirs.items() if k != "plain"} == {k: v for k, v in ours.items() if k != "plain"}
    a, b = plain.tree(), probed.tree()
    assert b["pieces"].pop("policy/held_out") is None
    for name in ("clock", "environment"):
        assert a[name] == b[name], name
    assert set(a["streams"]) == set(b["streams"])
    assert a["pieces"].keys() == b["pieces"].keys()
    assert all(a["pieces"][k] == b["pieces"][k] for k in a["pieces"] if k != "policy/optimizer")
    for x, y in zip(logs, seen):
        assert x == {k: v for k, v in y.items() if not k.startswith("held_out")}


def test_it_logs_in_its_turns_alone_what_an_evaluation_says() -> None:
    method, environment, models = built(held_out(every=2, **SAMPLED))
    for step in run(method, environment, models, until=5):
        logged = {k for k in step.logs if k.startswith("held_out")}
        if step.turn % 2:
            assert not logged
            continue
        assert logged == {"held_out", "held_out_low", "held_out_high", "held_out_pass@1", "held_out_pass@3"}
        made = evaluate(models["policy"], environment, new_tokens=4, **SAMPLED)
        assert step.logs["held_out"] == made.mean
        assert (step.logs["held_out_low"], step.logs["held_out_high"]) == (made.low, made.high)
        assert step.logs["held_out_pass@3"] == made.pass_at[3][0]


class Silent:
    """A policy that answers every problem with the same text."""

    def __init__(self, policy: Any, text: str) -> None:
        self.policy, self.text, self.sampler = policy, text, policy.sampler
        self.encode, self.device = policy.encode, policy.device

    def decode(self, tokens: Any) -> str:
        return self.text


@piece("act")
def says(policy: Any, *, text: str = "a") -> Silent:
    """Wraps the policy so that it says one thing."""
    return Silent(policy, text)


@pytest.mark.parametrize(("text", "mean"), [("b", 1.0), ("a", 0.0)])  # the coin rewards an even sum of codes
def test_it_evaluates_the_acting_policy(text: str, mean: float) -> None:
    method, environment, models = built(held_out(every=1, problems=4))
    _, logs = after(method.then(says(text=text)), environment, models, turns=1)
    assert logs[0]["held_out"] == mean


def test_an_environment_of_its_own_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    probe.opened.cache_clear()
    env = "toy:sum(limit=8)"
    method, environment, models = built(held_out(every=1, env=env, problems=5, new_tokens=3))
    _, logs = after(method, environment, models, turns=3)
    assert probe.opened.cache_info().misses == 1
    made = evaluate(models["policy"], load_environment(env), problems=5, new_tokens=3)
    assert logs[-1]["held_out"] == made.mean


def test_a_wrong_environment_is_found_before_the_first_turn() -> None:
    method, environment, models = built(held_out(every=1000, env="reasonin-gym:chain_sum"))
    with pytest.raises(EnvironmentFailure, match="Did you mean 'reasoning-gym'"):
        begin(method, environment, models)


def test_the_best_policy_by_held_out_accuracy_can_be_kept() -> None:
    method, environment, models = built(held_out(every=1, problems=4))
    state, logs = after(method.but(copies={"top": best("policy", "held_out")}), environment, models)
    assert state.copies["top"].memory["best"] == max(row["held_out"] for row in logs)


def test_a_resumed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    pieces = (held_out(every=3, env="toy:sum(limit=7)", **SAMPLED),)
    whole, logs = after(*built(*pieces, acting=True), turns=6)
    method, environment, models = built(*pieces, acting=True)
    state = begin(method, environment, models)
    for step in run(method, environment, models, until=6, state=state):
        if step.turn == 3:
            save(step.state, tmp_path)
            break
    method, environment, models = built(*pieces, acting=True)
    state = begin(method, environment, models, seed=9)
    load(state, tmp_path)
    resumed, rest = after(method, environment, models, turns=6, state=state)
    assert digest(resumed) == digest(whole)
    assert rest == logs[3:]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"every": 0}, "every=0"), ({"new_tokens": 0}, "new_tokens=0"), ({"samples": 2}, "all be the same"),
     ({"k": (2,)}, "pass@2"), ({"temperature": -1.0}, "temperature=-1.0"), ({"problems": 0}, "problems=0"),
     ({"evry": 3}, "Did you mean 'every'")],
)  # fmt: skip
def test_bad_options_are_refused_with_a_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(MethodError, match=sentence):
        held_out(**options)


def test_debug_mode_finds_nothing_to_object_to() -> None:
    method, environment, models = built(held_out(every=1, problems=2), acting=True)
    _, logs = after(method, environment, models, turns=2, debug=True)
    assert all("held_out" in row for row in logs)
    assert isinstance(next(run(method, environment, models, until=1)).batch, Batch)
