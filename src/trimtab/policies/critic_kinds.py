"""The kinds of networks that off-policy methods name; see `networks.KINDS`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from trimtab.core.errors import MethodError, nearest
from trimtab.core.network import Network
from trimtab.policies.critics import Ensemble, QValues, Temperature
from trimtab.policies.dense import MATMULS
from trimtab.policies.layers import ACTIVATIONS
from trimtab.policies.squashed import Bounds, Deterministic, SquashedGaussian


def _bounds(made_for: Any, who: str) -> tuple[Bounds, tuple[int, ...]]:
    space = made_for.box(who)
    low, high = (torch.as_tensor(b).to(made_for.dtype).flatten() for b in (space.low, space.high))
    if not bool(torch.isfinite(torch.stack([low, high])).all()):
        raise MethodError(f"{who} keeps its actions inside a box with finite sides, and the action space is {space}")
    return Bounds(low, high), tuple(space.shape)


def _matmul(network: Network, matmul: str) -> str:
    if matmul not in MATMULS:
        raise MethodError(f"matmul={matmul!r} is not known. {nearest(str(matmul), MATMULS)}")
    if matmul != "float32" and len(network.hidden) < 2:
        raise MethodError(
            f"matmul={matmul!r} is for products between hidden layers, and hidden={network.hidden} has none, so it "
            f"would be ignored. Leave it out."
        )
    return matmul


def squashed_gaussian(
    made_for: Any, network: Network, *, spread: str = "tanh", matmul: str = "float32"
) -> SquashedGaussian:
    """A tanh-squashed Gaussian over a bounded Box, begun as torch begins. spread: how log sigma is kept in a range.

    matmul: what the factors of the products between hidden layers are; the parameters are float32 all the same.
    """
    bounds, shape = _bounds(made_for, "a squashed Gaussian")
    outputs = 2 * math.prod(shape)
    net = made_for.mlp(network, made_for.inputs.width, outputs, init="torch", gain=1.0, matmul=_matmul(network, matmul))
    return SquashedGaussian(made_for.inputs, net, bounds, shape, spread)


def deterministic(made_for: Any, network: Network, *, matmul: str = "float32") -> Deterministic:
    """`tanh` into the sides of a bounded Box, begun as torch begins. matmul: see `squashed_gaussian`."""
    bounds, shape = _bounds(made_for, "a deterministic policy")
    outputs = math.prod(shape)
    net = made_for.mlp(network, made_for.inputs.width, outputs, init="torch", gain=1.0, matmul=_matmul(network, matmul))
    return Deterministic(made_for.inputs, net, bounds, shape)


def ensemble(made_for: Any, network: Network, *, critics: int = 2, matmul: str = "float32") -> Ensemble:
    """`critics` action values of observation and action, begun as torch begins. matmul: see `squashed_gaussian`."""
    if critics < 1:
        raise MethodError(f"critics={critics} must be at least 1")
    if network.activation not in ACTIVATIONS:
        raise MethodError(f"activation={network.activation!r} is not known. {nearest(network.activation, ACTIVATIONS)}")
    width = math.prod(made_for.box("a critic of actions").shape)
    hidden = tuple(network.hidden)
    return Ensemble(made_for.inputs, width, hidden, critics, network.activation, _matmul(network, matmul))


def q_values(made_for: Any, network: Network) -> QValues:
    """One value for each of the numbered actions, begun as torch begins."""
    count = made_for.choices("an action value")
    if len(count) != 1:
        raise MethodError(f"action values are of one choice among numbered actions; the space is {made_for.action}")
    return QValues(made_for.inputs, made_for.mlp(network, made_for.inputs.width, count[0], init="torch", gain=1.0))


def temperature(made_for: Any, network: Network, *, begin: float = 1.0) -> Temperature:
    """One positive number. begin: its first value."""
    if not begin > 0 or network.hidden:
        raise MethodError(f"a temperature begins above 0 and has no layers: begin={begin}, hidden={network.hidden}")
    return Temperature(begin, made_for.dtype)


KINDS: dict[str, Callable[..., nn.Module]] = {
    "squashed_gaussian": squashed_gaussian,
    "deterministic": deterministic,
    "ensemble": ensemble,
    "q_values": q_values,
    "temperature": temperature,
}
