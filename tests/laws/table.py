"""Every method the laws are checked on: all registered ones, and the spikes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tests.spikes import bapo as bapo_spike
from tests.spikes import chord as chord_spike
from tests.spikes import tokens
from trimtab.core.method import Method
from trimtab.core.registry import Definition, find, methods
from trimtab.core.schedules import linear, warmup
from trimtab.methods.cases import case
from trimtab.stages.probe import held_out
from trimtab.stages.update import clipped, scheduled, sgd

torch.set_num_threads(1)

Build = Callable[[], Method]
Make = Callable[[int], tuple[Any, Mapping[str, nn.Module]]]


@dataclass(frozen=True)
class Entry:
    """A method under the laws. definition: where there is one, with the base it stands on in this table."""

    name: str
    build: Build
    make: Make
    definition: Definition | None = None
    base: Callable[..., Method] | None = None
    shrink: Callable[[Method], Method] = lambda m: m

    def neutral(self) -> tuple[Method, Method]:
        """The method at its neutral options, and its base."""
        assert self.definition is not None
        assert self.definition.neutral is not None
        neutral = self.definition.neutral
        stand = self.base or self.definition.base
        assert stand is not None
        return self.shrink(self.definition(stand(), **neutral.options)), self.shrink(stand(**neutral.base_options))


def _registered(definition: Definition) -> list[Entry]:
    """The method with its defaults, and with each of its presets: `rec`, `rec[opmd]`, ..."""
    small = case(definition.case)

    def maker(build: Build) -> Make:
        def make(seed: int) -> tuple[Any, Mapping[str, nn.Module]]:
            fresh = case(definition.case, seed)
            return fresh.environment, fresh.models_of(build())

        return make

    def preset(name: str) -> Entry:
        def build() -> Method:
            return small.shrink(definition(preset=name))

        return Entry(f"{definition.name}[{name}]", build, maker(build))

    def default() -> Method:
        return small.shrink(definition())

    plain = Entry(definition.name, default, maker(default), definition, shrink=small.shrink)
    return [plain, *(preset(name) for name in definition.presets)]


def _changed(name: str, how: str, change: Callable[[Method], Method]) -> Entry:
    """A registered method with a change that a user makes."""
    entry = _registered(methods()[name])[0]
    return Entry(f"{name}, {how}", lambda: change(entry.build()), entry.make)


def _given(name: str, **options: Any) -> Entry:
    """A registered method with other options."""
    entry, small = _registered(methods()[name])[0], case(methods()[name].case)
    said = ", ".join(f"{k}={v}" for k, v in options.items())
    return Entry(f"{name}({said})", lambda: small.shrink(methods()[name](**options)), entry.make)


def wrapped(method: Method) -> Method:
    """With a clipped, scheduled update and a probe."""
    made = method.wrap("update", clipped(0.01)).wrap("update", scheduled(warmup(2, linear(1.0, 0.0))))
    return made.then(held_out(every=1, problems=2))


def plain(method: Method) -> Method:
    """With plain gradient descent for an update."""
    return replace(method, explicit=()).swap("update", sgd(lr=0.1))


def _spike(name: str, build: Build, definition: Definition | None = None) -> Entry:
    return Entry(name, build, tokens.case, definition, base=lambda **_: bapo_spike.toy_grpo())


def table() -> dict[str, Entry]:
    """All entries by name."""
    toy = bapo_spike.toy_grpo
    bapo, d3s, chord, remix = bapo_spike.bapo, chord_spike.d3s, chord_spike.chord, find("remix")
    rows = [entry for d in methods().values() for entry in _registered(d)]
    rows += [_given("remix", reincarnate=1, kl_wait=0), _given("subnetwork", every=1)]
    rows += [_changed("grpo", "wrapped", wrapped), _changed("reinforce", "wrapped sgd", lambda m: wrapped(plain(m)))]
    rows += [
        _spike("spike:bapo", lambda: bapo(toy()), bapo),
        _spike("spike:d3s", lambda: d3s(toy()), d3s),
        _spike("spike:chord", lambda: chord(toy()), find("chord")),
        _spike("spike:chord+d3s+bapo", lambda: chord(d3s(bapo(toy())))),
        _spike("spike:chord+remix+bapo", lambda: chord(remix(bapo(toy()), reincarnate=1, kl_wait=0))),
        _spike("spike:remix+chord+d3s", lambda: remix(chord(d3s(toy())), share=0.5, kl_wait=0, entropy=0.01)),
    ]
    for module in _control():
        rows += [Entry(f"spike:{n}", _builder(m), make, m if isinstance(m, Definition) else None)
                 for n, (m, make) in module.CASES.items()]  # fmt: skip
    return {e.name: e for e in rows}


def _builder(made: Definition | Build) -> Build:
    return lambda: made()


def _control() -> list[Any]:
    import importlib
    import importlib.util

    names = [f"tests.spikes.{n}" for n in ("harpg", "hnpg", "famo2o", "gorl")]
    return [importlib.import_module(n) for n in names if importlib.util.find_spec(n)]
