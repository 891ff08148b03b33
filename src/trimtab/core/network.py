"""Which networks a method trains, as data: it shows in `explain`, `diff` and the fingerprint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trimtab.core.errors import MethodError


@dataclass(frozen=True)
class Network:
    """One network of a method; `policies.networks.build_networks` makes it for the spaces of an environment.

    kind: what it computes ("actor_critic", "stochastic", "value", ...). hidden: units of each hidden layer, () for a
    linear one. activation: between layers. options: whatever else its kind has; a kind refuses one it does not read.
    start: a digest of the earlier run whose numbers it begins with; "" where it begins anew.
    """

    kind: str
    hidden: tuple[int, ...] = (64, 64)
    activation: str = "tanh"
    options: Mapping[str, Any] = field(default_factory=dict)
    start: str = ""

    def __post_init__(self) -> None:
        if not all(isinstance(h, int) and not isinstance(h, bool) and h >= 1 for h in self.hidden):
            raise MethodError(f"hidden={self.hidden!r} must be whole numbers of at least 1, one for each hidden layer")

    def flatten(self, prefix: str) -> dict[str, Any]:
        """`path -> value` of its kind and everything it is made with."""
        rows: dict[str, Any] = {prefix: self.kind, f"{prefix}.hidden": tuple(self.hidden)}
        rows |= {f"{prefix}.activation": self.activation} if self.hidden else {}
        rows |= {f"{prefix}.{name}": value for name, value in self.options.items()}
        return rows | ({f"{prefix}.start": self.start} if self.start else {})
