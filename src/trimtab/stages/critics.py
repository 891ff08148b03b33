"""Learning from replayed transitions: bootstrapped targets, temporal-difference errors, and actors that climb a critic.

A target bootstraps through truncation: only `terminated` ends the future. Noise is drawn for all rows of the update and
kept in columns, so that gradients do not depend on how the update is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.core.batch import Batch
from trimtab.core.kit import Kit
from trimtab.core.piece import piece
from trimtab.core.terms import Term

Now = Mapping[str, Tensor]
SAMPLED = frozenset({"sample", "sample_logp"})


@contextmanager
def held(kit: Kit, name: str) -> Iterator[nn.Module]:
    """A model as a constant: gradients go through it, not into its parameters, and none is computed for them."""
    learning = kit.trained(name).values()
    for p in learning:
        p.requires_grad_(False)
    try:
        yield kit.models[name]
    finally:
        for p in learning:
            p.requires_grad_(True)


def gaussian(kit: Kit, name: str, batch: Batch) -> Tensor:
    """Standard normal noise for every action of the update, `[N, T, A]`, from the stream `name`."""
    action = batch["action"]
    shape = action.shape if action.dim() == 3 else action.flatten(2).shape
    return torch.randn(shape, generator=kit.rng(name), dtype=batch["reward"].dtype).to(action.device)


def _bootstrap(batch: Batch, value_tp1: Tensor, gamma: float) -> Tensor:
    """`r + gamma (1 - terminated) V(s')`, `[N, T]`."""
    return torch.add(batch["reward"], value_tp1.masked_fill(batch["terminated"], 0.0), alpha=gamma)


def _discount(options: Mapping[str, Any]) -> str | None:
    gamma = options["gamma"]
    return None if 0 <= gamma <= 1 else f"gamma={gamma} must be in [0, 1]"


# -- targets -------------------------------------------------------------------------------------------------------


def _sane_smoothing(options: Mapping[str, Any]) -> str | None:
    for name in ("smoothing", "clip"):
        if not options[name] >= 0:
            return f"{name}={options[name]} must be at least 0, in half widths of the action's box"
    return _discount(options)


_NEXT = ("next_obs", "reward", "terminated", "action", "mask")


@piece("annotate", slot="target", at="update", reads=_NEXT, writes=("target", "next_noise"),
       uses=("policy_target", "critic_target"), validate=_sane_smoothing)  # fmt: skip
def smoothed_target(
    kit: Kit, batch: Batch, now: Now, *, gamma: float = 0.99, smoothing: float = 0.0, clip: float = 0.5
) -> Batch:
    """`y = r + gamma (1 - terminated) min_i Q'_i(s', a')`, `a' = clip(pi'(s') + c n, low, high)`, `[N, T]`.

    `n = clip(smoothing N(0, 1), -clip, clip)` and c is half the width of the action's box, so that both are shares of
    it (Fujimoto et al. 2018, eq. 14 to 16); `next_noise` holds n. With smoothing 0 nothing is drawn.
    """
    future = batch.beside(obs=batch["next_obs"])
    action = kit.evaluate("policy_target", future, {"sample"})["sample"]
    noise = None
    if smoothing > 0:
        noise = (smoothing * gaussian(kit, "smoothing", batch)).clamp_(-clip, clip)
        bounds: Any = kit.models["policy_target"].bounds
        y = (bounds.inner(action.flatten(2)) + noise).clamp_(-1, 1)
        action = bounds.outer(y).view_as(action)
    value = kit.evaluate("critic_target", future.put(action=action), {"value"})["value"].amin(-1)
    made = batch.put(target=_bootstrap(batch, value, gamma))
    return made if noise is None else made.put(next_noise=noise)


@piece("part", uses=("temperature",))
def learned(kit: Kit) -> Tensor:
    """The temperature that a track of its own learns, a constant here."""
    model: Any = kit.models["temperature"]
    return model.log.detach().exp()


def _positive(options: Mapping[str, Any]) -> str | None:
    return None if options["value"] >= 0 else f"value={options['value']} must be at least 0"


@piece("part", validate=_positive)
def constant(kit: Kit, *, value: float = 0.2) -> float:
    """A temperature that stays as it is."""
    return value


@piece("annotate", slot="target", at="update", reads=_NEXT, writes=("target", "next_noise"),
       uses=("policy", "critic_target"), validate=_discount)  # fmt: skip
def soft_target(
    kit: Kit, batch: Batch, now: Now, *, temperature: Callable[[], float | Tensor], gamma: float = 0.99
) -> Batch:
    """`y = r + gamma (1 - terminated) (min_i Q'_i(s', a') - alpha log pi(a'|s'))`, `a' ~ pi(.|s')`, `[N, T]`.

    `a'` is made by the policy of this moment from the noise in `next_noise` (Haarnoja et al. 2018, eq. 5 and 6).
    """
    noise = gaussian(kit, "next_action", batch)
    future = batch.beside(obs=batch["next_obs"], noise=noise)
    made = kit.evaluate("policy", future, SAMPLED)
    value = kit.evaluate("critic_target", future.put(action=made["sample"]), {"value"})["value"].amin(-1)
    value = value - temperature() * made["sample_logp"]
    return batch.put(target=_bootstrap(batch, value, gamma), next_noise=noise)


@piece("annotate", slot="target", at="update", reads=("next_obs", "reward", "terminated", "mask"), writes=("target",),
       uses=("policy_target",), validate=_discount)  # fmt: skip
def greedy_target(kit: Kit, batch: Batch, now: Now, *, gamma: float = 0.99) -> Batch:
    """`y = r + gamma (1 - terminated) max_a Q'(s', a)`, `[N, T]` (Mnih et al. 2015, algorithm 1)."""
    future = batch.beside(obs=batch["next_obs"])
    value = kit.evaluate("policy_target", future, {"values"})["values"].amax(-1)
    return batch.put(target=_bootstrap(batch, value, gamma))


# -- losses --------------------------------------------------------------------------------------------------------


def _sane_error(options: Mapping[str, Any]) -> str | None:
    huber = options["huber"]
    if huber is not None and not huber > 0:
        return f"huber={huber} must be above 0: the error from which on the loss grows linearly; None squares it"
    return None if options["scale"] > 0 else f"scale={options['scale']} must be above 0"


@piece("loss", reads=("target", "action"), wants=("value",), validate=_sane_error, rows=None)
def td_error(batch: Batch, now: Now, *, scale: float = 1.0, huber: float | None = None) -> list[Term]:
    """`scale sum_i (Q_i(s, a) - y)^2`, y a constant, `[N, T]`; one Q or an ensemble of them.

    huber: `d^2 / (2 huber)` below that |d|, `|d| - huber / 2` above, instead of d^2. Metric `q`: the mean of the Q_i.
    """
    value = now["value"]
    single = value.dim() == 2
    target = batch["target"] if single else batch["target"][..., None].expand_as(value)
    if huber is None:
        error = (value - target).square()
    else:
        error = F.smooth_l1_loss(value, target, reduction="none", beta=huber)
    error, q = (error, value.detach()) if single else (error.sum(-1), value.detach().mean(-1))
    return [Term(error if scale == 1 else scale * error, "td_error"), Term(q, "q", metric=True)]


@piece("loss", reads=("obs", "mask"), wants=("sample",), uses=("critic",), rows=None)
def climb(kit: Kit, batch: Batch, now: Now) -> Term:
    """`-Q_1(s, pi(s))`, `[N, T]`: the deterministic policy gradient (Lillicrap et al. 2016, eq. 6; TD3 takes Q_1)."""
    here = batch.beside(obs=batch["obs"], action=now["sample"])
    with held(kit, "critic") as critic:
        return Term(-critic.evaluate(here, frozenset({"first"}))["first"], "climb")  # type: ignore[operator]


@piece("loss", reads=("obs", "noise", "mask"), wants=("sample", "sample_logp"), uses=("critic",), rows=None)
def soft_climb(kit: Kit, batch: Batch, now: Now, *, temperature: Callable[[], float | Tensor]) -> list[Term]:
    """`alpha log pi(a|s) - min_i Q_i(s, a)`, a made by the policy from `noise`, `[N, T]` (Haarnoja et al. 2018, eq. 9).

    Metric `entropy`: `-log pi(a|s)` of those actions.
    """
    here = batch.beside(obs=batch["obs"], action=now["sample"])
    logp = now["sample_logp"]
    with held(kit, "critic") as critic:
        value = critic.evaluate(here, frozenset({"value"}))["value"].amin(-1)  # type: ignore[operator]
    return [Term(temperature() * logp - value, "soft_climb"), Term(-logp.detach(), "entropy", metric=True)]


# -- the noise of the actor, and its temperature -----------------------------------------------------------------


@piece("annotate", at="update", reads=("action", "reward"), writes=("noise",))
def action_noise(kit: Kit, batch: Batch, now: Now) -> Batch:
    """`noise` `[N, T, A]`, standard normal: what the policy makes this update's actions from."""
    return batch.put(noise=gaussian(kit, "noise", batch))


@piece(
    "annotate", at="update", reads=("obs", "noise", "mask"), writes=("sample_logp",), wants=("sample", "sample_logp")
)
def shared_sample(batch: Batch, now: Now) -> Batch:
    """`sample_logp` `[N, T]`: `log pi` of the actions that the actor is about to learn from, made once for the actor's
    loss and the temperature's."""
    return batch.put(sample_logp=now["sample_logp"])


@piece("annotate", slot="shared_sample", at="update", reads=("obs", "action", "reward", "mask"),
       writes=("noise", "sample_logp"), uses=("policy",))  # fmt: skip
def fresh_sample(kit: Kit, batch: Batch, now: Now) -> Batch:
    """`sample_logp` of actions drawn anew, by the policy as the actor's update has left it."""
    made = batch.put(noise=gaussian(kit, "noise", batch))
    return made.put(sample_logp=kit.evaluate("policy", made, {"sample_logp"})["sample_logp"])


@piece("loss", reads=("sample_logp", "action"), wants=("temperature", "log_temperature"), rows=None)
def hold_entropy(batch: Batch, now: Now, *, target: float | None = None, log: bool = True) -> list[Term]:
    """`-log alpha (log pi + H)`, or `-alpha (log pi + H)` with log=False, log pi a constant; H the wanted entropy.

    An entropy below H makes alpha rise. target: H; None is minus the number of action dimensions (Haarnoja et al.
    2018b, eq. 18). Metric `alpha`.
    """
    wanted = -float(batch["action"][0, 0].numel()) if target is None else target
    strength = now["log_temperature" if log else "temperature"]
    alpha = Term(now["temperature"].detach(), "alpha", metric=True)
    return [Term(-strength * (batch["sample_logp"] + wanted), "hold_entropy"), alpha]
