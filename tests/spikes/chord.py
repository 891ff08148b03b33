"""CHORD and D3S on toy tokens: what a spike first showed, now on the methods themselves."""

from __future__ import annotations

from typing import Any

from trimtab.core.batch import Batch
from trimtab.core.kit import Kit
from trimtab.core.method import Method
from trimtab.core.piece import piece
from trimtab.core.registry import find
from trimtab.methods.language.d3s import d3s as d3s

from .tokens import expert_batch


@piece("part", writes=("prompt", "action", "mask", "source", "age"))
def token_experts(kit: Kit, n: int) -> Batch:
    """The next `n` demonstrations of the toy."""
    return expert_batch(kit.environment, n)


def chord(base: Method, **options: Any) -> Method:
    """CHORD with demonstrations of toy tokens."""
    made: Method = find("chord")(base, **options)
    if made.phases:
        return made.each(lambda _, inside: inside.swap("collect.source", token_experts()))
    return made.swap("collect.source", token_experts())
