"""What a piece asks of the method around it: sentences for `fits`, said when methods are composed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from trimtab.core.method import Method
from trimtab.core.piece import Piece

Fits = Callable[[Method, Piece], str | None]


def outermost_adds(doing: str, when: Callable[[Mapping[str, Any]], bool] = lambda options: True) -> Fits:
    """For a collect wrap that cannot have rows added inside it, since `doing`; asked only for options with `when`."""

    def fits(method: Method, piece: Piece) -> str | None:
        added = next((p for p in piece.stack()[1:] if p.adds_rows), None)
        if added is None or not when(piece.options):
            return None
        inside, outside = method.wrapped_by(added.name), method.wrapped_by(piece.name)
        return (
            f"{piece.name} ({outside}) {doing}, and {added.name} ({inside}) inside it adds rows of its own. "
            f"Put {added.name} around {piece.name}: {inside} belongs to the left of {outside}"
        )

    return fits


def text_only(needs: str) -> Fits:
    """For a piece that `needs` what only a language model or its prompts give."""

    def fits(method: Method, piece: Piece) -> str | None:
        if not method.networks:
            return None
        return f"{piece.name} needs {needs}, and {method.name} trains networks made for the spaces of an environment"

    return fits
