"""PROPS: does its behavior policy collect a sample that is closer to the policy than the policy's own?

The problem of the card: a 5 x 5 grid, back in its corner every 20 steps, a fixed random softmax policy with logits
N(0, 0.5^2), a sample of 1024 steps; the behavior policy is renewed before every step. `sum_s n_s / N KL(counts || pi)`.

Differences from the card's own measurement: 8 seeds for 6 and 12; each has a policy of its own. ROS has the step sizes
of the card's sweep, its best one (100) is what PROPS is compared with.
"""

from __future__ import annotations

from trimtab.claims.core import Arm, Claim, Part, Study, above, below
from trimtab.claims.returns import on_returns
from trimtab.core.loop import run
from trimtab.core.method import Method
from trimtab.core.piece import Piece
from trimtab.core.registry import find
from trimtab.environments.tabular import grid
from trimtab.methods.control.props import behaving, keeping
from trimtab.policies.tabular import TableSoftmax
from trimtab.stages.behavior import repair, sweeps
from trimtab.stages.sampling import count_error
from trimtab.stages.steps import steps
from trimtab.stages.update import sgd

STEPS, FEW = 1024, 128


def still(update: Piece, eps: float = 1.0) -> Method:
    """A policy that nobody trains, its steps all kept, and a behavior policy beside it renewed before each of them."""
    base = keeping(Method("still", pieces=(steps(horizon=1),)), STEPS + 1)
    return behaving(base, (repair(eps=eps),), update, moments=False)


def sampled(method: Method, seed: int) -> dict[str, float]:
    """error: the sampling error of 1024 steps, in nats. error_few: of the first 128 of them."""
    environment, made = grid(seed=seed), {}
    policy, behavior = (TableSoftmax(25, 4, scale=0.5, seed=seed) for _ in range(2))
    probs = policy.probs.detach()
    for step in run(method, environment, {"policy": policy, "behavior": behavior}, until=STEPS, seed=seed):
        if step.turn in (FEW, STEPS):
            error = count_error(probs, step.batch.obs.flatten(), step.batch.action.flatten())
            made["error" if step.turn == STEPS else "error_few"] = error
    return made


def ros(lr: float) -> Arm:
    return Arm(f"ROS: one gradient step of size {lr} on the kept steps", lambda seed: still(sgd(lr=lr)))


def props(lr: float) -> Arm:
    update = sweeps(lr=lr, minibatches=1, limit=None, clip=None)
    return Arm(f"PROPS: 16 Adam steps of size {lr}, eps 0.3, no KL", lambda seed: still(update, 0.3))


ROS = ("ros 5", "ros 20")


def against(says: str, metric: str, baseline: str, limit: float, control: str) -> Part:
    return Part(says, metric, "props", baseline, (control, *ROS), below(limit), kind="ratio")


# -- on an environment that is learned -----------------------------------------------------------------------------


def small_ppo() -> Method:
    made: Method = find("ppo")(preset="cleanrl_discrete", horizon=512)
    return made


CLAIM = Claim(
    method="props",
    statement="A behavior policy pushed away from the actions that a buffer holds too often gives a sample closer to "
    "the policy than sampling the policy itself, and so policy gradients that need less data.",
    mechanism=Study(
        arms={
            "on-policy": Arm("the policy itself", lambda seed: still(sgd(lr=0.0))),
            "ros 5": ros(5.0),
            "ros 20": ros(20.0),
            "ros 100": ros(100.0),
            "props": props(0.1),
        },
        parts=(
            against("after 1024 steps its sampling error is at most half of the policy's own", "error", "on-policy",
                    0.5, "ros 100"),
            against("after 1024 steps it is below that of ROS with its best step size", "error", "ros 100", 1.0,
                    "on-policy"),
            against("after 128 steps it is below the policy's own", "error_few", "on-policy", 1.0, "ros 100"),
            against("after 128 steps it is below that of ROS with the same step size", "error_few", "ros 100", 1.0,
                    "on-policy"),
        ),
        measure=sampled,
        seeds=8,
    ),
    full=Study(
        arms={
            "ppo": Arm("PPO, 512 steps a batch, CleanRL's numbers for numbered actions", lambda seed: small_ppo()),
            "buffered": Arm("PPO on the last two batches", lambda seed: find("buffered")(small_ppo())),
            "props": Arm("PROPS: two batches kept, four blocks a batch, 16 epochs in 4 minibatches, no KL price",
                         lambda seed: find("props")(small_ppo(), blocks=4, kl_coef=0.0, minibatches=4)),
        },
        parts=(
            Part("on CartPole the mean return over 100000 decisions is above PPO's", "early", "props", "ppo",
                 ("buffered",), above(0.0)),
            Part("it is above that of PPO with the same buffer: the behavior policy matters, not only old steps",
                 "early", "props", "buffered", ("ppo",), above(0.0)),
        ),
        measure=on_returns,
        seeds=5,
        about="CartPole-v1, 100000 decisions",
    ),
)  # fmt: skip
