"""What a module holds, by name: `nn.Module`'s own search is general, and a small network is asked several times an
update."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def parameters_of(module: Any) -> dict[str, nn.Parameter]:
    """`dict(module.named_parameters())`: one that is shared comes once, under its first name."""
    if not isinstance(module, nn.Module):  # what stands for a module that another loop trains
        return dict(module.named_parameters())
    return _gathered(module, "_parameters", "", {}, set())


def buffers_of(module: nn.Module) -> dict[str, Tensor]:
    """`dict(module.named_buffers())`."""
    return _gathered(module, "_buffers", "", {}, set())


def _gathered(module: nn.Module, kind: str, prefix: str, found: dict[str, Any], seen: set[int]) -> dict[str, Any]:
    held = module.__dict__
    for name, value in held[kind].items():
        if value is not None and id(value) not in seen:
            seen.add(id(value))
            found[prefix + name] = value
    for name, inside in held["_modules"].items():  # one that is there twice brings nothing new the second time
        if inside is not None:
            _gathered(inside, kind, f"{prefix}{name}.", found, seen)
    return found
