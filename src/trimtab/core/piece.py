"""Pieces: the named stage functions that methods are made of.

A piece is a function plus its options plus what it declares: the columns it reads and writes, what it wants from the
model, the state it keeps, and when it runs. Options may be numbers, schedules (functions of the clock) or other
pieces, called its *parts*: `surrogate(bound=clip(0.2, 0.2))`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial, wraps
from typing import Any

from trimtab.core.errors import MethodError, nearest

STAGES = ("act", "collect", "annotate", "credit", "select", "loss", "update", "probe")
SINGLE = ("collect", "credit", "update")  # one per track: a second one is a swap, not an addition
# Options that the core itself reads, for pieces of these stages (see core/terms.py).
RESERVED: dict[str, dict[str, Any]] = {
    "loss": {"per": "token", "rows": None, "unit": "row"},
    "credit": {"rows": "policy"},
    "select": {"rows": "policy"},
}
# What an option may be, by its annotation; an annotation that names anything else is not checked.
KINDS: dict[str, tuple[type, ...]] = {"bool": (bool,), "int": (int,), "float": (int, float), "str": (str,)}
_WORDS = {"bool": "True or False", "int": "a whole number", "float": "a number", "str": "text"}


class Schedule:
    """A number that depends on the clock. Any real option may be one; it is resolved each time the piece runs.

    Subclasses are dataclasses. Raises MethodError for a field declared a number that is none.
    """

    def __post_init__(self) -> None:
        for f in fields(self):  # type: ignore[arg-type]
            kinds, value = _names(f.type), getattr(self, f.name)
            if kinds and not _is_of(value, kinds):
                raise MethodError(f"{type(self).__name__}: {f.name}={value!r} must be {_WORDS[kinds[0]]}")

    def __call__(self, clock: Any) -> float:
        raise MethodError(f"{type(self).__name__} defines no value for a clock")


@dataclass(frozen=True)
class Piece:
    """One stage function with bound options; immutable, compared by value.

    `at`: "batch" runs once per collected batch; "update" sees all rows of one optimiser step, without gradient, before
    its micro-batches. A *part* with `at="update"` is computed once from all those rows and is a constant afterwards.
    """

    stage: str
    name: str
    fn: Callable[..., Any]
    slot: str
    options: Mapping[str, Any] = field(default_factory=dict)
    reads: frozenset[str] = frozenset()
    writes: frozenset[str] = frozenset()
    wants: frozenset[str] = frozenset()
    unmet: str = ""
    uses: Callable[[Mapping[str, Any]], tuple[str, ...]] | tuple[str, ...] = ()
    at: str = "batch"
    state: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    validate: Callable[[Mapping[str, Any]], str | None] | None = None
    idle: Callable[[Any], Any] | None = None
    one_gradient: bool = False
    adds_rows: bool = False
    fits: Callable[[Any, Piece], str | None] | None = None
    takes_kit: bool = True
    kinds: Mapping[str, tuple[str, ...]] = field(default_factory=dict, compare=False, repr=False)

    # -- structure ----------------------------------------------------------------------------------------------
    @property
    def parts(self) -> dict[str, Piece]:
        return {name: value for name, value in self.options.items() if isinstance(value, Piece)}

    @property
    def inner(self) -> Piece | None:
        """What a wrap surrounds; None for a plain piece."""
        inner = self.options.get("inner")
        return inner if isinstance(inner, Piece) else None

    @property
    def core(self) -> Piece:
        """The innermost piece of a stack of wraps."""
        return self if self.inner is None else self.inner.core

    def stack(self) -> tuple[Piece, ...]:
        """The wraps around a piece and the piece itself, from the outermost inwards."""
        return (self,) if self.inner is None else (self, *self.inner.stack())

    def walk(self) -> Iterator[Piece]:
        """This piece and every part below it."""
        yield self
        for part in self.parts.values():
            yield from part.walk()

    def union(self, what: str) -> frozenset[str]:
        """`reads`, `writes` or `wants` of this piece and all its parts."""
        held: dict[str, frozenset[str]] = self.__dict__.setdefault("_unions", {})
        if what not in held:
            held[what] = frozenset().union(*(getattr(p, what) for p in self.walk()))
        return held[what]

    def flatten(self, prefix: str) -> dict[str, Any]:
        """`path -> value` of this piece, its options and its parts, in order."""
        head = prefix
        rows: dict[str, Any] = {prefix: self.name}
        if self.inner is not None:  # what it surrounds keeps its address; the wrap is listed behind it
            rows = self.inner.flatten(prefix)
            head = f"{self.name}({prefix})"
            while head in rows:  # the same wrap twice
                head = f"{self.name}({head})"
            rows[head] = "wrap"
        for name, value in self.options.items():
            if name == "inner":
                continue
            path = f"{head}.{name}"
            rows |= value.flatten(path) if isinstance(value, Piece) else {path: value}
        return rows

    # -- changing -----------------------------------------------------------------------------------------------
    def find(self, path: list[str]) -> Any:
        """The option or part at a path below this piece; a wrap passes on what it does not own."""
        if not path:
            return self
        owner = self._owner(path[0])
        value = owner.options[path[0]]
        if len(path) == 1:
            return value
        if not isinstance(value, Piece):
            raise MethodError(f"{owner.name}.{path[0]} is {value!r}, which has no option {'.'.join(path[1:])!r}")
        return value.find(path[1:])

    def assign(self, path: list[str], value: Any) -> Piece:
        """A copy with the option or part at `path` replaced."""
        owner = self._owner(path[0])
        if owner is not self:
            assert self.inner is not None
            return replace(self, options={**self.options, "inner": self.inner.assign(path, value)})
        if len(path) > 1:
            part = self.options[path[0]]
            if not isinstance(part, Piece):
                raise MethodError(f"{self.name}.{path[0]} is {part!r}, which has no option {'.'.join(path[1:])!r}")
            value = part.assign(path[1:], value)
        return replace(self, options={**self.options, path[0]: value}).checked()

    def _owner(self, name: str) -> Piece:
        if name in self.options:
            return self
        if self.inner is not None:
            return self.inner._owner(name)
        raise MethodError(f"{self.name} has no option {name!r}. {nearest(name, self.options)}")

    def checked(self) -> Piece:
        """This piece, or MethodError when an option is of the wrong kind or options contradict each other."""
        for name, kinds in self.kinds.items():
            value = self.options[name]
            if not _is_of(value, kinds):
                words = " or ".join([_WORDS.get(k, k) for k in kinds] + ["a schedule"] * ("float" in kinds))
                raise MethodError(f"{self.name}: {name}={value!r} must be {words}")
        problem = self.validate(self.options) if self.validate else None
        if problem:
            raise MethodError(f"{self.name}: {problem}")
        return self

    # -- running ------------------------------------------------------------------------------------------------
    @cached_property
    def _sorted(self) -> tuple[dict[str, Any], list[tuple[str, Piece]], list[tuple[str, Schedule]]]:
        """The options that the function is given: plain values, parts, schedules."""
        given = {n: v for n, v in self.options.items() if n not in RESERVED.get(self.stage, ())}
        parts = [(n, v) for n, v in given.items() if isinstance(v, Piece)]
        schedules = [(n, v) for n, v in given.items() if isinstance(v, Schedule)]
        moving = {n for n, _ in (*parts, *schedules)}
        return {n: v for n, v in given.items() if n not in moving}, parts, schedules

    def __call__(self, kit: Any, *args: Any) -> Any:
        """Run with these options: schedules resolved, parts bound to the same kit."""
        if self.stage == "part" and self.at == "update":
            return kit.once(self, partial(self._run, kit, *args))
        return self._run(kit, *args)

    def _run(self, kit: Any, *args: Any) -> Any:
        kit = kit.of(self)
        plain, parts, schedules = self._sorted
        options = dict(plain)
        for name, part in parts:
            options[name] = partial(part, kit)
        for name, schedule in schedules:
            options[name] = schedule(kit.clock)
        return self.fn(kit, *args, **options) if self.takes_kit else self.fn(*args, **options)


def _is_of(value: Any, kinds: tuple[str, ...]) -> bool:
    if isinstance(value, (Piece, Schedule)):
        return isinstance(value, Piece) or "float" in kinds
    if isinstance(value, bool) or value is None:
        return ("None" if value is None else "bool") in kinds
    return isinstance(value, tuple(t for k in kinds for t in KINDS.get(k, ())))


def _names(text: Any) -> tuple[str, ...]:
    """The kinds that an annotation allows; () where it names more than plain values."""
    names = tuple(n.strip() for n in (text if isinstance(text, str) else "").split("|"))
    return names if all(n in KINDS or n == "None" for n in names) else ()


def in_order(pieces: tuple[Piece, ...]) -> list[Piece]:
    """Stage by stage; within a stage as written."""
    return sorted(pieces, key=lambda p: STAGES.index(p.stage))


def bound(name: str, defaults: Mapping[str, Any], args: tuple[Any, ...], options: Mapping[str, Any]) -> dict[str, Any]:
    """Every option with its value, in order; MethodError for one that is unknown, given twice, or missing.

    What a wrap surrounds is no option that is given by place: `clipped(0.5)` is `clipped(norm=0.5)`.
    """
    places = [n for n in defaults if n != "inner"]
    given = dict(zip(places, args))
    twice = sorted(given.keys() & options.keys())
    if twice:
        raise MethodError(f"{name} got its option {twice[0]!r} twice")
    given |= options
    unknown = [n for n in given if n not in defaults]
    if unknown or len(args) > len(places):
        what = unknown[0] if unknown else str(args[len(places)])
        raise MethodError(f"{name} has no option {what!r}. {nearest(what, defaults)}")
    values = {n: given.get(n, default) for n, default in defaults.items()}
    missing = [n for n, v in values.items() if v is inspect.Parameter.empty and n != "inner"]
    if missing:
        raise MethodError(f"{name} needs a value for its option {missing[0]!r}")
    return values


def piece(
    stage: str,
    *,
    slot: str | None = None,
    reads: tuple[str, ...] = (),
    writes: tuple[str, ...] = (),
    wants: tuple[str, ...] = (),
    unmet: str = "",
    uses: Callable[[Mapping[str, Any]], tuple[str, ...]] | tuple[str, ...] = (),
    at: str = "batch",
    state: Mapping[str, Callable[..., Any]] | None = None,
    validate: Callable[[Mapping[str, Any]], str | None] | None = None,
    idle: Callable[[Any], Any] | None = None,
    one_gradient: bool = False,
    adds_rows: bool = False,
    fits: Callable[[Any, Piece], str | None] | None = None,
    **reserved: Any,
) -> Callable[[Callable[..., Any]], Callable[..., Piece]]:
    """Make a stage function into a piece factory: calling it binds options, by keyword or in written order.

    stage: one of `STAGES`, or "part" for what lives inside another piece.
    slot: its address in a method; the stage itself for collect, credit and update, else the function's name.
    reads, writes: columns. wants: what `evaluate` of the track's model must return. unmet: what to do where the model
    cannot, a sentence. uses: other models, by name, or `options -> names`.
    state: `{key: make(kit, options)}`, built when a run begins; pieces of one track that declare one key share it.
    validate: `options -> sentence` when they contradict each other.
    idle: `batch -> bool [N]`, rows for which a loss and its gradient are exactly zero; the forward pass skips them.
    one_gradient: an update that asks for one gradient, at the current parameters, and nothing else.
    adds_rows: a collect wrap that puts rows of its own beside those of the collect inside.
    fits: `(method, piece) -> sentence` when this piece cannot do in this method what it is there for.
    reserved: defaults of the options that the core reads (`per`, `rows`, `unit` of a loss).
    """
    if stage not in (*STAGES, "part"):
        raise MethodError(f"{stage!r} is not a stage. {nearest(stage, (*STAGES, 'part'))}")

    def decorate(fn: Callable[..., Any]) -> Callable[..., Piece]:
        parameters = inspect.signature(fn).parameters
        own = {n: p.default for n, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
        core_options = {} if "inner" in own else {**RESERVED.get(stage, {}), **reserved}  # a wrap has those of its core
        defaults = {**own, **core_options}
        prototype = Piece(
            stage=stage,
            name=fn.__name__,
            fn=fn,
            slot=slot or (stage if stage in SINGLE else fn.__name__),
            reads=frozenset(reads),
            writes=frozenset(writes),
            wants=frozenset(wants),
            unmet=unmet,
            uses=uses,
            at=at,
            state=dict(state or {}),
            validate=validate,
            idle=idle,
            one_gradient=one_gradient,
            adds_rows=adds_rows,
            fits=fits,
            takes_kit=next(iter(parameters), None) == "kit",
            kinds={n: kinds for n in own if (kinds := _names(parameters[n].annotation))},
        )

        @wraps(fn)
        def make(*args: Any, **options: Any) -> Piece:
            return replace(prototype, options=bound(fn.__name__, defaults, args, options)).checked()

        return make

    return decorate
