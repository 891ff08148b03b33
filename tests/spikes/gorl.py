"""GoRL on a toy: two phases that take turns over one state tree (Zhang et al. 2025, arXiv 2512.02581).

Encode: PPO on a latent `z` through a frozen decoder. Refine: with the encoder frozen, the decoder is fitted anew, by
flow matching, so that fresh noise maps to the actions just seen. Then a new encoder starts on top.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.spikes.gorl_toy import F64, Decision, case, play, transport
from trimtab.core.batch import Batch
from trimtab.core.copies import best, frozen
from trimtab.core.kit import Kit
from trimtab.core.method import Method, Phase, Track
from trimtab.core.phases import clear, copy, freeze, fresh, phased, thaw
from trimtab.core.piece import piece
from trimtab.core.registry import Neutral, method
from trimtab.core.terms import Term
from trimtab.stages.annotate import logp_old
from trimtab.stages.surrogate import clip, pessimistic, surrogate, token_ratio
from trimtab.stages.update import adamw

Now = Mapping[str, Tensor]


# -- PPO ---------------------------------------------------------------------------------------------------------


@piece("collect", writes=("obs", "action", "sent", "logp_behavior", "next_obs", "reward", "terminated", "truncated",
                          "mask", "source"))  # fmt: skip
def unroll(kit: Kit, *, steps: int = 4) -> Batch:
    """`steps` decisions of every point, `[n, steps]`; episodes go on from batch to batch."""
    seen = play(kit.actor("policy"), kit.environment, steps, kit.rng("act"), kit.rng("environment"))
    kit.log("reward", seen["reward"].mean())
    n = len(seen["obs"])
    return Batch({**seen, "mask": torch.ones(n, steps, dtype=torch.bool), "source": torch.zeros(n, dtype=torch.long)})


@piece("credit", at="update", reads=("obs", "next_obs", "reward", "terminated", "truncated", "mask"),
       writes=("advantage", "value_target"), uses=("critic",))  # fmt: skip
def gae(kit: Kit, batch: Batch, now: Now, *, gamma: float = 0.95, lam: float = 0.95) -> Batch:
    """Generalized advantages with the critic of this moment, normalised over the update; a cut step gives no signal.

    `delta_t = r_t + gamma (1 - terminated) V_tp1 - V_t`, zero where truncated; `A_t = r_t + gamma V_target_tp1 - V_t`.
    """
    value = kit.evaluate("critic", batch, {"value"})["value"]
    after = kit.evaluate("critic", Batch({"obs": batch.next_obs[:, -1:]}), {"value"})["value"]
    value_tp1 = torch.cat([value[:, 1:], after], 1)
    discount = gamma * (~batch.terminated).to(F64)
    uncut = (~batch.truncated).to(F64)
    delta = (batch.reward + discount * value_tp1 - value) * uncut
    total, gains = torch.zeros(len(batch), dtype=F64), []
    for t in reversed(range(delta.shape[1])):
        total = delta[:, t] + discount[:, t] * uncut[:, t] * lam * total
        gains.append(total)
    value_target = torch.stack(gains[::-1], 1) + value
    target_tp1 = torch.cat([value_target[:, 1:], after], 1)
    advantage = (batch.reward + discount * target_tp1 - value) * uncut
    centred = advantage - advantage.mean()
    return batch.put(advantage=centred / (advantage.std(correction=0) + 1e-8), value_target=value_target)


@piece("loss", wants=("entropy",))
def entropy_bonus(batch: Batch, now: Now, *, coef: float = 1e-2) -> Term:
    """`-coef sum_d H_d`."""
    return Term(-coef * now["entropy"], "entropy_bonus")


@piece("loss", reads=("value_target", "truncated"), wants=("value",))
def value_error(batch: Batch, now: Now, *, coef: float = 0.25) -> Term:
    """`coef (V_target - V)^2 (1 - truncated)`, averaged over all decisions."""
    return Term(coef * (batch.value_target - now["value"]).square() * ~batch.truncated, "value_error")


@method(world="control", title="PPO with a tanh-squashed Gaussian", case="points", register=False)
def ppo(*, clip_range: float = 0.15, entropy: float = 1e-2, lr: float = 1e-2, grad_norm: float = 0.5, steps: int = 4,
        rows: int = 3, passes: int = 2) -> Method:  # fmt: skip
    """The clipped surrogate on the value before tanh (its Jacobian cancels in the ratio); the critic is a track of
    its own, so each has its own largest gradient norm."""
    actor = surrogate(ratio=token_ratio(), bound=clip(clip_range, clip_range), shape=pessimistic())
    return Method(
        "ppo",
        pieces=(unroll(steps=steps), logp_old(), gae()),
        tracks=(
            Track("policy", "policy", (actor, entropy_bonus(entropy)), adamw(lr=lr, clip=grad_norm)),
            Track("critic", "critic", (value_error(),), adamw(lr=lr, clip=grad_norm)),
        ),
        rows=rows,
        passes=passes,
    )


# -- GoRL --------------------------------------------------------------------------------------------------------


class Decoded:
    """The policy's latent decision, sent on through a decoder."""

    def __init__(self, inner: Any, decoder: nn.Module, steps: int) -> None:
        self.inner, self.decoder, self.steps = inner, decoder, steps

    def act(self, obs: Tensor, carry: Any, rng: torch.Generator | None) -> tuple[Decision, Any]:
        decision, carry = self.inner.act(obs, carry, rng)
        return {**decision, "sent": transport(self.decoder, obs, decision["action"], self.steps)}, carry


@piece("act", uses=("acting",))
def decode(kit: Kit, policy: Any, *, steps: int = 4) -> Decoded:
    """`u = g(s, z)` by `steps` Euler steps of the decoder in force, the copy `acting`."""
    return Decoded(policy, kit.models["acting"], steps)


@piece("loss", wants=("mean", "std"))
def latent_penalty(batch: Batch, now: Now, *, coef: float = 5e-4) -> Term:
    """`coef (mean_d mu^2 + mean_d sigma^2)` on the distribution's parameters."""
    return Term(coef * (now["mean"].square().mean(-1) + now["std"].square().mean(-1)), "latent_penalty")


@piece("probe", reads=("mask",), uses=("acting",))
def evaluation(kit: Kit, batch: Batch, *, points: int = 8) -> Batch:
    """Logs `evaluation`: mean reward of the mean latent over one episode of other points."""
    rng = kit.rng("evaluation")
    other = kit.environment.alike(points, rng)
    kit.log("evaluation", play(kit.actor("policy"), other, other.limit, None, rng)["reward"].mean())
    return batch


def no_pairs(kit: Kit, options: Mapping[str, Any]) -> dict[str, Tensor]:
    return {}


@piece("collect", state={"pairs": no_pairs}, writes=("obs", "action", "sent", "mask"), uses=("best", "acting"))
def pairs(kit: Kit, *, wanted: int = 48) -> Batch:
    """All (state, u) pairs as rows, T = 1: one turn is one epoch. The first turn of a phase plays them.

    Played by the best encoder so far, stochastically, through the decoder in force; u is the value before tanh.
    """
    held = dict(kit.state["pairs"])
    if not held:
        steps = -(-wanted // len(kit.environment.obs))
        seen = play(kit.actor("best"), kit.environment, steps, kit.rng("act"), kit.rng("environment"))
        kit.log("reward", seen["reward"].mean())
        held = {name: seen[name].flatten(0, 1)[:, None] for name in ("obs", "action", "sent")}
        kit.state["pairs"] = held
    return Batch({**held, "mask": torch.ones(len(held["obs"]), 1, dtype=torch.bool)})


@piece("annotate", at="update", reads=("sent", "action"), writes=("point", "time", "velocity"))
def bridge(kit: Kit, batch: Batch, now: Now, *, noises: int = 8, paired: bool = False) -> Batch:
    """`x_t = t eps + (1 - t) u` and its velocity `eps - u`, for `noises` draws of (eps, t), fresh at every update.

    paired: eps is the latent that produced u (the control that returns the old decoder) instead of fresh noise.
    """
    u = batch.sent[:, :, None].expand(-1, -1, noises, -1)
    eps = torch.randn(u.shape, generator=kit.rng("noise"), dtype=F64)
    eps = batch.action[:, :, None].expand_as(u) if paired else eps
    time = torch.rand(u.shape[:-1], generator=kit.rng("time"), dtype=F64)
    point = time[..., None] * eps + (1 - time[..., None]) * u
    return batch.put(point=point, time=time, velocity=eps - u)


@piece("loss", reads=("velocity",), wants=("velocity",))
def flow_matching(batch: Batch, now: Now) -> Term:
    """`mean over draws and dimensions of (v(s, x_t, t) - (eps - u))^2`."""
    return Term((now["velocity"] - batch.velocity).square().mean((-1, -2)), "flow_matching")


def refinement(act: Any, *, lr: float, wanted: int, noises: int, rows: int) -> Method:
    """The refine phase: the decoder alone, supervised."""
    return Method(
        "refine",
        pieces=(pairs(wanted=wanted), act),
        tracks=(Track("decoder", "decoder", (bridge(noises=noises), flow_matching()), adamw(lr=lr)),),
        rows=rows,
    )


@method(
    world="control",
    title="GoRL: online RL with generative policies, algorithm-agnostic",
    arxiv="2512.02581",
    case="points",
    base=ppo,
    neutral=Neutral(
        {"penalty": 0.0, "encode": 1000}, level="exact", why="the zero decoder is the identity: stage 0 is PPO"
    ),
    register=False,
)
def gorl(
    base: Method,
    *,
    stages: int = 2,
    encode: int = 4,
    refine: int = 4,
    penalty: float = 5e-4,
    later_penalty: float = 1e-3,
    later_clip: float = 0.3,
    later_norm: float = 1.0,
    steps: int = 4,
    decoder_lr: float = 3e-3,
    wanted: int = 48,
    noises: int = 8,
    decoder_rows: int = 16,
) -> Method:
    """Edits to PPO: a decoder between policy and environment, a penalty on the latent's two moments (the released code;
    the paper has a KL to N(0, I)), and stages: encode, refine, encode with everything but the decoder new, refine ...
    Left out: observation statistics, the decoder's validation split and early stopping. encode, refine: turns.
    """
    names = {"best": best("policy", "evaluation"), "acting": frozen("decoder")}
    first = base.then(decode(steps=steps), latent_penalty(penalty), evaluation()).but(copies=names)
    later = first.swap("latent_penalty.coef", later_penalty).swap("policy:update.clip", later_norm)
    later = later.swap("surrogate.bound", clip(later_clip, later_clip)).swap("critic:update.clip", later_norm)
    refining = refinement(decode(steps=steps), lr=decoder_lr, wanted=wanted, noises=noises, rows=decoder_rows)
    again = (copy("decoder", "acting"), fresh("policy"), fresh("critic"), freeze("decoder"), thaw("policy"),
             thaw("critic"))  # fmt: skip
    learn = (freeze("policy"), freeze("critic"), thaw("decoder"), fresh("decoder"), clear("/pairs"))
    legs = []
    for stage in range(stages):
        enter = again if stage else (freeze("decoder"),)
        legs.append(Phase(f"encode {stage}", later if stage else first, {"turns": encode}, enter))
        legs.append(Phase(f"refine {stage}", refining, {"turns": refine}, learn))
    return phased("gorl", legs)


CASES = {"ppo": (ppo, case), "gorl": (gorl, case)}
