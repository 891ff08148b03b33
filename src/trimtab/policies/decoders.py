"""Incremental decoding over transformers' own forward and cache: works for every causal model it knows."""

from __future__ import annotations

import contextlib
import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from trimtab.policies.lean import is_adapted, parts
from trimtab.policies.sampler import pad_left


def weight_of(layer: Any) -> Tensor:
    """The matrix a linear layer multiplies by, `[out, in]`, with its low-rank adapters added in."""
    base = getattr(layer, "base_layer", layer)
    weight: Tensor = base.weight
    for name in getattr(layer, "active_adapters", ()):
        if name in layer.lora_A:
            weight = weight + layer.get_delta_weight(name)  # the wider of the two: rounded once, where it is used
    return weight


def write_weight(layer: Any, out: Tensor) -> Tensor:
    """`weight_of` written into `out`; a plain adapter is rounded to that dtype first, as in the training pass."""
    if not is_adapted(layer):
        return out.copy_(weight_of(layer))
    base, (a, b) = parts(layer)
    return torch.addmm(*(t.to(out.dtype) for t in (base.weight, b * base.scaling, a)), out=out)


def is_linear(layer: nn.Module) -> bool:
    """Whether `weight_of` and `layer.bias` are all there is to this layer."""
    return type(layer) is nn.Linear or type(getattr(layer, "base_layer", None)) is nn.Linear


def is_frozen(*layers: Any) -> bool:
    """Whether none of these layers can learn."""
    return not any(p.requires_grad for layer in layers for p in layer.parameters())


class Twin:
    """A model that computes what `model` computes under bfloat16 autocast, without casting its weights every step.

    Linear layers hold bfloat16 copies (adapters merged); everything else is the model's own tensors, never a copy.
    """

    def __init__(self, model: Any) -> None:
        shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
        self.model = copy.deepcopy(model, shared)
        self.pairs: list[tuple[Any, nn.Linear]] = []
        for name, layer in list(model.named_modules()):
            if is_linear(layer) and not _inside_adapter(name):
                base: nn.Linear = getattr(layer, "base_layer", layer)
                plain = nn.Linear(base.in_features, base.out_features, base.bias is not None, device="meta")
                plain = plain.to_empty(device=base.weight.device).to(torch.bfloat16).requires_grad_(False)
                self.model.set_submodule(name, plain)
                self.pairs.append((layer, plain))
        self.refresh()

    @torch.no_grad()
    def refresh(self, everything: bool = True) -> None:
        """Take over weights that changed: of everything, or of what can learn."""
        for layer, plain in self.pairs:
            if is_frozen(layer) and not everything:
                continue
            write_weight(layer, plain.weight)
            if plain.bias is not None:
                plain.bias.copy_(getattr(layer, "base_layer", layer).bias)


def _inside_adapter(name: str) -> bool:
    return any(part == "base_layer" or part.startswith("lora_") for part in name.split("."))


class ModuleDecoder:
    """A `Decoder` for every model: a prefill, then one forward per step.

    model: a transformers causal model. autocast: run its forward in bfloat16, on a `Twin` of it.
    """

    joins = False  # a transformers cache has one length for all rows

    def __init__(self, model: Any, autocast: bool = False) -> None:
        self.twin = Twin(model) if autocast else None
        self.model = self.twin.model if self.twin else model
        known = inspect.signature(self.model.forward).parameters
        self.places = "position_ids" in known
        self.last_only: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}

    def refresh(self, everything: bool = True) -> None:
        """Take over weights that changed."""
        if self.twin:
            self.twin.refresh(everything)

    def open(self, prompts: int, rows: int, length: int, room: int) -> None:
        """Nothing to prepare: transformers' cache grows as it is filled."""

    def admit(self, prompts: list[list[int]]) -> Tensor:
        self.cache = DynamicCache(config=self.model.config)
        device = next(self.model.parameters()).device
        ids, mask = (x.to(device) for x in pad_left(prompts, 0))
        self.mask = mask.long()
        self.place = self.mask.sum(1, keepdim=True)  # where the next token goes
        return self._forward(ids, (self.mask.cumsum(1) - 1).clamp_min(0))

    def step(self, tokens: Tensor) -> Tensor:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], 1)
        logits = self._forward(tokens[:, None], self.place)
        self.place = self.place + 1
        return logits

    def keep(self, rows: Tensor) -> None:
        self.cache.batch_select_indices(rows)
        self.mask, self.place = self.mask[rows], self.place[rows]

    def _forward(self, ids: Tensor, place: Tensor) -> Tensor:
        placed = {"position_ids": place} if self.places else {}
        narrow = torch.autocast(ids.device.type, torch.bfloat16) if self.twin else contextlib.nullcontext()
        with narrow:
            out = self.model(
                input_ids=ids,
                attention_mask=self.mask,
                past_key_values=self.cache,
                use_cache=True,
                **self.last_only,
                **placed,
            )
        return out.logits[:, -1]
