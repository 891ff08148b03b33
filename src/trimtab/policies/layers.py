"""Fully connected networks over vectors, and how an observation becomes a vector."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor, nn

from trimtab.core.errors import MethodError, nearest
from trimtab.policies.dense import held_by, layers, pullback

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": torch.relu, "silu": F.silu}
GAINS = {"tanh": math.sqrt(2), "relu": math.sqrt(2), "silu": math.sqrt(2)}  # of hidden layers, orthogonally begun
INITS = ("orthogonal", "torch")


class Layer(nn.Linear):
    """A linear layer that knows how it begins: orthogonal with a gain and zero bias, or as torch has it (gain None)."""

    def __init__(self, inputs: int, outputs: int, gain: float | None, dtype: torch.dtype) -> None:
        self.gain = gain
        super().__init__(inputs, outputs, dtype=dtype)

    def reset_parameters(self) -> None:
        if self.gain is None:
            super().reset_parameters()
            return
        nn.init.orthogonal_(self.weight, self.gain)
        nn.init.zeros_(self.bias)


class MLP(nn.Module):
    """`[..., inputs] -> [..., outputs]` through fully connected layers, an activation after each hidden one.

    init: "orthogonal" has gain sqrt(2) in hidden layers and `gain` in the last; "torch" is `nn.Linear`'s own.
    matmul: see `dense.layers`.
    """

    def __init__(
        self,
        inputs: int,
        hidden: tuple[int, ...],
        outputs: int,
        *,
        activation: str = "tanh",
        init: str = "orthogonal",
        gain: float = 1.0,
        dtype: torch.dtype = torch.float32,
        matmul: str = "float32",
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise MethodError(f"activation={activation!r} is not known. {nearest(activation, ACTIVATIONS)}")
        if init not in INITS:
            raise MethodError(f"init={init!r} is not known. {nearest(init, INITS)}")
        self.activation, self.matmul = ACTIVATIONS[activation], matmul
        widths = (inputs, *hidden, outputs)
        gains = [GAINS[activation]] * len(hidden) + [gain]
        self.layers = nn.ModuleList(
            Layer(a, b, g if init == "orthogonal" else None, dtype) for a, b, g in zip(widths, widths[1:], gains)
        )

    def forward(self, x: Tensor) -> Tensor:
        return layers(x, held_by(self.layers), self.activation, self.matmul)

    def pullback(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], list[Tensor]]] | None:
        """See `dense.pullback`: the gradient is that of `parameters()`, in order."""
        return pullback(x, held_by(self.layers), self.activation, self.matmul)


class Inputs:
    """Observations `[..., *O]` of a space as vectors `[..., width]`: a Box is flattened, a Discrete one is one-hot.

    Raises MethodError for images (a Box of two dimensions or more that was not flattened) and for any other space.
    """

    def __init__(self, space: Any, dtype: torch.dtype) -> None:
        self.dtype, self.rank = dtype, len(space.shape or ())
        self.one_hot = isinstance(space, spaces.Discrete)
        if self.one_hot:
            self.width, self.start = int(space.n), int(space.start)
        elif isinstance(space, spaces.Box) and self.rank <= 1:
            self.width = math.prod(space.shape)
        elif isinstance(space, spaces.Box):
            raise MethodError(
                f"observations of shape {tuple(space.shape)} look like images, and these networks read vectors; "
                f"flatten them in the environment (gymnasium.wrappers.FlattenObservation)"
            )
        else:
            raise MethodError(
                f"observations of {space} are no vectors; give an environment with a Box or a Discrete space, or "
                f"flatten its own (gymnasium.wrappers.FlattenObservation)"
            )

    def __call__(self, obs: Tensor) -> Tensor:
        if self.one_hot:
            return F.one_hot(obs.long() - self.start, self.width).to(self.dtype)
        return (obs if self.rank else obs[..., None]).to(self.dtype)
