"""Values and generalised advantages along episodes, and what an update makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.core.batch import Batch
from trimtab.core.errors import nearest
from trimtab.core.kit import Kit
from trimtab.core.piece import piece
from trimtab.core.terms import mask_of

TRUNCATIONS = ("bootstrap", "done")
ENDS = ("terminated", "truncated", "mask")


def discounted(x: Tensor, decay: Tensor) -> Tensor:
    """`y_t = x_t + decay_t y_{t+1}` along `[N, T]`, 0 after the last; `decay_t` is 0 where nothing follows."""
    made = x.t().contiguous().numpy().copy()
    follow = decay.t().contiguous().numpy()
    for t in range(len(made) - 2, -1, -1):
        made[t] += follow[t] * made[t + 1]
    return torch.from_numpy(made).t()


def last_decisions(mask: Tensor) -> Tensor:
    """Where each row's last decision is, bool `[N, T]`."""
    return mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))


def _critic(options: Mapping[str, Any]) -> tuple[str, ...]:
    return (options["critic"],)


@piece("annotate", reads=("obs", "next_obs", *ENDS), writes=("value", "next_value"), uses=_critic)
def values(kit: Kit, batch: Batch, *, critic: str = "policy") -> Batch:
    """`value` = V(s_t) and `next_value` = V(s_{t+1}), `[N, T]`, of the model or copy named `critic`.

    s_{t+1} is the true next observation, so at a cut (`truncated`, or the last step collected) it is what a longer
    episode would have gone on from. Inside an episode it is the next row's observation and is not evaluated again.
    """
    value: Tensor = kit.evaluate(critic, batch, {"value"})["value"]
    ends = batch["terminated"] | batch["truncated"] | last_decisions(batch["mask"])
    after = torch.nn.functional.pad(value[:, 1:], (0, 1))
    there = (ends & batch["mask"]).nonzero(as_tuple=True)
    beyond = Batch({"obs": batch["next_obs"][there][:, None], "mask": torch.ones(len(there[0]), 1, dtype=torch.bool)})
    after[there] = kit.evaluate(critic, beyond, {"value"})["value"][:, 0]
    return batch.put(value=value, next_value=after)


def _sane_gae(options: Mapping[str, Any]) -> str | None:
    for name in ("gamma", "lam"):
        value = options[name]
        if isinstance(value, (int, float)) and not 0 <= value <= 1:
            return f"{name}={value} must be in [0, 1]"
    truncation = options["truncation"]
    if truncation not in TRUNCATIONS:
        return f"truncation={truncation!r} is not known. {nearest(str(truncation), TRUNCATIONS)}"
    return None


@piece("credit", reads=("reward", "value", "next_value", *ENDS), writes=("advantage", "value_target"),
       validate=_sane_gae)  # fmt: skip
def gae(batch: Batch, *, gamma: float = 0.99, lam: float = 0.95, truncation: str = "bootstrap") -> Batch:
    """`A_t = delta_t + gamma lam (1 - over_t) A_{t+1}`, `delta_t = r_t + gamma (1 - d_t) V(s_{t+1}) - V(s_t)`.

    d: terminated. over: terminated or truncated; the sum never runs on into another episode. `value_target` is
    `A_t + V(s_t)`. lam = 1 gives discounted returns less V, lam = 0 the TD error.
    truncation: "bootstrap" goes on from the value of the true next observation where an episode was cut, which is the
    value of the endless task; "done" takes a cut for an end, as CleanRL does. SB3 adds `gamma V` to the reward there,
    which is "bootstrap".
    Schulman et al. 2016, arXiv 1506.02438, eq. 16.
    """
    mask = batch["mask"]
    over = batch["terminated"] | batch["truncated"]
    ended = batch["terminated"] if truncation == "bootstrap" else over
    go_on = torch.where(ended, 0.0, batch["next_value"])
    delta = torch.where(mask, batch["reward"] + gamma * go_on - batch["value"], 0.0)
    advantage = discounted(delta, gamma * lam * (~over & mask).to(delta.dtype)) * mask
    return batch.put(advantage=advantage, value_target=advantage + batch["value"])


def _sane_eps(options: Mapping[str, Any]) -> str | None:
    return None if options["eps"] > 0 else f"eps={options['eps']} must be above 0: equal advantages have no deviation"


@piece("credit", slot="normalised", at="update", reads=("advantage", "keep", "mask"), writes=("advantage",),
       validate=_sane_eps)  # fmt: skip
def normalised(batch: Batch, now: Mapping[str, Tensor], *, eps: float = 1e-8) -> Batch:
    """`A <- (A - mean) / (std + eps)` over the decisions of this update that may learn; std with ddof 1.

    All-equal advantages, and a single one, become exactly 0: they say of no decision that it was better.
    """
    advantage, every = batch["advantage"], batch.same("keep" if "keep" in batch else "mask") == 1
    keep = None if every else mask_of(batch).bool()
    chosen = advantage if keep is None else advantage[keep]
    if chosen.numel() < 2:
        return batch.put(advantage=torch.zeros_like(advantage))
    # Deviations from one of them: equal ones give exactly 0, whatever their size.
    first = chosen.flatten()[0]
    apart = chosen - first
    std, mean = torch.std_mean(apart)
    made = ((apart if keep is None else advantage - first) - mean) / (std + eps)
    return batch.put(advantage=made if keep is None else torch.where(keep, made, 0.0))
