"""One state tree: everything that a run needs to go on exactly, and its checkpoints.

A checkpoint is a folder: `tensors.safetensors`, `state.json` (everything else), `manifest.json` (digests, versions,
method). It is written under a temporary name, synced, and renamed, so a folder with the final name is complete.
"""

from __future__ import annotations

import hashlib
import json
import platform
import random
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trimtab import native
from trimtab.core import chunks
from trimtab.core.batch import Batch
from trimtab.core.chunks import AppendOnly, _digest, _sync
from trimtab.core.copies import Kept
from trimtab.core.disk import writing
from trimtab.core.errors import CheckpointError, DiskError

FORMAT = 1
COUNTERS = ("turns", "updates", "decisions", "rows")


@dataclass
class Clock:
    """What has been counted since the run began, and the budget it runs to. Schedules read it."""

    turns: int = 0
    updates: int = 0
    decisions: int = 0
    rows: int = 0
    budget: dict[str, int] = field(default_factory=dict)

    @property
    def progress(self) -> float:
        """How much of the budget is used, in [0, 1]: the largest share over its counters."""
        return min(1.0, max((getattr(self, k) / v for k, v in self.budget.items() if v), default=0.0))

    def reached(self, until: Mapping[str, int], since: Mapping[str, int] | None = None) -> bool:
        since = since or {}
        return any(getattr(self, k) - since.get(k, 0) >= v for k, v in until.items())

    def counts(self) -> dict[str, int]:
        return {k: getattr(self, k) for k in COUNTERS}

    def state_dict(self) -> dict[str, Any]:
        return self.counts()

    def load_state_dict(self, tree: dict[str, int]) -> None:
        for name in COUNTERS:
            setattr(self, name, tree[name])


@dataclass
class Phases:
    """Where a phased method stands, and the models that a phase froze."""

    index: int = -1
    since: dict[str, int] = field(default_factory=dict)
    frozen: list[str] = field(default_factory=list)


class GlobalRandom:
    """The process-wide generators of torch, numpy and random, as part of the tree."""

    def state_dict(self) -> dict[str, Any]:
        name, keys, place, has_gauss, gauss = np.random.get_state()
        version, words, gauss_next = random.getstate()
        return {
            "torch": torch.get_rng_state(),
            "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), place, has_gauss, gauss],
            "python": [version, torch.tensor(words), gauss_next],
        }

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        torch.set_rng_state(tree["torch"])
        name, keys, place, has_gauss, gauss = tree["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), place, has_gauss, gauss))
        version, words, gauss_next = tree["python"]
        random.setstate((version, tuple(words.tolist()), gauss_next))


@dataclass
class State:
    """The tree. `models` and `copies` are modules; `pieces` holds what pieces declared, keyed "track/key"."""

    seed: int
    fingerprint: str
    method: str
    models: dict[str, nn.Module]
    copies: dict[str, Kept]
    environment: Any
    clock: Clock = field(default_factory=Clock)
    pieces: dict[str, Any] = field(default_factory=dict)
    streams: dict[str, torch.Generator] = field(default_factory=dict)
    phases: Phases = field(default_factory=Phases)
    everywhere: GlobalRandom = field(default_factory=GlobalRandom)

    def stream(self, name: str) -> torch.Generator:
        """A named random stream, seeded by the run's seed and the name alone."""
        if name not in self.streams:
            digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
            self.streams[name] = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return self.streams[name]

    def lookup(self) -> dict[str, nn.Module]:
        """Models and copies under their names."""
        return {**self.models, **{name: kept.module for name, kept in self.copies.items()}}

    def tree(self) -> dict[str, Any]:
        """Everything as nested dicts, lists, numbers, text and tensors."""
        parts = ("clock", "models", "copies", "environment", "pieces", "streams", "everywhere")
        return {
            "seed": self.seed,
            "phases": asdict(self.phases),
            "sources": {name: kept.rule.source for name, kept in self.copies.items()},
            **{name: _plain(getattr(self, name)) for name in parts},
        }

    def load(self, tree: dict[str, Any]) -> None:
        """Put a saved tree back into these live objects. The tree must fit: CheckpointError says what does not."""
        for name in ("models", "copies"):
            saved, mine = sorted(tree[name]), sorted(getattr(self, name))
            if saved != mine:
                raise CheckpointError(f"the checkpoint holds the {name} {saved}, and this run has {mine}")
        self.seed = tree["seed"]
        self.phases = Phases(**tree["phases"])
        self.streams = {name: torch.Generator() for name in tree["streams"]}
        for name in ("clock", "models", "copies", "environment", "pieces", "streams", "everywhere"):
            setattr(self, name, _restore(getattr(self, name), tree[name], name))


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, (Batch, AppendOnly)):
        return value
    if hasattr(value, "state_dict"):
        return _plain(value.state_dict())
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value] if isinstance(value, list) else tuple(_plain(v) for v in value)
    return value


def _restore(target: Any, saved: Any, path: str) -> Any:
    if isinstance(target, Batch) or isinstance(saved, Batch):
        return saved
    if isinstance(target, AppendOnly):
        return _regrown(target, saved, path)
    if isinstance(target, torch.Generator):
        target.set_state(saved)
        return target
    if hasattr(target, "load_state_dict"):
        try:
            target.load_state_dict(saved)
        except (KeyError, RuntimeError, ValueError) as e:
            raise CheckpointError(f"the saved {path} does not fit this run: {e}") from e
        return target
    if isinstance(target, dict) and isinstance(saved, Mapping):
        restored = {k: _restore(target.get(k), v, f"{path}.{k}") for k, v in saved.items()}
        target.clear()  # a key that was not saved was not there
        target.update(restored)
        return target
    if isinstance(target, (list, tuple)) and isinstance(saved, (list, tuple)) and len(target) == len(saved):
        return type(saved)(_restore(t, v, f"{path}.{i}") for i, (t, v) in enumerate(zip(target, saved)))
    return saved


def _regrown(target: AppendOnly, saved: Any, path: str) -> AppendOnly:
    if isinstance(saved, AppendOnly):  # of a live tree
        saved = {"about": saved.about(), "rows": saved.between(saved.first, saved.total), "saved": saved.saved}
    try:
        target.restore(saved["about"], saved["rows"])
    except (KeyError, RuntimeError, ValueError) as e:
        raise CheckpointError(f"the saved {path} does not fit this run: {e}") from e
    target.saved = list(saved["saved"])
    return target


# -- files ------------------------------------------------------------------------------------------------------


_NOT_SAVED = (torch.complex128,)  # safetensors has no such type


def _encode(value: Any, tensors: dict[str, Tensor], path: str, files: bool = False) -> Any:
    """JSON for the tree; tensors go to the side, exact types survive. files: name the files of what grows."""
    if path in tensors:  # keys 1 and "1", or "a/b" and b below a
        path = f"{path}#{len(tensors)}"
    if isinstance(value, Tensor) and value.dtype not in _NOT_SAVED:
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {"$tensor": path}
    if isinstance(value, Batch):
        return {"$batch": _encode(value.columns, tensors, path, files)}
    if isinstance(value, AppendOnly):
        held = {"saved": value.saved} if files and value.saved else {"rows": value.between(value.first, value.total)}
        return {"$grown": _encode({"about": value.about(), "first": value.first, **held}, tensors, path)}
    if isinstance(value, Mapping):
        made = ((_encode(k, tensors, ""), _encode(v, tensors, f"{path}/{k}", files)) for k, v in value.items())
        return {"$dict": [list(pair) for pair in made]}
    if isinstance(value, tuple):
        return {"$tuple": [_encode(v, tensors, f"{path}/{i}", files) for i, v in enumerate(value)]}
    if isinstance(value, list):
        return [_encode(v, tensors, f"{path}/{i}", files) for i, v in enumerate(value)]
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biuf" and value.dtype.isnative:
        tensors[path] = torch.from_numpy(np.array(value, order="C"))
        return {"$numpy" if isinstance(value, np.ndarray) else "$scalar": path}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise CheckpointError(
        f"{path} holds a {type(value).__name__}, which a checkpoint cannot hold. State is made of tensors, numbers, "
        f"text, lists and dicts, or of objects with state_dict and load_state_dict."
    )


def _decode(value: Any, tensors: dict[str, Tensor], folder: Path = Path()) -> Any:
    if isinstance(value, list):
        return [_decode(v, tensors, folder) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, inside),) = value.items()
    if kind == "$dict":
        return {_decode(k, tensors): _decode(v, tensors, folder) for k, v in inside}
    if kind == "$batch":
        return Batch(_decode(inside, tensors))
    if kind == "$grown":
        made = _decode(inside, tensors)
        rows = chunks.read(made["saved"], made["first"], folder) if "saved" in made else made["rows"]
        return {"about": made["about"], "rows": rows, "saved": made.get("saved", [])}
    if kind == "$tuple":
        return tuple(_decode(v, tensors, folder) for v in inside)
    # A fresh allocation: a view into the file may be unaligned, and then a batch-1 linear rounds differently.
    fresh = torch.empty_like(tensors[inside]).copy_(tensors[inside])
    if kind == "$scalar":
        return fresh.numpy()[()]
    return fresh.numpy() if kind == "$numpy" else fresh


def here() -> dict[str, Any]:
    """What exactness depends on: resuming elsewhere is allowed, but said."""
    return {
        "threads": torch.get_num_threads(),
        "dtype": str(torch.get_default_dtype()),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "compiled kernels": native.expected(),
    }


def save(state: State, folder: str | Path, *, keep: int = 2) -> Path:
    """Write a checkpoint below `folder` and remove all but the newest `keep`. Returns its path.

    Atomic: what follows the last complete checkpoint is all that a kill at any moment can lose.
    Raises DiskError, with the space needed and free, when the disk does not take it; nothing half-written stays.
    """
    if keep < 1:
        raise CheckpointError(f"keep={keep} would leave no checkpoint; it must be at least 1")
    folder = Path(folder)
    final = folder / f"turn-{state.clock.turns:08d}"
    work = folder / f".writing-{final.name}"
    tensors: dict[str, Tensor] = {}
    grown = _grown(state.pieces)
    with writing(folder / chunks.PLACE):
        for one in grown:
            chunks.write(one, folder)
    tree = json.dumps(_encode(state.tree(), tensors, "", files=True))
    needed = sum(t.nbytes for t in tensors.values()) + len(tree)
    with writing(final, needed):
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".writing-*"):
            if leftover not in checkpoints(folder):
                shutil.rmtree(leftover)
    try:
        with writing(final, needed):
            _write(work, state, tensors, tree)
            replaced = folder / f"{_REPLACED}{final.name}"
            if final.exists():  # the same turn saved twice: `checkpoints` sees the old one until the new one is there
                final.rename(replaced)
            work.rename(final)
            _sync(folder)
            shutil.rmtree(replaced, ignore_errors=True)
            for old in [c for c in checkpoints(folder) if c != final][: -keep + 1 or None]:
                shutil.rmtree(old.rename(folder / f".writing-gone-{old.name}"))
            if grown:
                chunks.prune(folder, [name for c in checkpoints(folder) for name in _manifest(c).get("chunks", [])])
    except DiskError:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return final


def _grown(pieces: Mapping[str, Any]) -> list[AppendOnly]:
    """The state that grows at its end, of all pieces."""
    return [value for value in pieces.values() if isinstance(value, AppendOnly)]


def _write(work: Path, state: State, tensors: dict[str, Tensor], tree: str) -> None:
    """The files of a checkpoint in a new folder, on disk when this returns."""
    work.mkdir()
    save_file(tensors, work / "tensors.safetensors")
    (work / "state.json").write_text(tree)
    digests = {name: _digest(work / name) for name in ("tensors.safetensors", "state.json")}
    manifest = {
        "format": FORMAT,
        "method": state.method,
        "fingerprint": state.fingerprint,
        "clock": state.clock.counts(),
        "here": here(),
        "digests": digests,
        "chunks": [name for grown in _grown(state.pieces) for *_, name in grown.saved],
    }
    (work / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for file in work.iterdir():
        _sync(file)
    _sync(work)


_REPLACED = ".writing-old-"
_MANIFEST = ("format", "method", "fingerprint", "here", "digests")


def checkpoints(folder: str | Path) -> list[Path]:
    """Complete checkpoints below a folder, oldest first; also one whose replacement was killed half way."""
    found = [p for pattern in (f"{_REPLACED}turn-*", "turn-*") for p in Path(folder).glob(pattern)]
    complete = {p.name.removeprefix(_REPLACED): p for p in found if (p / "manifest.json").exists()}
    return [complete[name] for name in sorted(complete)]


def _manifest(path: Path) -> dict[str, Any]:
    try:
        made: dict[str, Any] = json.loads((path / "manifest.json").read_text())
    except ValueError as e:
        raise CheckpointError(
            f"{path / 'manifest.json'} is damaged: {e}. Delete that folder to go on from the checkpoint before it."
        ) from e
    return made


def load(state: State, path: str | Path) -> list[str]:
    """Put a checkpoint (or the newest one below a folder) into `state`; returns what differs from where it was made.

    Raises CheckpointError when there is none, when a file's digest is not the recorded one, or when it belongs to
    another method.
    """
    path = Path(path)
    if not (path / "manifest.json").exists():
        found = checkpoints(path)
        if not found:
            raise CheckpointError(f"there is no complete checkpoint in {path}")
        path = found[-1]
    manifest = _manifest(path)
    missing = [k for k in _MANIFEST if not isinstance(manifest, dict) or k not in manifest]
    if missing:
        raise CheckpointError(
            f"{path / 'manifest.json'} is damaged: it has no {missing[0]!r}. "
            f"Delete that folder to go on from the checkpoint before it."
        )
    if manifest["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {manifest['format']}; this version reads format {FORMAT}. "
            f"Go on with the version of trimtab that wrote it, named in the run's config.json, or start a new run."
        )
    for name, digest in manifest["digests"].items():
        if not (path / name).exists() or _digest(path / name) != digest:
            raise CheckpointError(
                f"{path / name} is damaged: its sha256 is not the recorded {digest[:12]}. "
                f"Delete that folder to go on from the checkpoint before it."
            )
    if manifest["fingerprint"] != state.fingerprint:
        raise CheckpointError(
            f"{path} was written by {manifest['method']} ({manifest['fingerprint']}), but this run is "
            f"{state.method} ({state.fingerprint}). Resume with the same method and options."
        )
    tensors = load_file(path / "tensors.safetensors")
    state.load(_decode(json.loads((path / "state.json").read_text()), tensors, path.parent))
    now = here()
    return [
        f"{k} was {v} when this checkpoint was written and is {now[k]} here; results may differ in rounding"
        for k, v in manifest["here"].items()
        if now[k] != v
    ]
