"""Where problems wait: a listed pool, known whole, and a stream without end. Training and held-out never overlap."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from trimtab.core.errors import EnvironmentFailure
from trimtab.environments.problem import Problem, is_held_out

# A stream skips a problem that one of this many items before it already asked.
RECENT = 64
# Streams start at an index drawn from the seed below this; numpy refuses seeds from 2^32 on.
STARTS = 1 << 31
ALIGN = 512
# Made problems that a stream remembers; more than the largest window.
KEPT = 1024


class Pool(Protocol):
    """Problems to train on, in an order that depends on the seed, and held-out ones, in an order that does not."""

    def draw(self, seed: int, epoch: int, cursor: int, n: int) -> tuple[list[Problem], int, int]:
        """The next n training problems, and the epoch and cursor after them."""

    def held_out(self, n: int | None) -> list[Problem]:
        """The first n held-out problems (all that are known when n is None)."""

    def describe(self) -> dict[str, Any]:
        """Counts, JSON-able."""

    @property
    def fingerprint(self) -> str:
        """Changes when the problems or the split do; part of a saved state."""


class ListedPool:
    """Distinct problems that are all known, drawn in epochs; each epoch is the order of sha256(seed/epoch/key).

    keys: identity of each distinct problem. fetch(i) makes problem i. Held-out problems are in the order of their keys.
    Raises EnvironmentFailure when nothing is left to train on.
    """

    def __init__(
        self, keys: Sequence[str], fetch: Callable[[int], Problem], holdout: float, source: str, **counts: int
    ) -> None:
        self._fetch, self._source, self._counts, self._holdout = fetch, source, counts, holdout
        order = sorted(range(len(keys)), key=keys.__getitem__)
        self._keys = keys
        self._held = [i for i in order if is_held_out(keys[i], holdout)]
        self._train = [i for i in order if not is_held_out(keys[i], holdout)]
        self._epoch: tuple[int, int, list[int]] | None = None
        if not self._train:
            raise EnvironmentFailure(
                f"{source} has {len(keys)} distinct problems and holdout={holdout} keeps them all for evaluation. "
                "Lower holdout, or add problems."
            )
        self.fingerprint = hashlib.sha256("\n".join([str(holdout), *(keys[i] for i in order)]).encode()).hexdigest()[
            :16
        ]

    @property
    def keys(self) -> Sequence[str]:
        """Identity of each distinct problem, in the order of the source."""
        return self._keys

    def all(self) -> list[Problem]:
        """Every distinct problem, in the order of the source."""
        return [self._fetch(i) for i in range(len(self._keys))]

    def draw(self, seed: int, epoch: int, cursor: int, n: int) -> tuple[list[Problem], int, int]:
        """The next n problems; an epoch that ends is followed by the next one."""
        out: list[Problem] = []
        while len(out) < n:
            if cursor >= len(self._train):
                epoch, cursor = epoch + 1, 0
            order = self._order(seed, epoch)
            part = order[cursor : cursor + n - len(out)]
            out += [self._fetch(i) for i in part]
            cursor += len(part)
        return out, epoch, cursor

    def _order(self, seed: int, epoch: int) -> list[int]:
        if self._epoch is None or self._epoch[:2] != (seed, epoch):
            # By hash, not by a shuffle: the order is the same on every Python and machine.
            def place(i: int) -> bytes:
                return hashlib.sha256(f"{seed}/{epoch}/{self._keys[i]}".encode()).digest()

            self._epoch = (seed, epoch, sorted(self._train, key=place))
        return self._epoch[2]

    def held_out(self, n: int | None) -> list[Problem]:
        """The first n held-out problems by key; fewer when the pool has fewer."""
        if not self._held:
            raise EnvironmentFailure(_nothing_held(self._source, self._holdout, len(self._keys)))
        return [self._fetch(i) for i in self._held[:n]]

    def describe(self) -> dict[str, Any]:
        """Counts of train, held-out, and whatever the source counted (duplicates, ...)."""
        return {"pool": "listed", "train": len(self._train), "held_out": len(self._held), **self._counts}


class StreamPool:
    """Problems made on demand by index, 0, 1, 2, ... without end (the cursor counts indices from the seed's start).

    make(low, high) gives the problems of those indices, None for one that could not be made; `first` are those made
    already, from index 0 on. Held-out problems are met in the order of the indices from 0 on, training problems
    from an index drawn from the seed; the hash of the question keeps them apart.
    """

    def __init__(
        self,
        make: Callable[[int, int], list[Problem | None]],
        holdout: float,
        source: str,
        counts: Callable[[], dict[str, int]],
        first: Sequence[Problem | None] = (),
    ) -> None:
        self._make, self._holdout, self._source, self._counts = make, holdout, source, counts
        self._known: dict[int, Problem | None] = dict(enumerate(first))
        self._held: dict[str, tuple[int, Problem]] = {}
        self._scanned = 0
        keys = [p.key for p in self.window(0, RECENT) if p is not None]
        self.fingerprint = hashlib.sha256("\n".join([str(holdout), source, *keys]).encode()).hexdigest()[:16]

    def window(self, low: int, high: int) -> list[Problem | None]:
        """Problems low..high-1; what was made lately is kept."""
        missing = [i for i in range(low, high) if i not in self._known]
        if missing:
            made = self._make(missing[0], missing[-1] + 1)
            self._known |= dict(zip(range(missing[0], missing[-1] + 1), made))
        out = [self._known[i] for i in range(low, high)]
        # Oldest first out; never what the next draw looks back on.
        for index in list(self._known)[: max(0, len(self._known) - KEPT)]:
            del self._known[index]
        return out

    def draw(self, seed: int, epoch: int, cursor: int, n: int) -> tuple[list[Problem], int, int]:
        """The next n training problems; one asked within the last RECENT indices, or held out, is passed over."""
        start = int(hashlib.sha256(f"stream/{seed}".encode()).hexdigest(), 16) % STARTS // ALIGN * ALIGN
        out: list[Problem] = []
        passed = 0
        while len(out) < n:
            # A little more than is missing, so that a slow generator makes little in vain.
            step = min(256, n - len(out) + 2)
            low = max(start, start + cursor - RECENT)
            items = self.window(low, start + cursor + step)
            for place in range(start + cursor - low, len(items)):
                if len(out) == n:
                    break
                cursor += 1
                problem = items[place]
                recent = {p.key for p in items[max(0, place - RECENT) : place] if p is not None}
                if problem is None or problem.key in recent or is_held_out(problem.key, self._holdout):
                    passed += 1
                    continue
                out.append(problem)
                passed = 0
            if passed > 4096:
                raise EnvironmentFailure(
                    f"{self._source} gave no new training problem in {passed} tries; lower holdout or widen its "
                    "parameters."
                )
        return out, epoch, cursor

    def held_out(self, n: int | None) -> list[Problem]:
        """The first n distinct held-out problems from index 0 on; n=None gives those of the first 256 indices."""
        if self._holdout <= 0:
            raise EnvironmentFailure(_nothing_held(self._source, self._holdout, None))
        limit = 256 if n is None else 4096 + int(4 * n / self._holdout)
        while self._scanned < limit and (n is None or len(self._held) < n):
            missing = 256 if n is None else int((n - len(self._held)) / self._holdout) + 1
            step = min(256, missing, limit - self._scanned)
            for index, problem in enumerate(self.window(self._scanned, self._scanned + step), self._scanned):
                if problem is not None and is_held_out(problem.key, self._holdout):
                    self._held.setdefault(problem.key, (index, problem))
            self._scanned += step
        found = [problem for index, problem in self._held.values() if n is not None or index < limit]
        if not found:
            raise EnvironmentFailure(_nothing_held(self._source, self._holdout, limit))
        return found[:n]

    def describe(self) -> dict[str, Any]:
        """A stream has no counts of train and held-out; both are null."""
        return {"pool": "stream", "train": None, "held_out": None, **self._counts()}


def _nothing_held(source: str, holdout: float, count: int | None) -> str:
    seen = "" if count is None else f" none of its {count} problems fell below it;"
    return (
        f"{source} has no held-out problems at holdout={holdout}:{seen} raise holdout (default 0.25) or add problems."
    )
