"""Activation checkpointing: each layer keeps its input for the backward, and computes the rest again there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from trimtab.policies.lean import lean
from trimtab.policies.packing import attending


@contextlib.contextmanager
def recomputed(model: Any) -> Iterator[None]:
    """Forwards in here keep the input of each layer only; the gradient is the same to the last bit.

    transformers has a switch for this, which also takes the layers out of `eval()` and drops their cache.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]

    def contexts() -> tuple[Any, Any]:
        return contextlib.nullcontext(), _as_now(model, model.config._attn_implementation)

    for layer in layers if torch.is_grad_enabled() else []:
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
        )
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


@contextlib.contextmanager
def _as_now(model: Any, attention: str) -> Iterator[None]:
    """The backward comes when the attention and the adapters of the forward have long been put back."""
    with attending(model, attention), lean(model):
        yield


def can_recompute(model: Any) -> bool:
    """Whether the model is made of layers that know how to be checkpointed."""
    return any(isinstance(m, GradientCheckpointingLayer) for m in model.modules())
