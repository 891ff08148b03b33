"""A behavior policy that repairs what chance left out: old steps that stay, and a policy pushed away from them.

A finite sample of a policy holds some actions too often and others too rarely. A second policy, begun anew from the
first before each collect, is pushed down on what the kept steps hold, so that what comes next makes up for it; the
learner then takes all kept steps as its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.core.batch import Batch
from trimtab.core.closure import Closure
from trimtab.core.kit import Kit
from trimtab.core.piece import Schedule, piece
from trimtab.core.terms import Term, mask_of
from trimtab.stages.around import outermost_adds
from trimtab.stages.steps import RAW
from trimtab.stages.update import descend, make_adamw

Logs = dict[str, float | Tensor]


# -- steps that stay -----------------------------------------------------------------------------------------------


def nothing_kept(kit: Any, options: Mapping[str, Any]) -> list[dict[str, Tensor]]:
    """The columns of earlier collects, oldest first: none."""
    return []


def _sane_kept(options: Mapping[str, Any]) -> str | None:
    return None if options["blocks"] >= 1 else f"blocks={options['blocks']} must be at least 1: the new one is kept too"


@piece("collect", writes=("fresh", "leaving"), state={"kept": nothing_kept}, validate=_sane_kept,
       fits=outermost_adds("joins each row to the same row of the collect before"))  # fmt: skip
def kept(kit: Kit, *, inner: Callable[[], Batch], blocks: int = 2) -> Batch:
    """A wrap: the steps of the last `blocks` collects in one row for each environment, in the order they were made.

    `fresh` bool [N, T]: collected now. `leaving` bool [N, T]: gone by the next batch, which is the oldest collect once
    there are `blocks` of them. Only new steps count as decisions. Where the policy sees observations through an `act`
    wrap (and collect says what they were, `steps(raw=True)`), old ones are shown as it sees them today.
    """
    new = kit.counted(inner)
    length = new["mask"].shape[1]
    along = {n: c for n, c in new.columns.items() if isinstance(c, Tensor) and c.dim() > 1 and c.shape[1] == length}
    held = [*kit.state["kept"], along]
    kit.state["kept"] = held[1:] if len(held) == blocks else held
    old = held[:-1]
    columns = {n: torch.cat([*(block[n] for block in old), c], 1) for n, c in along.items() if n not in RAW}
    seen = sum(block["mask"].shape[1] for block in old)
    if old and RAW[0] in along:
        see = getattr(kit.actor("policy"), "see", lambda obs: obs)
        for name, raw in zip(("obs", "next_obs"), RAW):
            again = torch.cat([block[raw] for block in old], 1)
            shown = see(again.flatten(0, 1)).unflatten(0, again.shape[:2])
            columns[name] = torch.cat([shown, columns[name][:, seen:]], 1)
    place = torch.arange(columns["mask"].shape[1]).expand(len(new), -1)
    leaving = held[0]["mask"].shape[1] if len(held) == blocks else 0
    rows = {n: c for n, c in new.columns.items() if n not in along}
    return Batch({**rows, **columns, "fresh": place >= seen, "leaving": place < leaving})


# -- what the behavior policy learns -------------------------------------------------------------------------------


@piece("select", slot="staying", reads=("leaving", "keep", "mask"), writes=("keep",), rows=None)
def staying(batch: Batch) -> Batch:
    """Steps that the coming collect displaces say nothing about what will be missing."""
    return batch.put(keep=mask_of(batch).bool() & ~batch.leaving)


@piece("annotate", slot="target", reads=("obs", "action", "mask"), uses=("policy",),
       writes=("logp_target", "mean_target", "std_target"))  # fmt: skip
def target(kit: Kit, batch: Batch, *, moments: bool = True) -> Batch:
    """`logp_target` [N, T] of every step under the policy as it is now; with `moments`, its mean and std too."""
    wants = frozenset({"logp", "mean", "std"} if moments else {"logp"})
    made = kit.evaluate("policy", batch, wants)
    return batch.put(**{f"{name}_target": made[name] for name in sorted(wants)})


def _sane_eps(options: Mapping[str, Any]) -> str | None:
    eps = options["eps"]
    return None if isinstance(eps, Schedule) or 0 <= eps <= 1 else f"eps={eps} must be in [0, 1]"


@piece("loss", slot="repair", reads=("logp_target", "action", "mask"), wants=("logp",), validate=_sane_eps)
def repair(batch: Batch, now: Mapping[str, Tensor], *, eps: float = 0.3) -> list[Term]:
    """`max(rho, clip(rho, 1 - eps, 1 + eps))`, `rho = phi(a|s) / pi(a|s)`: every step down to 1 - eps and no further.

    The maximum leaves the upper bound without effect. The metric `behavior_kl` is `(rho - 1) - log rho`, an estimate of
    `KL(pi || phi)`. Corrado and Hanna 2023, arXiv 2311.08290. eps: in [0, 1].
    """
    d = (now["logp"] - batch.logp_target) * batch.mask
    rho = d.exp()
    value = torch.maximum(rho, rho.clamp(1 - eps, 1 + eps))
    return [Term(value, "repair"), Term((rho - 1 - d).detach(), "behavior_kl", metric=True)]


@piece("loss", slot="held", reads=("mean_target", "std_target", "mask"), wants=("mean", "std"),
       unmet="This term is the KL of two Gaussians, and actions that are numbered have none: leave it out with "
             "props(kl_coef=0), or take all numbers for such actions with props(preset='discrete').")  # fmt: skip
def held(batch: Batch, now: Mapping[str, Tensor], *, coef: float = 0.1) -> Term:
    """`coef KL(phi || pi)` of two diagonal Gaussians, the mean over the numbers of an action, `[N, T]`.

    `log(s_t / s_p) + (s_p^2 + (mu_p - mu_t)^2) / (2 s_t^2) - 1/2`, p the behavior policy and t the learner.
    """
    mean, std, at, scale = now["mean"], now["std"], batch.mean_target, batch.std_target
    kl = (scale / std).log() + (std.square() + (mean - at).square()) / (2 * scale.square()) - 0.5
    return Term(coef * kl.mean(-1) * batch.mask, "held")


# -- how it moves --------------------------------------------------------------------------------------------------


def begun_as_policy(kit: Kit, options: Mapping[str, Any]) -> None:
    """The track's model begins the run as the policy; there is nothing else to remember."""
    _copied(kit)


def _copied(kit: Kit) -> None:
    with torch.no_grad():
        for mine, theirs in zip(kit.models[kit.model].parameters(), kit.models["policy"].parameters(), strict=True):
            mine.copy_(theirs)


@piece("update", state={"begun": begun_as_policy})
def restarted(kit: Kit, closure: Closure, *, inner: Callable[[Closure], tuple[Logs, bool]]) -> tuple[Logs, bool]:
    """A wrap: the model is the policy as it is now; then the update inside is made, if any step is left for it.

    What the optimiser inside remembers stays.
    """
    _copied(kit)
    if not bool(mask_of(closure.batch).any()):
        return {}, False
    return inner(closure)


def _sane_sweeps(options: Mapping[str, Any]) -> str | None:
    for name in ("epochs", "minibatches"):
        if options[name] < 1:
            return f"{name}={options[name]} must be at least 1"
    limit = options["limit"]
    return None if limit is None or limit > 0 else f"limit={limit} must be above 0, or None for no limit"


@piece("update", state={"optimizer": make_adamw}, validate=_sane_sweeps)
def sweeps(
    kit: Kit,
    closure: Closure,
    *,
    epochs: int = 16,
    minibatches: int = 16,
    limit: float | None = 0.03,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-5,
    weight_decay: float = 0.0,
    clip: float | None = 0.5,
) -> tuple[Logs, bool]:
    """`epochs` passes over the rows in so many minibatches, an Adam step each; all of it ends once a KL is too large.

    limit: of the metric `behavior_kl`, looked at on each minibatch before its step; None for none. lr, betas, eps,
    weight_decay, clip: see `adamw`. Logs the steps that were made (`steps`) and the last KL.
    """
    rows = mask_of(closure.batch).any(1).nonzero().squeeze(1)
    settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    parameters: Any = list(closure.params.values())
    made, kl = 0, 0.0
    for _ in range(epochs):
        order = rows[torch.randperm(len(rows), generator=kit.rng("sweeps"))] if minibatches > 1 else rows
        for part in order.tensor_split(min(minibatches, len(rows))):
            gradient = closure(where=part)
            kl = float(gradient.terms["behavior_kl"])
            if limit is not None and kl > limit:
                return {"steps": float(made), "kl": kl, "stopped": 1.0}, False
            descend(kit.state["optimizer"], parameters, gradient, clip, settings)
            made += 1
    return {"steps": float(made), "kl": kl, "stopped": 0.0}, False


def _sane_turns(options: Mapping[str, Any]) -> str | None:
    return None if options["turns"] >= 1 else f"turns={options['turns']} must be at least 1"


@piece("update", one_gradient=True, validate=_sane_turns)
def waiting(
    kit: Kit, closure: Closure, *, inner: Callable[[Closure], tuple[Logs, bool]], turns: int = 1
) -> tuple[Logs, bool]:
    """A wrap: the update inside is made in each `turns`-th turn only; in the others the track rests."""
    return inner(closure) if (kit.clock.turns + 1) % turns == 0 else ({}, True)
