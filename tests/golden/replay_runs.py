"""The off-policy methods with their noise recorded, update by update beside their twins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from torch import Tensor

from tests.golden import replay_twins as twins
from tests.golden.compared import Compared, Params
from trimtab.core.loop import run
from trimtab.core.method import Method
from trimtab.core.registry import find
from trimtab.methods.cases import case
from trimtab.stages import critics
from trimtab.stages.update import repeated, sgd

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


def _flat(nets: twins.Params) -> Params:
    return {f"{m}.{n}": x for m, net in nets.items() for n, x in net.items()}


def turns(name: str, seed: int) -> Iterator[Compared]:
    """Updates of a case; every network that is trained moves."""
    build, twin, options, updates = CASES[name]
    noise: list[Tensor] = []
    draw = critics.gaussian

    def recorded(*args: Any) -> Tensor:
        noise.append(draw(*args))
        return noise[-1]

    small = case("choices" if name.startswith("dqn") else "steps", seed)
    method = descending(small.shrink(build()).set("collect.batch", 5))
    models = small.models_of(method)
    loop = run(method, small.environment, models, until=10, seed=seed)
    before = {**parameters(models), **{c: parameters(models)[r.source] for c, r in method.copies.items()}}
    for update in range(updates):
        noise.clear()
        with patch.object(critics, "gaussian", recorded):
            step = next(loop)
        expected = twin(step.batch, before, noise, update, **options)
        assert not noise, "the twin used all the noise that was drawn"
        now = parameters(step.state.lookup())
        for m in (t.trains for t in method.tracks if update % t.every == 0):
            assert max(float((now[m][n] - v).abs().max()) for n, v in before[m].items()) > 1e-5, f"{m} did not move"
        yield Compared(_flat(now), _flat(expected), _flat(before), moves=1e-5)
        before = now
