"""The registry of methods: by name, paper id and alias; and expressions such as `d3s+bapo`."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from trimtab.core.check import sound
from trimtab.core.edits import authored_by
from trimtab.core.errors import MethodError, nearest
from trimtab.core.method import Method, diff, show


@dataclass(frozen=True)
class Neutral:
    """The options at which a method is its base.

    level: "exact" (bitwise), "rounding" (float64 to 1e-9), or "law", where `why` states the card's reduction.
    base_options: options of the base it is compared with.
    """

    options: dict[str, Any] = field(default_factory=dict)
    level: str = "exact"
    why: str = ""
    base_options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Definition:
    """A registered method: a function of its base, plus what is known about it. Call it to build a `Method`.

    `bapo()` stands on its declared base, `bapo(dapo())` on another; `a + b` is `a(b())`.
    """

    name: str
    fn: Callable[..., Method]
    world: str
    title: str
    case: str
    arxiv: str = ""
    base: Definition | None = None
    aliases: tuple[str, ...] = ()
    neutral: Neutral | None = None
    presets: dict[str, dict[str, Any]] = field(default_factory=dict)
    confusable: str = ""

    @property
    def doc(self) -> str:
        return inspect.getdoc(self.fn) or ""

    @property
    def lineage(self) -> frozenset[str]:
        return frozenset() if self.base is None else self.base.lineage | {self.base.name}

    @property
    def parameters(self) -> dict[str, Any]:
        """Option names and defaults."""
        own = inspect.signature(self.fn).parameters.values()
        return {p.name: p.default for p in own if p.kind is inspect.Parameter.KEYWORD_ONLY}

    def __call__(self, base: Method | None = None, /, *, preset: str | None = None, **options: Any) -> Method:
        if preset is not None:
            if preset not in self.presets:
                raise MethodError(f"{self.name} has no preset {preset!r}. {nearest(preset, self.presets)}")
            options = {**self.presets[preset], **options}
        for name in options:
            if name not in self.parameters:
                raise MethodError(f"{self.name} has no option {name!r}. {nearest(name, self.parameters)}")
        if base is None or (self.base is not None and base.name == self.base.name):
            return self._made(self.base() if base is None and self.base else base, options)
        try:
            self._may_stand_on(base)
            made = self._made(base, options)
            sound(made)
        except MethodError as refusal:
            said = " ".join([f"{refusal}".rstrip(".") + ".", *self._meant_for(base)])
            raise MethodError(f"{self.name}+{base.name} cannot be built: {said}") from refusal
        return made

    def _may_stand_on(self, base: Method) -> None:
        if self.base is None:
            raise MethodError(f"{self.name} is a method of its own and changes no base, so it can only stand last")
        if base.made_of[:1] == (self.name,):
            raise MethodError(f"{self.name} would replace or repeat itself; write it once")
        if self.name in base.made_of:
            raise MethodError(
                f"{base.name} is made with {self.name} already, and twice it would replace or repeat itself. Write it "
                f"once; its options belong where it stands"
            )

    def _meant_for(self, base: Method) -> tuple[str, ...]:
        if self.base is None or self.base.name in base.made_of:
            return ()
        return (f"{self.name} is written as a change to {self.base.name}, which {base.name} is not made from.",)

    def _made(self, base: Method | None, options: dict[str, Any]) -> Method:
        made = self._build(base, options)
        changed = {n: v for n, v in options.items() if show(v) != show(self.parameters[n])}
        explicit = list(made.explicit)
        for name in changed:
            try:
                without = self._build(base, {k: v for k, v in options.items() if k != name})
            except MethodError:  # the others need it, so it matters; what it sets shows against the defaults
                try:
                    without = self._build(base, {})
                except MethodError:  # without it this cannot stand on this base at all
                    continue
            paths = [path for path, _, _ in diff(without, made)]
            if not paths:
                raise MethodError(
                    f"{self.name}({name}={show(options[name])}) changes nothing in the method that it builds with "
                    f"the other options given, so it would be ignored. Leave it out."
                )
            explicit += paths
        name = self.name
        if base is not None and self.base is not None and base.name != self.base.name:
            name = f"{self.name}+{base.name}"
        made_of = (self.name, *(base.made_of if base is not None else ()))
        made = replace(made, name=name, made_of=made_of, explicit=tuple(dict.fromkeys(explicit)))
        phases = []
        for i, p in enumerate(made.phases):
            inside = (*p.method.explicit, *_below(f"phase {i + 1} {p.name} / ", explicit))
            phases.append(replace(p, method=replace(p.method, explicit=inside)))
        return replace(made, phases=tuple(phases))

    def _build(self, base: Method | None, options: dict[str, Any]) -> Method:
        with authored_by(self.name, self.lineage):
            if base is None:
                return self.fn(**options)
            if not base.phases or (self.base is not None and self.base().phases):  # written for phases
                return self.fn(base, **options)
            made = base.each(lambda _, method: self.fn(method, **options))  # the change is made in every phase
        if any(p.method.phases for p in made.phases):
            raise MethodError(f"{self.name} and {base.name} both run in phases; one of them must be a plain method")
        return made

    def __add__(self, other: Definition | Method) -> Method:
        """`a + b` is `a(b())`; three are written `a + (b + c)`, or `parse("a+b+c")`."""
        return self(other() if isinstance(other, Definition) else other)


def _below(head: str, paths: list[str]) -> list[str]:
    return [path.removeprefix(head) for path in paths if path.startswith(head)]


_METHODS: dict[str, Definition] = {}


def method(
    *,
    world: str,
    title: str,
    case: str,
    base: Definition | None = None,
    register: bool = True,
    **facts: Any,
) -> Callable[[Callable[..., Method]], Definition]:
    """Register a function `fn(base, *, options) -> Method` (or `fn(*, options)` for a base) under its own name.

    case: the smallest environment and models to run it on (see `trimtab.methods.cases`); the laws run there.
    """

    def decorate(fn: Callable[..., Method]) -> Definition:
        made = Definition(name=fn.__name__, fn=fn, world=world, title=title, case=case, base=base, **facts)
        if base is not None and made.neutral is None:
            raise MethodError(f"{made.name} changes {base.name}, so it must declare options at which it is {base.name}")
        if register:
            keys = (made.name, *made.aliases, *([made.arxiv] if made.arxiv else []))
            for key in keys:
                if key in _METHODS:
                    raise MethodError(f"two methods answer to {key!r}: {_METHODS[key].title} and {title}. Rename one.")
            _METHODS.update(dict.fromkeys(keys, made))
        return made

    return decorate


def methods() -> dict[str, Definition]:
    """All registered methods by name, in order of registration."""
    import trimtab.methods  # noqa: F401  registering happens on import

    return {key: d for key, d in _METHODS.items() if key == d.name}


def find(name: str) -> Definition:
    """A method by name, alias or arXiv id."""
    known = methods()
    if name in _METHODS:
        return _METHODS[name]
    raise MethodError(f"there is no method {name!r}. {nearest(name, known)}")


def parse(expression: str) -> Method:
    """Build `a+b(option=value)+c`: each method applied to the one on its right.

    Values are Python literals. Raises MethodError with the place of the mistake.
    """
    try:
        node = ast.parse(expression.strip(), mode="eval").body
    except SyntaxError as e:
        raise MethodError(
            f"cannot read the method expression {expression!r} (column {e.offset}); "
            f"write names joined by '+', with options in brackets: d3s+bapo(target=0.5)"
        ) from None
    calls: list[ast.expr] = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        calls.insert(0, node.right)
        node = node.left
    calls.insert(0, node)
    read = [_call(call, expression) for call in calls]
    built: Method | None = None
    for i in reversed(range(len(read))):
        name, options = read[i]
        definition = find(name)
        try:
            built = definition(built, **options)
        except MethodError as refusal:
            if built is None or not _builds([read[i + 1], read[i], *read[i + 2 :]]):
                raise
            raise MethodError(f"{refusal} The other order can be built: {read[i + 1][0]}+{name}.") from refusal
    assert built is not None
    return built


def _builds(read: list[tuple[str, dict[str, Any]]]) -> bool:
    built: Method | None = None
    try:
        for name, options in reversed(read):
            built = find(name)(built, **options)
    except MethodError:
        return False
    return True


def _call(node: ast.expr, expression: str) -> tuple[str, dict[str, Any]]:
    options: dict[str, Any] = {}
    if isinstance(node, ast.Call):
        try:
            options = {k.arg: ast.literal_eval(k.value) for k in node.keywords if k.arg}
        except (ValueError, TypeError):
            raise MethodError(f"options in {expression!r} must be plain values: numbers, 'text', True, None") from None
        if node.args or len(options) < len(node.keywords):  # a starred dict has no name
            name = ast.unparse(node.func)
            raise MethodError(f"options in {expression!r} must be named, each once: {name}(option=value)")
        node = node.func
    if isinstance(node, ast.Name):
        return node.id, options
    if isinstance(node, ast.Constant):  # an arXiv id reads as a number
        return str(ast.get_source_segment(expression.strip(), node)), options
    raise MethodError(f"{ast.unparse(node)!r} in {expression!r} is not the name of a method")
