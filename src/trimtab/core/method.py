"""A method is a value: named pieces in one or more tracks, written as a difference from its base.

Addresses. A piece is named by its slot (`credit`, `surrogate`, `update`), an option by a path below it
(`surrogate.bound.high`), another track's piece by a prefix (`critic:update.lr`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from trimtab.core.copies import Copy
from trimtab.core.edits import AUTHOR, YOU, Edit
from trimtab.core.errors import MethodError, nearest
from trimtab.core.network import Network
from trimtab.core.piece import SINGLE, Piece, in_order
from trimtab.core.track import Track as Track

FIELDS = ("rows", "passes", "name", "phases", "copies", "track", "networks", "every")  # what `but` changes


@dataclass(frozen=True)
class Phase:
    """One leg of a phased method: run `method` until the clock moved on by `until`; `enter` runs once, on entry."""

    name: str
    method: Method
    until: Mapping[str, int]
    enter: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Method:
    """The whole method as data. Build one from a base with `swap`, `then`, `wrap`, `drop`, `on`; all return a new one.

    rows: rows per update (None: the whole batch). passes: times each batch is gone through. networks: what its tracks
    train, where that is made for the environment; empty where models are given (a language model).
    """

    name: str
    pieces: tuple[Piece, ...] = ()
    tracks: tuple[Track, ...] = ()
    copies: Mapping[str, Copy] = field(default_factory=dict)
    rows: int | None = None
    passes: int = 1
    phases: tuple[Phase, ...] = ()
    edits: tuple[Edit, ...] = ()
    explicit: tuple[str, ...] = ()  # paths whose value somebody asked for
    networks: Mapping[str, Network] = field(default_factory=dict)
    made_of: tuple[str, ...] = ()  # the registered methods it was made by, the last one first

    # -- addresses ----------------------------------------------------------------------------------------------
    def places(self) -> Iterator[tuple[str, str, Piece]]:
        """(track name or "", slot, piece) in running order: shared pieces stage by stage, then track by track."""
        for p in in_order(self.pieces):
            yield "", p.slot, p
        for track in self.tracks:
            for p in in_order(track.all()):
                yield track.name, p.slot, p

    def locate(self, path: str) -> tuple[str, Piece, list[str]]:
        """The track ("" if shared) and piece that `path` starts with, and the rest of the path below that piece."""
        where, _, local = path.rpartition(":")
        first, *rest = local.split(".")
        found = [(t, p) for t, slot, p in self.places() if first in _names(p) and where in ("", t)]
        if not found and self.phases:
            raise MethodError(
                f"{self.name} runs in phases {[p.name for p in self.phases]}, and {path!r} is inside them; "
                f"change it there with each(lambda name, method: ...)"
            )
        if not found:
            known = {f"{t}:{s}" if len(self.tracks) > 1 and t else s for t, s, _ in self.places()}
            raise MethodError(f"{self.name} has no piece {path!r}. {nearest(first, known)}")
        if len(found) > 1:
            raise MethodError(f"{path!r} could be in {[t for t, _ in found]}; write one of them as 'track:{path}'")
        track, piece = found[0]
        return track, piece, rest

    def get(self, path: str) -> Any:
        """The piece, part or option value at an address."""
        _, piece, rest = self.locate(path)
        return piece.find(rest)

    def has(self, path: str) -> bool:
        """Whether there is a piece, part or option at an address."""
        try:
            self.get(path)
        except MethodError:
            return False
        return True

    def flatten(self, *, full: bool = False) -> dict[str, Any]:
        """`address -> value` of everything in force, in running order. Two methods are equal when these are.

        full: name the track of each piece even where there is only one.
        """
        rows: dict[str, Any] = {}
        for track, slot, p in self.places():
            rows |= p.flatten(f"{track}:{slot}" if track and (full or len(self.tracks) > 1) else slot)
        for t in self.tracks:
            rows |= {f"track {t.name}": f"trains {t.trains}, every {t.every}, on {t.on}"}
        rows |= {f"copy {name}": copy for name, copy in self.copies.items()}
        for name, network in self.networks.items():
            rows |= network.flatten(f"network {name}")
        rows |= {"rows": self.rows, "passes": self.passes}
        for i, phase in enumerate(self.phases):
            head = f"phase {i + 1} {phase.name}"
            rows |= {head: f"until {dict(phase.until)}, entering: {[str(a) for a in phase.enter]}"}
            rows |= {f"{head} / {k}": v for k, v in phase.method.flatten().items()}
        return rows

    def fingerprint(self) -> str:
        """A digest of everything in force; a checkpoint of another fingerprint is refused."""
        return hashlib.sha256(repr([(k, show(v)) for k, v in self.flatten().items()]).encode()).hexdigest()[:16]

    # -- changes ------------------------------------------------------------------------------------------------
    def swap(self, path: str, value: Any) -> Method:
        """Replace what stands at `path`.

        A method may replace what its own lineage swapped; what another method or the user swapped is refused, and so
        is losing an option that was asked for.
        """
        author = AUTHOR.get()
        track, piece, rest = self.locate(path)
        old = piece.find(rest)
        full = self._full(track, piece, rest)
        stage = "part" if rest else piece.stage
        if (value.stage != stage) if isinstance(value, Piece) else not rest:
            raise MethodError(f"{show(value)} cannot stand at {path!r}, which is for a {stage} piece")
        here = self._local(full)
        for edit in self.edits:
            there = self._local(edit.path)
            related = _covers(here, there) or _covers(there, here)
            mine = author.name == YOU or edit.by == author.name or edit.by in author.lineage
            if edit.kind == "swap" and related and not mine:
                raise MethodError(
                    f"{author.name} and {edit.by} both swap {edit.path!r}, so they cannot be used together: "
                    f"one would silently undo the other. Choose one of them."
                )
        doing = f"{author.name} replaces {full!r} ({show(old)}) by {show(value)}"
        self._keeps(full, doing, author.name == YOU, value)
        new = _inside(old, value if rest else replace(value, slot=piece.slot), full)
        text = f"{show(getattr(old, 'core', old))} -> {show(value)}"
        return self._put(track, piece, piece.assign(rest, new) if rest else new)._noted("swap", full, text)

    def set(self, path: str, value: Any) -> Method:
        """Give an option another value, as a user does. A later edit that would lose it is refused.

        A method that runs in phases gives it to every phase that has the option.
        """
        if self.phases:
            having = [p.name for p in self.phases if p.method.has(path)]
            if not having:
                self.phases[-1].method.get(path)  # says what is there
            return self.each(lambda name, method: method.set(path, value) if name in having else method)
        track, piece, rest = self.locate(path)
        if not rest:
            raise MethodError(f"{path!r} is a whole piece; name one of its options. {nearest('', piece.options)}")
        old = piece.find(rest)
        if isinstance(old, Piece):
            raise MethodError(f"{path!r} is the part {old.name!r}; set one of its options: {sorted(old.options)}")
        full = self._full(track, piece, rest)
        yours = {self._local(e.path) for e in self.edits if e.by == YOU and e.kind == "set"}
        if AUTHOR.get().name != YOU and self._local(full) in yours:
            self._keeps(full, f"{AUTHOR.get().name} sets {full!r} to {show(value)}")
        made = self._put(track, piece, piece.assign(rest, value))._noted("set", full, f"{show(old)} -> {show(value)}")
        return replace(made, explicit=(*made.explicit, full))

    def wrap(self, path: str, wrapper: Piece) -> Method:
        """Surround the piece or part at `path`; wraps stack, the last one outermost."""
        track, piece, rest = self.locate(path)
        old = piece.find(rest)
        if not isinstance(old, Piece):
            raise MethodError(f"only a piece can be wrapped; {path!r} is the value {old!r}")
        if "inner" not in wrapper.options:
            raise MethodError(f"{wrapper.name} has no 'inner' option, so it cannot wrap {path!r}")
        if wrapper.stage != old.stage:
            raise MethodError(f"{wrapper.name} wraps a {wrapper.stage} piece, and {path!r} is a {old.stage} piece")
        at = "update" if "update" in (wrapper.at, old.at) and old.stage != "part" else wrapper.at
        new = replace(wrapper, slot=old.slot, at=at, options={**wrapper.options, "inner": old})
        full = self._full(track, piece, rest)
        return self._put(track, piece, piece.assign(rest, new) if rest else new)._noted("wrap", full, wrapper.name)

    def then(self, *pieces: Piece, track: str | None = None) -> Method:
        """Add pieces after those of the same stage; losses and probes go to `track` (the first one by default)."""
        made = self
        for p in pieces:
            if p.stage in SINGLE:
                raise MethodError(f"a method has one {p.stage}; use swap({p.stage!r}, ...) to replace it")
            where = self.track(track).name if track else made._first(p)
            if p.stage == "part" or "inner" in p.options or (p.stage in ("loss", "probe") and not where):
                raise MethodError(f"{p.name} is a part, a wrap, or has no track to stand in; it cannot be added alone")
            if any(slot == p.slot for t, slot, _ in made.places() if t in ("", where)):
                raise MethodError(f"{made.name} already has a piece {p.slot!r}; swap it, or give this one another slot")
            made = made._add(p, where)._noted("then", f"{where}:{p.slot}" if where else p.slot, show(p))
        return made

    def drop(self, path: str) -> Method:
        """Remove a whole piece."""
        track, piece, rest = self.locate(path)
        if rest or piece.stage in SINGLE or path.rpartition(":")[2] != piece.slot:
            raise MethodError(f"{path!r} cannot be dropped; swap it for a neutral value instead")
        full = self._full(track, piece, [])
        self._keeps(full, f"{AUTHOR.get().name} drops {full!r} ({show(piece)})")
        return self._put(track, piece, None)._noted("drop", full, piece.name)

    def on(self, track: str) -> OnTrack:
        """The same changes, with addresses meant inside one track: `m.on("critic").swap("update", adam(1e-3))`."""
        return OnTrack(self, self.track(track).name)

    def but(self, **fields: Any) -> Method:
        """Change `rows`, `passes`, `name`, `phases`, add `copies` or a `track` (last, or `before` another one), add or
        replace `networks`, or let tracks run on `every` k-th update: `every={"policy": 2}`."""
        made = self
        for name, k in fields.pop("every", {}).items():
            old = made.track(name)
            tracks = tuple(replace(t, every=k) if t is old else t for t in made.tracks)
            made = replace(made, tracks=tracks)._noted("set", f"track {name}", f"every {old.every} -> {k}")
        for name, network in fields.pop("networks", {}).items():
            made = made._networked(name, network)
        if "copies" in fields:
            added = fields.pop("copies")
            for name, copy in added.items():
                if self.copies.get(name, copy) != copy:
                    raise MethodError(f"copy {name!r} is {self.copies[name]} already, and cannot also be {copy}")
                made = made._noted("then", f"copy {name}", str(copy))
            made = replace(made, copies={**self.copies, **added})
        if "track" in fields:
            track, before = fields.pop("track"), fields.pop("before", None)
            if any(t.name == track.name for t in self.tracks):
                raise MethodError(f"{self.name} already has a track {track.name!r}")
            place = len(made.tracks) if before is None else made.tracks.index(made.track(before))
            made = replace(made, tracks=(*made.tracks[:place], track, *made.tracks[place:]))
            made = made._noted("then", f"track {track.name}", track.trains)
        for name, value in fields.items():
            if name not in FIELDS[:4]:
                raise MethodError(f"a method has no field {name!r} to change. {nearest(name, FIELDS)}")
            if name in ("rows", "passes") and self.phases:
                made = made.each(lambda _, method, only={name: value}: method.but(**only))  # type: ignore[misc]
                continue
            if name in ("rows", "passes") and getattr(made, name) != value:
                if not (isinstance(value, int) and value >= 1) and (name, value) != ("rows", None):
                    raise MethodError(f"{name}={value!r} must be a whole number of at least 1")
                made._keeps(name, f"{AUTHOR.get().name} sets {name}={value}", again=AUTHOR.get().name == YOU)
                made = made._noted("set", name, f"{getattr(made, name)} -> {value}")
                if AUTHOR.get().name == YOU:
                    made = replace(made, explicit=(*made.explicit, name))
            made = replace(made, **{name: value})
        return made

    def each(self, edit: Callable[[str, Method], Method]) -> Method:
        """A phased method with `edit(phase name, its method)` made in every phase; a plain method is refused."""
        if not self.phases:
            raise MethodError(f"{self.name} has no phases; change it directly")
        return replace(self, phases=tuple(replace(p, method=edit(p.name, p.method)) for p in self.phases))

    def track(self, name: str) -> Track:
        for t in self.tracks:
            if t.name == name:
                return t
        raise MethodError(f"{self.name} has no track {name!r}. {nearest(name, (t.name for t in self.tracks))}")

    # -- helpers ------------------------------------------------------------------------------------------------
    def _first(self, p: Piece) -> str:
        return self.tracks[0].name if p.stage in ("loss", "probe") and self.tracks else ""

    def _full(self, track: str, piece: Piece, rest: list[str]) -> str:
        head = f"{track}:{piece.slot}" if track and len(self.tracks) > 1 else piece.slot
        return ".".join([head, *rest])

    def wrapped_by(self, wrapper: str) -> str:
        """Who put a wrap of this name there."""
        return next((e.by for e in self.edits if e.kind == "wrap" and e.text == wrapper), YOU)

    def _local(self, path: str) -> str:
        """`path` as it was written while there was only the first track."""
        return path.removeprefix(f"{self.tracks[0].name}:") if self.tracks else path

    def _keeps(self, full: str, doing: str, again: bool = False, new: Any = None) -> None:
        """Refuse `doing` if it loses what was asked for at or below `full` (`again`: below) and is not in `new` too."""
        here, before, after = self._local(full), self.flatten(), new.flatten(full) if isinstance(new, Piece) else {}
        asked = [p for p in self.explicit if p == full or p not in after or show(after[p]) != show(before.get(p))]
        lost = [p for p in asked if _covers(here, self._local(p)) and not (again and self._local(p) == here)]
        if lost:
            raise MethodError(f"{doing}, but {lost[0]!r} was set; it would be ignored. Leave that option out.")

    def _networked(self, name: str, network: Network) -> Method:
        """With this network; losing something of the one before that was asked for is refused, but not to a user."""
        head, author = f"network {name}", AUTHOR.get().name
        old = self.networks[name].flatten(head) if name in self.networks else {}
        new = network.flatten(head)
        changed = [p for p in {**old, **new} if show(old.get(p)) != show(new.get(p))]
        lost = [p for p in changed if p in self.explicit and p in old]
        if lost and author != YOU:
            raise MethodError(f"{author} replaces {head!r}, but {lost[0]!r} was set; it would be ignored.")
        made = replace(self, networks={**self.networks, name: network})
        for path in changed if old else [head]:
            made = made._noted("set" if old else "then", path, f"{show(old.get(path))} -> {show(new.get(path))}")
        return replace(made, explicit=(*made.explicit, *changed)) if author == YOU and old else made

    def _noted(self, kind: str, path: str, text: str) -> Method:
        return replace(self, edits=(*self.edits, Edit(AUTHOR.get().name, kind, path, text)))

    def _add(self, p: Piece, track: str) -> Method:
        if not track:
            return replace(self, pieces=(*self.pieces, p))
        tracks = [replace(t, pieces=(*t.pieces, p)) if t.name == track else t for t in self.tracks]
        return replace(self, tracks=tuple(tracks))

    def _put(self, track: str, old: Piece, new: Piece | None) -> Method:
        def changed(pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
            return tuple(q for q in (new if p is old else p for p in pieces) if q is not None)

        if not track:
            return replace(self, pieces=changed(self.pieces))
        tracks = []
        for t in self.tracks:
            if t.name == track and t.update is old:
                assert new is not None
                t = replace(t, update=new)
            elif t.name == track:
                t = replace(t, pieces=changed(t.pieces))
            tracks.append(t)
        return replace(self, tracks=tuple(tracks))


@dataclass(frozen=True)
class OnTrack:
    """`method.on(track)`: each call makes the change there and gives back the whole method."""

    method: Method
    track: str

    def swap(self, path: str, value: Any) -> Method:
        return self.method.swap(f"{self.track}:{path}", value)

    def set(self, path: str, value: Any) -> Method:
        return self.method.set(f"{self.track}:{path}", value)

    def wrap(self, path: str, wrapper: Piece) -> Method:
        return self.method.wrap(f"{self.track}:{path}", wrapper)

    def drop(self, path: str) -> Method:
        return self.method.drop(f"{self.track}:{path}")

    def then(self, *pieces: Piece) -> Method:
        return self.method.then(*pieces, track=self.track)


def _names(p: Piece) -> set[str]:
    """What a piece answers to: its slot, and the name of every wrap around it."""
    return {p.slot} | ({p.name} | _names(p.inner) if p.inner else set())


def _inside(old: Any, value: Any, path: str) -> Any:
    """`value` in the place of `old`, inside the wraps around it."""
    if not isinstance(old, Piece) or old.inner is None:
        return value
    if not isinstance(value, Piece):
        raise MethodError(f"{path!r} is wrapped by {old.name}, which {show(value)} would lose")
    return replace(old, options={**old.options, "inner": _inside(old.inner, value, path)})


def _covers(path: str, other: str) -> bool:
    return other == path or other.startswith(path + ".")


def show(value: Any) -> str:
    """A value as a reader would write it."""
    if isinstance(value, Piece):
        inside = ", ".join(f"{k}={show(v)}" for k, v in value.options.items())
        return f"{value.name}({inside})" if inside else value.name
    if isinstance(value, Copy):
        return str(value)
    if callable(value) and hasattr(value, "__qualname__"):
        return str(value.__qualname__)
    return repr(value)


def diff(a: Method, b: Method) -> list[tuple[str, str, str]]:
    """What differs, as (address, in `a`, in `b`); "" stands for "not there"."""
    several = max(len(a.tracks), len(b.tracks)) > 1  # a track more must not rename what the others hold
    left, right = a.flatten(full=several), b.flatten(full=several)
    rows = []
    for path in dict.fromkeys([*left, *right]):
        x = show(left[path]) if path in left else ""
        y = show(right[path]) if path in right else ""
        if x != y:
            rows.append((path, x.strip("'"), y.strip("'")))
    return rows
