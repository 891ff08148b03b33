"""Checks made before the first step: what a method reads, wants and uses must be there.

What holds of a method by itself (`sound`) is checked when methods are composed; what takes models, when a run begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from trimtab.core.errors import MethodError, nearest
from trimtab.core.method import Method, Track
from trimtab.core.piece import RESERVED, Piece
from trimtab.core.terms import PERS, SOURCES, UNITS, fixed

# Columns that every collect provides or that the core supplies.
_ALWAYS = frozenset({"mask", "keep", "source"})


def pieces_of(method: Method) -> Iterator[tuple[Track | None, Piece]]:
    """Every piece with every part below it, and the track it stands in; phases included."""
    for p in method.pieces:
        yield from ((None, q) for q in p.walk())
    for track in method.tracks:
        for p in track.all():
            yield from ((track, q) for q in p.walk())
    for phase in method.phases:
        yield from pieces_of(phase.method)


def check(method: Method, models: Mapping[str, Any]) -> None:
    """Raise MethodError, with the reason, when this method cannot run on these models."""
    if not method.phases:
        _check(method, models, method.copies)
        return
    if method.copies or method.pieces or method.tracks:
        raise MethodError(f"{method.name} runs in phases, so its copies, pieces and tracks belong into them")
    copies: dict[str, Any] = {}
    for phase in method.phases:
        for name, rule in phase.method.copies.items():
            if copies.setdefault(name, rule) != rule:
                raise MethodError(f"copy {name!r} is {copies[name]} in one phase and {rule} in another; rename one")
    trained: dict[str, str] = {}
    for phase in method.phases:
        _check(phase.method, models, copies)
        for track in phase.method.tracks:
            if trained.setdefault(track.name, track.trains) != track.trains:
                raise MethodError(
                    f"track {track.name!r} trains {trained[track.name]!r} in one phase of {method.name} and "
                    f"{track.trains!r} in another; they would share an optimiser. Give them different names."
                )
        for action in phase.enter:
            for name in getattr(action, "models", ()):
                if name not in {*models, *copies}:
                    raise MethodError(f"{action} on entering {phase.name!r}: {nearest(name, {*models, *copies})}")


def _check(method: Method, models: Mapping[str, Any], copies: Mapping[str, Any]) -> None:
    known = {*models, *copies}
    for name, rule in copies.items():
        if name in models:
            raise MethodError(f"{name!r} is both a model and a copy; rename the copy")
        for source in (rule.source, rule.options.get("b", rule.source), rule.follows):
            if source not in known:
                raise MethodError(f"copy {name!r} follows {source!r}, which is no model. {nearest(source, known)}")
        if rule.source in copies and rule.moment in ("before", "after"):
            raise MethodError(f"copy {name!r} follows updates of {rule.source!r}, a copy, which no track updates")
        chain = [name]
        while chain[-1] in copies:
            chain.append(copies[chain[-1]].source)
            if chain[-1] in chain[:-1]:
                raise MethodError(f"copy {name!r} follows itself: {' -> '.join(chain)}")
    _wants(method, method.pieces, "policy", models)
    _sound(method)
    for track in method.tracks:
        if track.trains not in models:
            raise MethodError(
                f"track {track.name!r} of {method.name} trains {track.trains!r}, which is no model here. "
                f"{nearest(track.trains, models)}"
            )
        if track.update.core.one_gradient and not track.of("loss"):
            raise MethodError(f"{track.update.core.name} takes a gradient, and track {track.name!r} has no loss")
        _wants(method, track.pieces, track.trains, models)
    for _, p in pieces_of(method):
        _reserved(method, p)
        for name in p.uses(p.options) if callable(p.uses) else p.uses:
            if name not in known:
                raise MethodError(f"{p.name} of {method.name} uses the model {name!r}. {nearest(name, known)}")


def sound(method: Method) -> None:
    """Raise MethodError, with the reason, when this method cannot run whatever its models are."""
    for one in [p.method for p in method.phases] or [method]:
        _sound(one)


def _sound(method: Method) -> None:
    collects = [p for p in method.pieces if p.stage == "collect"]
    if len(collects) != 1:
        raise MethodError(f"{method.name} has {len(collects)} collect pieces; a method has exactly one")
    for p in method.pieces:
        if p.stage in ("loss", "update", "probe"):
            raise MethodError(f"{p.name} is a {p.stage} piece, which belongs into a track of {method.name}")
    for _, p in pieces_of(method):
        problem = p.fits(method, p) if p.fits else None
        if problem:
            raise MethodError(problem)
    columns = _read_in_order(method, collects[0])
    for track in method.tracks:
        seen = set(columns)
        for stage in ("annotate", "credit", "select", "loss", "update", "probe"):
            for p in (q for q in track.all() if q.stage == stage):
                _reads(method, p.stage, p.walk(), seen)
                seen |= p.union("writes")
        cut = sorted({p.core.options["unit"] for p in track.of("loss")} - {"row"})
        if len(cut) > 1:
            raise MethodError(f"track {track.name!r} has losses of units {cut}; a micro-batch keeps only one whole")


def _read_in_order(method: Method, collect: Piece) -> set[str]:
    columns = set(_ALWAYS)
    for p in reversed(collect.stack()):  # a wrap sees what the collect inside it wrote
        own = (p, *(q for name, part in p.parts.items() if name != "inner" for q in part.walk()))
        if p.inner is not None:
            _reads(method, p.stage, own, columns)
        columns |= frozenset().union(*(q.writes for q in own))
    for stage in ("annotate", "credit", "select"):
        for p in (q for q in method.pieces if q.stage == stage):
            _reads(method, p.stage, p.walk(), columns)
            columns |= p.union("writes")
    return columns


def _reserved(method: Method, p: Piece) -> None:
    """The options that the core reads have known values."""
    if p.inner is not None or p.stage not in RESERVED:
        return
    rows, per, unit = p.options["rows"], p.options.get("per", "token"), p.options.get("unit", "row")
    for name in () if rows is None else (rows,) if isinstance(rows, str) else rows:
        if name not in SOURCES:
            raise MethodError(f"{p.name} of {method.name} has rows={name!r}. {nearest(str(name), SOURCES)}")
    if per not in PERS[:-1] and not isinstance(per, fixed):
        raise MethodError(f"{p.name} of {method.name} has per={per!r}. {nearest(str(per), PERS)}")
    if unit not in UNITS:
        raise MethodError(f"{p.name} of {method.name} has unit={unit!r}. {nearest(str(unit), UNITS)}")


def _reads(method: Method, stage: str, readers: Iterable[Piece], columns: set[str]) -> None:
    for p in readers:
        missing = sorted(p.reads - columns)
        if missing:
            raise MethodError(
                f"{p.name} ({stage}) of {method.name} reads column {missing[0]!r}, which nothing before it writes. "
                f"Written so far: {', '.join(sorted(columns)) or 'none'}. Add a piece that writes it, before {p.name}."
            )


def _wants(method: Method, pieces: tuple[Piece, ...], model: str, models: Mapping[str, Any]) -> None:
    """What pieces want of a model, it provides; what is shared by the tracks asks the policy."""
    provides = frozenset(getattr(models.get(model), "provides", ()))
    for p in pieces:
        unmet = sorted(p.union("wants") - provides)
        if unmet:
            advice = next((q.unmet for q in p.walk() if q.unmet and not q.wants <= provides), _NO_LIKELIHOOD)
            raise MethodError(
                f"{p.name} of {method.name} wants {unmet[0]!r} from the model {model!r}, which provides "
                f"{sorted(provides) or 'nothing'}. {advice}"
            )


_NO_LIKELIHOOD = (
    "A policy without likelihoods cannot be trained with a likelihood-ratio surrogate; choose a method whose losses it "
    "can answer."
)
