"""The `--full` part of a control method's claim: what it earns in a small environment that is stepped."""

from __future__ import annotations

from trimtab.core.loop import run
from trimtab.core.method import Method
from trimtab.environments.gym import GymEnvironment
from trimtab.policies.networks import build_networks

DECISIONS = 100_000
CARTPOLE = "CartPole-v1"


def on_returns(method: Method, seed: int) -> dict[str, float]:
    """Train on CartPole-v1 for 100000 decisions of one environment; the seed is that of everything.

    return: the mean return of training episodes over the last tenth of decisions. early: over all of them.
    """
    environment = GymEnvironment(CARTPOLE, seed=seed)
    try:
        models = build_networks(method, environment, seed)
        seen: list[tuple[int, float]] = []
        for step in run(method, environment, models, until={"decisions": DECISIONS}, seed=seed):
            if "return" in step.logs:
                seen.append((step.state.clock.decisions, step.logs["return"]))
    finally:
        environment.close()
    last = [value for at, value in seen if at > 0.9 * DECISIONS]
    return {"return": sum(last) / len(last), "early": sum(value for _, value in seen) / len(seen)}
