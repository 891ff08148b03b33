"""PROPS: a behavior policy that collects what the kept steps lack; ROS, its ancestor; and PPO with the same buffer."""

from __future__ import annotations

from trimtab.core.errors import MethodError
from trimtab.core.method import Method, Track
from trimtab.core.piece import Piece, Schedule
from trimtab.core.registry import Neutral, method
from trimtab.methods.control.actor_critic import ppo
from trimtab.stages.behavior import held, kept, repair, restarted, staying, sweeps, target, waiting
from trimtab.stages.update import sgd


def keeping(base: Method, batches: int, blocks: int = 1) -> Method:
    """The base on the last `batches` batches, each collected in `blocks` parts; it learns when one is complete."""
    if batches < 1 or blocks < 1:
        raise MethodError(f"batches={batches} and blocks={blocks} must both be at least 1")
    if any(p.name == "kept" for p in base.get("collect").walk()):
        raise MethodError(f"{base.name} keeps earlier batches already; set its own batches instead of keeping more")
    horizon = base.get("collect.horizon")
    if horizon % blocks:
        raise MethodError(
            f"a batch of {horizon} steps cannot be collected in {blocks} equal parts; choose blocks that divide horizon"
        )
    made = base if blocks == 1 else base.set("collect.horizon", horizon // blocks)
    if any(p.stage == "act" for p in base.pieces):
        made = made.swap("collect.raw", True)
    made = made.wrap("collect", kept(blocks=batches * blocks))
    for track in base.tracks:
        made = made.wrap(f"{track.name}:update", waiting(turns=blocks))
    return made


def behaving(base: Method, losses: tuple[Piece, ...], update: Piece, *, moments: bool) -> Method:
    """The base with a behavior policy that acts; it begins anew from the policy each turn and learns these losses."""
    pieces = (target(moments=moments), staying(), *losses)
    track = Track("behavior", trains="behavior", pieces=pieces, update=update, on="last")
    return (
        base.swap("collect.policy", "behavior")
        .but(track=track, networks={"behavior": base.networks["policy"]} if base.networks else {})
        .wrap("behavior:update", restarted())
    )


@method(
    world="control",
    title="PPO on the last few batches, taken as its own",
    base=ppo,
    case="steps",
    neutral=Neutral({"batches": 1}),
)
def buffered(base: Method, *, batches: int = 2) -> Method:
    """Edits to ppo: an update learns from the last `batches` batches as if the present policy had made them all.

    The control of PROPS ("PPO with a buffer"): ratios, values and advantages are of the present policy over the whole
    buffer, and nothing corrects for whose the old steps are. batches: at least 1.
    """
    return keeping(base, batches)


@method(
    world="control",
    title="On-Policy Policy Gradient Reinforcement Learning Without On-Policy Sampling (PROPS)",
    arxiv="2311.08290",
    base=ppo,
    case="steps",
    neutral=Neutral(
        {"batches": 1, "blocks": 1},
        why="what is collected is displaced before the behavior policy could learn from it, so it is the policy",
    ),
    presets={"discrete": {"kl_coef": 0.0, "blocks": 64}},
)
def props(
    base: Method,
    *,
    batches: int = 2,
    blocks: int = 2,
    eps: float = 0.3,
    kl_coef: float = 0.1,
    limit: float | None = 0.03,
    lr: float | Schedule = 1e-3,
    epochs: int = 16,
    minibatches: int = 16,
    clip_norm: float | None = 0.5,
) -> Method:
    """Edits to ppo: a behavior policy collects, learned anew for every block; the learner takes the buffer as its own.

    Before each block phi <- theta, then descent over the kept steps on
    `mean max(rho, clip(rho, 1 - eps, 1 + eps)) + kl_coef KL(phi || theta)`, `rho = phi(a|s) / pi_theta(a|s)`: actions
    that the buffer holds too often become rarer. PPO's ratios, values and advantages are of theta over the whole
    buffer, as if theta had made it. Evaluate theta, never phi.

    batches: how many stay (b). blocks: parts of a batch, the behavior policy learning before each (n / m). eps: in
    [0, 1]. kl_coef: Gaussian policies only; 0 for numbered actions (preset "discrete"). limit: of the estimated KL, on
    each minibatch before its step; None lets the policy collapse on small buffers. lr, epochs, minibatches, clip_norm:
    of its Adam, which remembers across blocks.

    The steps that the coming block displaces are left out. With one batch in one block that is all of them: plain PPO
    (the released code crashes there). Where paper and released code differ: log-probabilities of theta are taken after
    its update, not before, so rho begins at 1; phi is renewed right after theta; advantages run over the whole buffer
    (the discrete code stops after the first batch). The paper's numbers differ by environment: limit 0.03 to 0.1, lr
    1e-4 or 1e-3, kl_coef 0.1 or 0.3, 256 to 1024 steps a block; preset "discrete" is for a policy over numbered actions
    and blocks of 16 to 32 steps. The code's optional weighting by |advantage| is not offered.
    """
    losses = (repair(eps=eps), *((held(coef=kl_coef),) if kl_coef else ()))
    update = sweeps(epochs=epochs, minibatches=minibatches, limit=limit, lr=lr, clip=clip_norm)
    return behaving(keeping(base, batches, blocks), losses, update, moments=bool(kl_coef))


@method(
    world="control",
    title="Robust On-Policy Sampling for data-efficient policy evaluation (ROS)",
    arxiv="2111.14552",
    base=ppo,
    case="steps",
    neutral=Neutral({"batches": 1, "blocks": 1}, why="as for props: no step is left to be pushed away from"),
)
def ros(base: Method, *, batches: int = 2, blocks: int = 2, lr: float | Schedule = 1.0) -> Method:
    """Edits to ppo: as PROPS, but one plain gradient step on `mean rho` over the kept steps, `rho = phi / pi_theta`.

    At phi = theta that is `phi <- theta - lr grad mean log pi_theta(a|s)`: away from what was done. Zhong et al. 2022,
    arXiv 2111.14552, takes a step after every step of the environment; here it is one for each block.
    batches, blocks: as for `props`. lr: of the step, a number or a schedule. The continuous code of PROPS has the sign
    of its own ROS wrong.
    """
    return behaving(keeping(base, batches, blocks), (repair(eps=1.0),), sgd(lr=lr), moments=False)
