"""What tracks share within an update: one forward pass, targets that wait for the actor, updates made several times."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from trimtab.core.copies import polyak
from trimtab.core.errors import MethodError
from trimtab.core.loop import begin, run
from trimtab.core.method import Method
from trimtab.core.registry import find
from trimtab.environments.toy import PointEnvironment
from trimtab.policies.networks import build_networks
from trimtab.stages.update import clipped, repeated

torch.set_num_threads(1)
SMALL = {"batch": 8, "warmup": 12, "capacity": 60, "hidden": (8, 8)}


def watched(method: Method, turns: int = 3, memory: int | None = None) -> tuple[list[tuple[str, bool]], Any]:
    """Every `evaluate` of the policy, as (what was wanted, whether with a graph), and the last step."""
    environment = PointEnvironment()
    models = build_networks(method, environment, 0, dtype=torch.float64)
    seen: list[tuple[str, bool]] = []
    policy: Any = models["policy"]
    plain = policy.evaluate

    def evaluate(batch: Any, want: frozenset[str]) -> Any:
        seen.append(("+".join(sorted(want)), torch.is_grad_enabled()))
        return plain(batch, want)

    policy.evaluate = evaluate
    *_, step = run(method, environment, models, until=turns, memory=memory)
    return seen, step


def test_actor_and_temperature_share_one_forward_pass_of_the_policy() -> None:
    seen, _ = watched(find("sac")(**SMALL), turns=3)
    once = [("sample+sample_logp", True), ("sample+sample_logp", False)]  # the update's actions, and the target's
    assert seen == once * 3


def test_where_memory_is_short_it_is_made_twice_and_the_parameters_are_the_same() -> None:
    method = find("sac")(**SMALL)
    (few, whole), (more, cut) = watched(method), watched(method, memory=3)
    assert len(more) > len(few)
    for name, model in whole.state.models.items():
        for p, q in zip(model.parameters(), cut.state.models[name].parameters()):
            torch.testing.assert_close(p, q, atol=1e-12, rtol=0)


def test_a_pass_made_ahead_is_not_used_when_the_policy_has_moved_since() -> None:
    # The policy's track comes twice: the second has other parameters, and must look again.
    method = find("sac")(**SMALL)
    again = method.wrap("policy:update", repeated(times=2))
    seen, _ = watched(again, turns=1)
    assert [graph for _, graph in seen].count(True) == 2


def test_a_target_may_wait_for_another_model() -> None:
    rule = polyak("critic", 0.5, after="policy")
    assert rule.follows == "policy"
    assert polyak("critic", 0.5).follows == "critic"
    assert polyak("critic", 0.5, after="critic") == polyak("critic", 0.5)
    method = find("sac")(**SMALL).but(copies={"late": polyak("critic", 0.5, after="nobody")})
    environment = PointEnvironment()
    with pytest.raises(MethodError, match="nobody"):
        begin(method, environment, build_networks(method, environment, 0))


def test_a_copy_is_blended_exactly_as_before() -> None:
    from trimtab.core.copies import Kept

    source = nn.Linear(3, 2).double()
    kept = Kept.of("target", polyak("m", 0.25), source)
    with torch.no_grad():
        before = kept.module.weight.clone()
        source.weight.add_(1.0)
    kept.refresh({"m": source}, None)
    torch.testing.assert_close(kept.module.weight, 0.75 * before + 0.25 * source.weight, atol=1e-15, rtol=0)


def test_gradients_of_repeated_updates_are_clipped_too() -> None:
    method = find("sac")(**SMALL).wrap("critic:update", repeated(times=3)).wrap("critic:update", clipped(norm=1e-3))
    _, step = watched(method, turns=1)
    assert step.logs["critic/grad_clipped"] == 1.0
    assert step.logs["critic/grad_norm"] > 1e-3  # as it was before clipping


def test_a_track_can_be_made_to_wait() -> None:
    method = find("sac")(**SMALL)
    waiting = method.but(every={"policy": 3})
    assert (method.track("policy").every, waiting.track("policy").every) == (1, 3)
    assert method.fingerprint() != waiting.fingerprint()
    with pytest.raises(MethodError, match="has no track 'actor'"):
        method.but(every={"actor": 2})
    with pytest.raises(MethodError, match="every=0"):
        method.but(every={"policy": 0})
