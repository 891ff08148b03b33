"""How parameters move."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trimtab.core.batch import Batch
from trimtab.core.closure import Closure, Gradient, Params
from trimtab.core.errors import MethodError
from trimtab.core.kit import Kit
from trimtab.core.loop import scoped
from trimtab.core.piece import Schedule, piece


def make_adamw(kit: Kit, options: Mapping[str, Any]) -> torch.optim.AdamW:
    """An AdamW over the parameters that the track trains; its state is part of the state tree."""
    trained = [p for p in kit.models[kit.model].parameters() if p.requires_grad]
    start = 0.0 if isinstance(options["lr"], Schedule) else options["lr"]  # a schedule sets it at every step
    return torch.optim.AdamW(
        trained, lr=start, betas=options["betas"], eps=options["eps"], weight_decay=options["weight_decay"], fused=True
    )


def _sane_step(options: Mapping[str, Any]) -> str | None:
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


@piece("update", state={"optimizer": make_adamw}, one_gradient=True, validate=_sane_step)
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
    settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    descend(kit.state["optimizer"], list(closure.params.values()), made, clip, settings)
    return {**report(made), "lr": lr}, False


def descend(
    optimizer: torch.optim.Optimizer,
    parameters: list[Tensor],
    made: Gradient,
    clip: float | None,
    settings: Mapping[str, Any],
) -> None:
    """One step of a torch optimiser along a gradient no longer than `clip`, with the settings of this moment."""
    # Kernels read a gradient's memory in the order of its parameter's.
    grads = [g if g.stride() == p.stride() else torch.empty_like(p).copy_(g)
             for g, p in zip(made.grads.values(), parameters)]  # fmt: skip
    scale = 1.0 if clip is None else min(1.0, clip / (float(made.norm) + 1e-6))
    for group in optimizer.param_groups:
        group.update(settings)
    if isinstance(optimizer, torch.optim.AdamW) and _fused(optimizer, parameters, grads, scale, settings):
        return
    if scale < 1:
        torch._foreach_mul_(grads, scale)
    for parameter, grad in zip(parameters, grads):
        parameter.grad = grad
    optimizer.step()
    torch.autograd.graph.increment_version(parameters)  # a fused step leaves versions as they were
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def _fused(
    optimizer: torch.optim.AdamW,
    parameters: list[Tensor],
    grads: list[Tensor],
    scale: float,
    settings: Mapping[str, Any],
) -> bool:
    """`AdamW.step` on `scale` times the gradient, without what surrounds its kernel: that takes a small network longer.

    False, and nothing done, before the first step of any parameter, or where they differ in type, place or age.
    """
    held: list[Any] = []
    state, kind = optimizer.state, parameters[0].dtype
    for p in parameters:
        mine = state.get(p)
        if not mine or p.dtype != kind or not p.is_cpu:
            return False
        held.append(mine)
    step = held[0]["step"]
    for h in held:
        if h["step"] is not step:
            if h["step"] != step:
                return False
            h["step"] = step  # parameters of one age share one count
    step += 1
    by = None
    if scale < 1 and kind == torch.float32:
        by = torch.scalar_tensor(1 / scale)  # the kernel divides by it, and has it in float32
    elif scale < 1:
        torch._foreach_mul_(grads, scale)
    first_moments, second_moments = ([h[name] for h in held] for name in ("exp_avg", "exp_avg_sq"))
    beta1, beta2 = settings["betas"]
    torch._fused_adamw_(
        parameters, grads, first_moments, second_moments, [], [step] * len(held), lr=settings["lr"], beta1=beta1,
        beta2=beta2, weight_decay=settings["weight_decay"], eps=settings["eps"], amsgrad=False, maximize=False,
        grad_scale=by,
    )  # fmt: skip
    torch.autograd.graph.increment_version(parameters)  # the kernel leaves versions as they were
    return True


def make_rmsprop(kit: Kit, options: Mapping[str, Any]) -> torch.optim.RMSprop:
    """An RMSprop over the parameters that the track trains; its state is part of the state tree."""
    trained = [p for p in kit.models[kit.model].parameters() if p.requires_grad]
    start = 0.0 if isinstance(options["lr"], Schedule) else options["lr"]
    return torch.optim.RMSprop(trained, lr=start, alpha=options["alpha"], eps=options["eps"], foreach=True)


@piece("update", state={"optimizer": make_rmsprop}, one_gradient=True, validate=_sane_step)
def rmsprop(
    kit: Kit,
    closure: Closure,
    *,
    lr: float = 7e-4,
    alpha: float = 0.99,
    eps: float = 1e-5,
    clip: float | None = None,
) -> tuple[dict[str, float | Tensor], bool]:
    """One RMSprop step on the whole update: `theta -= lr g / (sqrt(v) + eps)`, `v = alpha v + (1 - alpha) g^2`.

    lr: a number or a schedule. clip: largest global gradient norm, None for no clipping. Tieleman and Hinton 2012.
    """
    made = closure()
    settings = {"lr": lr, "alpha": alpha, "eps": eps}
    descend(kit.state["optimizer"], list(closure.params.values()), made, clip, settings)
    return {**report(made), "lr": lr}, False


@piece("update", one_gradient=True, validate=_sane_step)
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


# -- wraps ---------------------------------------------------------------------------------------------------------

Logs = dict[str, float | Tensor]


class ClippedClosure:
    """A closure whose gradients are no longer than `norm`; everything else of it is as it was.

    seen: the norm of every gradient asked for, before clipping, in order.
    """

    def __init__(self, closure: Closure, norm: float) -> None:
        self._closure, self._norm = closure, norm
        self.seen: list[Tensor] = []

    def __call__(
        self, params: Params | None = None, where: Tensor | None = None, create_graph: bool = False
    ) -> Gradient:
        made = self._closure(params, where, create_graph)
        self.seen.append(made.norm.detach())
        scale = (self._norm / (made.norm + 1e-6)).clamp(max=1.0)
        return replace(made, grads={name: grad * scale for name, grad in made.grads.items()})

    def anew(self, rows: Batch) -> ClippedClosure:
        """The same on other rows; the norms of its gradients are seen here."""
        made = ClippedClosure(self._closure.anew(rows), self._norm)
        made.seen = self.seen
        return made

    def __getattr__(self, name: str) -> Any:  # params, terms, micro, batch, kit, ...
        return getattr(self._closure, name)


def _positive(options: Mapping[str, Any]) -> str | None:
    norm = options["norm"]
    if isinstance(norm, Schedule) or (isinstance(norm, (int, float)) and 0 < norm < math.inf):
        return None
    return f"norm={norm!r} must be a positive number: the length that no gradient may exceed"


@piece("update", validate=_positive, one_gradient=True)
def clipped(
    kit: Kit, closure: Closure, *, inner: Callable[..., tuple[Logs, bool]], norm: float = 1.0
) -> tuple[Logs, bool]:
    """A wrap: `g <- g min(1, norm / (|g| + 1e-6))` for every gradient that the update inside asks for.

    `|g|` is the l2 norm over all parameters of the track (Pascanu et al. 2013, algorithm 1; the 1e-6 is torch's). Terms
    that the update differentiates itself (`closure.terms`, `closure.micro`) are not gradients and stay as they are.
    Logs `grad_norm`, the mean norm before clipping, and `grad_clipped`, the share of gradients that were too long.
    norm: > 0, a number or a schedule.
    """
    if not 0 < norm < math.inf:  # a schedule's value is known only now
        raise MethodError(f"clipped: norm={norm} at update {kit.clock.updates}; it must stay a positive number")
    short = ClippedClosure(closure, norm)
    logs, stop = inner(short)
    if short.seen:
        before = torch.stack(short.seen)
        logs = {**logs, "grad_norm": before.mean(), "grad_clipped": (before > norm).double().mean()}
    return logs, stop


def _not_negative(options: Mapping[str, Any]) -> str | None:
    by = options["by"]
    if isinstance(by, Schedule) or (isinstance(by, (int, float)) and 0 <= by < math.inf):
        return None
    return f"by={by!r} must be a number of at least 0: a negative one would undo the step and climb"


@piece("update", validate=_not_negative, one_gradient=True)
def scheduled(
    kit: Kit, closure: Closure, *, inner: Callable[..., tuple[Logs, bool]], by: float = 1.0
) -> tuple[Logs, bool]:
    """A wrap: `theta <- theta_old + by (theta_new - theta_old)`, the step of the update inside, times `by`.

    For SGD and AdamW this is the learning rate times `by`: their steps are proportional to it (AdamW's decay of the
    weights included), and what they remember of the gradients does not depend on it. For an update without a learning
    rate, such as a line search, it is the share of the step that is taken. `by` = 1 leaves the step bitwise alone.
    Logs `step_scale`. Holds one more copy of the track's parameters while it runs.
    by: >= 0, a number or a schedule; 0 holds the parameters still while the optimiser goes on remembering.
    """
    if not 0 <= by < math.inf:  # a schedule's value is known only now
        raise MethodError(f"scheduled: by={by} at update {kit.clock.updates}; it must stay a number of at least 0")
    old = {} if by == 1 else {name: p.detach().clone() for name, p in closure.params.items()}
    logs, stop = inner(closure)
    with torch.no_grad():
        for name, start in old.items():
            parameter = closure.params[name]
            parameter.copy_(start + by * (parameter - start))
    return {**logs, "step_scale": by}, stop


def _times(options: Mapping[str, Any]) -> str | None:
    return None if options["times"] >= 1 else f"times={options['times']} must be at least 1"


@piece("update", validate=_times)
def repeated(
    kit: Kit, closure: Closure, *, inner: Callable[..., tuple[Logs, bool]], times: int = 2
) -> tuple[Logs, bool]:
    """A wrap: the update inside `times` times on the same rows, the track's own update-scope pieces anew before each
    (noise is drawn again, targets are made again). It ends early where the update inside says stop."""
    logs, stop = inner(closure)
    for _ in range(times - 1):
        if stop:
            break
        track = closure.track
        logs, stop = inner(closure.anew(scoped(kit, closure.batch, track.pieces, track.trains)))
    return logs, stop


class GivenClosure:
    """A closure whose gradient at the current parameters is known already; everything else of it is as it was."""

    def __init__(self, closure: Closure, made: Gradient) -> None:
        self._closure, self._made = closure, made

    def __call__(
        self, params: Params | None = None, where: Tensor | None = None, create_graph: bool = False
    ) -> Gradient:
        known = params is None and where is None and not create_graph
        return self._made if known else self._closure(params, where, create_graph)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._closure, name)


def _sane_limit(options: Mapping[str, Any]) -> str | None:
    return None if options["limit"] > 0 else f"limit={options['limit']} must be above 0"


@piece("update", validate=_sane_limit, one_gradient=True)
def stopped_at(
    kit: Kit, closure: Closure, *, inner: Callable[..., tuple[Logs, bool]], limit: float = 0.015,
    metric: str = "approx_kl",
) -> tuple[Logs, bool]:  # fmt: skip
    """A wrap: where a metric of the update's own terms is above `limit`, no step is taken, nor any more of this batch.

    It is looked at before each step, on that step's rows. Logs `stopped`, the share of updates that were not made.
    """
    made = closure()
    if bool(made.terms[metric] > limit):
        return {**report(made), "stopped": 1.0}, True
    logs, stop = inner(GivenClosure(closure, made))
    return {**logs, "stopped": 0.0}, stop
