"""From the networks that a method names to modules for the spaces of an environment."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from gymnasium import spaces
from torch import nn

from trimtab.core.errors import MethodError, nearest
from trimtab.core.method import Method
from trimtab.core.network import Network
from trimtab.policies import critic_kinds
from trimtab.policies.layers import MLP, Inputs
from trimtab.policies.start import Start, check_spaces, fill, wanted
from trimtab.policies.stochastic import ActorCritic, Categorical, Gaussian, Value

MAPS = ("none", "tanh")


@dataclass(frozen=True)
class Spaces:
    """What a network is made for: the spaces of one environment, and the floating-point type of everything."""

    observation: Any
    action: Any
    dtype: torch.dtype = torch.float32

    @property
    def inputs(self) -> Inputs:
        return Inputs(self.observation, self.dtype)

    def mlp(self, network: Network, inputs: int, outputs: int, *, init: str, gain: float, **more: Any) -> MLP:
        made = {"activation": network.activation, "init": init, "gain": gain, "dtype": self.dtype, **more}
        return MLP(inputs, tuple(network.hidden), outputs, **made)

    def choices(self, who: str) -> tuple[int, ...]:
        """How many actions each choice has; MethodError when actions are no choices."""
        space = self.action
        if isinstance(space, spaces.Discrete):
            return (int(space.n),)
        if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim == 1 and not space.start.any():
            return tuple(int(n) for n in space.nvec)
        raise MethodError(f"{who} chooses among numbered actions from 0 on, and the action space here is {space}")

    def box(self, who: str) -> Any:
        """The action space, a Box; MethodError when it is none."""
        if isinstance(self.action, spaces.Box):
            return self.action
        raise MethodError(f"{who} makes real-valued actions, and the action space here is {self.action}")


# -- kinds ---------------------------------------------------------------------------------------------------------
# A kind is a function of the spaces and the network; its keyword-only parameters are the options that it reads.


def stochastic(
    made_for: Spaces,
    network: Network,
    *,
    init: str = "orthogonal",
    gain: float = 0.01,
    log_std: float = 0.0,
    action_map: str = "none",
) -> Gaussian | Categorical:
    """A Gaussian for a Box, a categorical policy for Discrete and MultiDiscrete.

    init, gain: see `MLP`; the gain is that of the last layer. log_std: what the Gaussian's begins with. action_map:
    "none", or "tanh" into the bounds of a Box.
    """
    if action_map not in MAPS:
        raise MethodError(f"action_map={action_map!r} is not known. {nearest(str(action_map), MAPS)}")
    inputs, action = made_for.inputs, made_for.action
    if not isinstance(action, spaces.Box):
        choices = made_for.choices("a categorical policy")
        if action_map != "none":
            raise MethodError(f"action_map={action_map!r} bounds real-valued actions, and the action space is {action}")
        logits = made_for.mlp(network, inputs.width, sum(choices), init=init, gain=gain)
        return Categorical(inputs, logits, choices, isinstance(action, spaces.Discrete))
    bounds = None
    if action_map == "tanh":
        bounds = torch.as_tensor(action.low), torch.as_tensor(action.high)
        if not bool(torch.isfinite(torch.stack(bounds)).all()):
            raise MethodError(f"action_map='tanh' needs bounds, and the action space here is {action}")
    mean = made_for.mlp(network, inputs.width, int(torch.tensor(action.shape).prod()), init=init, gain=gain)
    return Gaussian(inputs, mean, tuple(action.shape), log_std=log_std, bounds=bounds)


def value(made_for: Spaces, network: Network, *, init: str = "orthogonal", gain: float = 1.0) -> Value:
    """One number for each observation. init, gain: see `MLP`."""
    inputs = made_for.inputs
    return Value(inputs, made_for.mlp(network, inputs.width, 1, init=init, gain=gain))


def actor_critic(
    made_for: Spaces,
    network: Network,
    *,
    init: str = "orthogonal",
    log_std: float = 0.0,
    action_map: str = "none",
) -> ActorCritic:
    """A stochastic policy (last gain 0.01) and a value (last gain 1) of the same shape, side by side."""
    actor = stochastic(made_for, network, init=init, log_std=log_std, action_map=action_map)
    return ActorCritic(actor, value(made_for, network, init=init))


KINDS: dict[str, Callable[..., nn.Module]] = {
    "stochastic": stochastic,
    "value": value,
    "actor_critic": actor_critic,
    **critic_kinds.KINDS,
}


# -- building ------------------------------------------------------------------------------------------------------


def build_networks(
    method: Method, environment: Any, seed: int, *, dtype: torch.dtype = torch.float32, start: Start | None = None
) -> dict[str, nn.Module]:
    """The networks that `method` names, for the spaces of `environment`, begun from `seed` and their own names alone.

    A phased method gives the networks of all its phases. start: what networks marked with its digest begin with
    instead. The global random state is left as it was.
    Raises MethodError when the method names none, two phases disagree, a kind does not fit the spaces or its options,
    or a network is to begin with what is not given.
    """
    named = wanted(method)
    if not named:
        raise MethodError(f"{method.name} names no network to build; it is given models, as language methods are")
    made_for = Spaces(environment.observation_space, environment.action_space, dtype)
    if start is not None:
        check_spaces(environment, start)
    made = {name: _build(name, network, made_for, seed) for name, network in named.items()}
    for name, network in named.items():
        fill(name, network, made[name], start)
    return made


def _build(name: str, network: Network, made_for: Spaces, seed: int) -> nn.Module:
    if network.kind not in KINDS:
        raise MethodError(f"network {name!r} is of kind {network.kind!r}. {nearest(network.kind, KINDS)}")
    make = KINDS[network.kind]
    _check(name, network.options, make)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(digest[:7], "big"))
        return make(made_for, network, **network.options)


def _check(name: str, options: Mapping[str, Any], make: Callable[..., nn.Module]) -> None:
    parameters = inspect.signature(make).parameters.values()
    known = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise MethodError(f"network {name!r} ({make.__name__}) has no option {option!r}. {nearest(option, known)}")
