"""What a language policy makes from its weights in order to work: a decoder, and a narrow copy of the output layer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from trimtab.core.errors import TrimtabWarning
from trimtab.policies.decoders import ModuleDecoder
from trimtab.policies.llama_decoder import LlamaDecoder


class Working:
    """Copies of weights, made when they are asked for and again when the weights have changed.

    A copied policy starts without: it would hold the old weights.
    """

    def __init__(self) -> None:
        self._decoder: ModuleDecoder | LlamaDecoder | None = None
        self._stamps: tuple[Any, ...] = ()
        self._head: tuple[Any, Tensor] | None = None
        self._device: torch.device | None = None
        self._touched = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Working:
        return Working()

    def touch(self) -> None:
        """The weights changed in a way torch cannot see."""
        self._touched = True

    def decoder(self, model: Any, causal: Any, autocast: bool, name: str) -> ModuleDecoder | LlamaDecoder:
        """A decoder of the present weights. model: whose parameters; causal: the transformers model in it."""
        parameters = list(model.parameters())
        trained, frozen = (stamp(p for p in parameters if p.requires_grad is b) for b in (True, False))
        if self._decoder is None or self._device != parameters[0].device:
            self._device = parameters[0].device
            fits = LlamaDecoder.fits(causal)
            if not fits:
                warnings.warn(
                    f"{name!r} is a {type(causal).__name__}, which is sampled through transformers' own "
                    "forward: the same answers, more slowly than a plain Llama, Mistral, Qwen2 or Qwen3",
                    TrimtabWarning,
                    stacklevel=2,
                )
            self._decoder = (LlamaDecoder if fits else ModuleDecoder)(causal, autocast)
        elif self._touched or (trained, frozen) != self._stamps:
            self._decoder.refresh(everything=self._touched or frozen != self._stamps[1])
        self._stamps, self._touched = (trained, frozen), False
        return self._decoder

    def learning(self) -> None:
        """A gradient is taken, so weights are about to change: let go of the decoder's copies of what can learn.

        The activations of the training pass then have their memory; they are made again before the next sample.
        """
        if isinstance(self._decoder, LlamaDecoder):
            self._decoder.let_go()
            self._stamps = (None, *self._stamps[1:])

    def head(self, weight: Tensor, narrow: torch.dtype) -> Tensor:
        """The output matrix; of a frozen one a copy in `narrow`, which is made once."""
        if weight.requires_grad or weight.dtype == narrow:
            return weight
        now = stamp([weight])
        if self._head is None or self._head[0] != now:
            self._head = now, weight.detach().to(narrow)
        return self._head[1]


@torch.no_grad()
def stamp(parameters: Iterable[Tensor]) -> tuple[Any, ...]:
    """Changes when parameters do: torch's own counters, and a few numbers of each for writes it cannot see."""
    held = list(parameters)
    if not held:
        return ()
    few = torch.cat([p.detach().flatten()[:: max(1, p.numel() // 8)] for p in held]).tolist()
    return ([(p.data_ptr(), p._version) for p in held], few)
