"""How parameters move."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.core.closure import Closure, Gradient
from trimtab.core.kit import Kit
from trimtab.core.piece import Schedule, piece


def make_adamw(kit: Kit, options: Mapping[str, Any]) -> torch.optim.AdamW:
    """An AdamW over the parameters that the track trains; its state is part of the state tree."""
    trained = [p for p in kit.models[kit.model].parameters() if p.requires_grad]
    start = 0.0 if isinstance(options["lr"], Schedule) else options["lr"]  # a schedule sets it at every step
    return torch.optim.AdamW(
        trained, lr=start, betas=options["betas"], eps=options["eps"], weight_decay=options["weight_decay"], fused=True
    )


def _positive(options: Mapping[str, Any]) -> str | None:
    for name in ("lr", "eps", "weight_decay"):
        value = options.get(name, 0.0)
        if not isinstance(value, Schedule) and not 0 <= value < float("inf"):
            return f"{name}={value!r} must be a number of at least 0, and finite"
    betas = options.get("betas", (0.9, 0.999))
    if not (isinstance(betas, (tuple, list)) and len(betas) == 2 and all(0 <= b < 1 for b in betas)):
        return f"betas={betas!r} must be two numbers in [0, 1), for example (0.9, 0.999)"
    clip = options.get("clip")
    if clip is not None and not isinstance(clip, Schedule) and not clip > 0:
        return f"clip={clip!r} must be above 0: the largest norm of the gradient; None does not clip"
    return None


@piece("update", state={"optimizer": make_adamw}, one_gradient=True, validate=_positive)
def adamw(
    kit: Kit,
    closure: Closure,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip: float | None = None,
) -> tuple[dict[str, float | Tensor], bool]:
    """One AdamW step (Loshchilov and Hutter 2019) on the whole update.

    lr: a number or a schedule. clip: largest global gradient norm, None for no clipping.
    """
    made = closure()
    optimizer: torch.optim.AdamW = kit.state["optimizer"]
    grads = list(made.grads.values())
    if clip is not None:
        torch._foreach_mul_(grads, float((clip / (made.norm + 1e-6)).clamp(max=1.0)))
    for parameter, grad in zip(closure.params.values(), grads):
        parameter.grad = grad
    for group in optimizer.param_groups:
        group["lr"], group["betas"], group["eps"], group["weight_decay"] = lr, betas, eps, weight_decay
    optimizer.step()
    torch.autograd.graph.increment_version(list(closure.params.values()))  # the fused step leaves versions as they were
    optimizer.zero_grad(set_to_none=True)
    return {**report(made), "lr": lr}, False


@piece("update", one_gradient=True, validate=_positive)
def sgd(kit: Kit, closure: Closure, *, lr: float = 1e-2) -> tuple[dict[str, float | Tensor], bool]:
    """`theta <- theta - lr grad`, with nothing remembered."""
    made = closure()
    with torch.no_grad():
        for name, parameter in closure.params.items():
            parameter.sub_(lr * made.grads[name])
    return report(made), False


def report(made: Gradient) -> dict[str, float | Tensor]:
    """What every update logs: the loss, the gradient's norm, and each term by name."""
    return {"loss": made.loss, "grad_norm": made.norm, **made.terms}
