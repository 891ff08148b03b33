"""Law 7 for the off-policy methods: each agrees over an update with its literal twin, the noise recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden import replay_twins as twins
from trimtab.core.loop import run
from trimtab.core.method import Method
from trimtab.core.registry import find, methods
from trimtab.methods.cases import case
from trimtab.stages import critics
from trimtab.stages.update import repeated, sgd

torch.set_num_threads(1)
FEW = {"batch": 5, "warmup": 12, "capacity": 30}
SLOW = {"gamma": twins.GAMMA, "tau": twins.TAU}

# name -> method, twin, options of the twin, updates compared
CASES: dict[str, tuple[Callable[[], Method], Callable[..., twins.Params], dict[str, Any], int]] = {
    "sac": (lambda: find("sac")(**FEW, **SLOW), twins.sac, {}, 2),
    "sac, fixed alpha": (lambda: find("sac")(**FEW, **SLOW, alpha=0.2, critics=3), twins.sac, {}, 1),
    "sac[cleanrl]": (lambda: find("sac")(preset="cleanrl", **FEW, **SLOW), twins.sac, {"delay": 2, "log": False}, 3),
    "sac[sb3]": (lambda: find("sac")(preset="sb3", **FEW, **SLOW), twins.sac, {"scale": 0.5, "spread": "clamp"}, 2),
    "td3": (lambda: find("td3")(find("ddpg")(**FEW, **SLOW)), twins.td3, {}, 3),
    "ddpg": (lambda: find("ddpg")(**FEW, **SLOW), twins.ddpg, {}, 2),
    "dqn": (lambda: find("dqn")(**FEW, train_every=1, target_every=2), twins.dqn, {"every": 2}, 3),
    "dqn[sb3]": (lambda: find("dqn")(preset="sb3", **FEW), twins.dqn, {"huber": 1.0}, 2),
}


def descending(method: Method) -> Method:
    """With plain gradient descent in every track, as often repeated as it was."""
    made = replace(method, explicit=())
    for track in method.tracks:
        times = track.update.options.get("times", 1)
        made = made.on(track.name).swap("update", sgd(lr=twins.LR))
        assert times == made.track(track.name).update.options.get("times", 1), repeated
    return made


def parameters(step_or_models: Any) -> twins.Params:
    return {m: {n: p.detach().clone() for n, p in net.named_parameters()} for m, net in step_or_models.items()}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", sorted(CASES))
def test_method_agrees_with_its_twin(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    build, twin, options, updates = CASES[name]
    noise: list[Tensor] = []
    draw = critics.gaussian

    def recorded(*args: Any) -> Tensor:
        noise.append(draw(*args))
        return noise[-1]

    monkeypatch.setattr(critics, "gaussian", recorded)
    small = case("choices" if name.startswith("dqn") else "steps", seed)
    method = descending(small.shrink(build()).set("collect.batch", 5))
    models = small.models_of(method)
    loop = run(method, small.environment, models, until=10, seed=seed)
    before = {**parameters(models), **{c: parameters(models)[r.source] for c, r in method.copies.items()}}
    for update in range(updates):
        noise.clear()
        step = next(loop)
        expected = twin(step.batch, before, noise, update, **options)
        assert not noise, "the twin used all the noise that was drawn"
        now = parameters(step.state.lookup())
        errors = {f"{m}.{n}": float((now[m][n] - v).abs().max()) for m in now for n, v in expected[m].items()}
        worst = max(errors, key=errors.__getitem__)
        assert errors[worst] < 1e-12, f"{name} is off its twin by {errors[worst]:.2e} in {worst} at update {update}"
        trained = [t.trains for t in method.tracks if update % t.every == 0]
        for m in trained:
            assert max(float((now[m][n] - v).abs().max()) for n, v in before[m].items()) > 1e-5, f"{m} did not move"
        before = now


def test_every_off_policy_method_has_a_twin() -> None:
    replayed = {n for n, d in methods().items() if d.case in ("steps", "choices")
                and any(p.name == "replay" for p in d().pieces)}  # fmt: skip
    assert replayed <= {name.partition("[")[0].partition(",")[0] for name in CASES}
