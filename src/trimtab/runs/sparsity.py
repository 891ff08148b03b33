"""How sparse the update of a run is, or of two, and what they share: `trimtab sparsity`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trimtab.core.errors import CheckpointError
from trimtab.core.state import checkpoints
from trimtab.environments.spec import nearest_path
from trimtab.report.folder import RunFolder
from trimtab.runs.export import choose
from trimtab.runs.request import Request, request_of
from trimtab.runs.worlds import build
from trimtab.stages.sparsity import (
    Sparsity,
    SparsityError,
    Tensors,
    changes,
    layer_of,
    overlap,
    paired,
    parameters,
    scattered,
    sparsity,
)
from trimtab.stages.subnetwork import base_of, hash_of, write_mask

BUILTIN = ("smollm2", "tiny", "nano")
FLOATS = ("F64", "F32", "F16", "BF16")
KINDS = "a run folder, one of its checkpoints, a model folder, a .safetensors file, or one of smollm2, tiny and nano"


class Stored(Mapping[str, Tensor]):
    """Tensors of files, by name, each read when it is asked for: a model may be larger than half of the memory."""

    def __init__(self, places: Mapping[str, tuple[Path, str]]) -> None:
        self._places = dict(places)

    @classmethod
    def of(cls, file: Path, head: str = "", put: str = "") -> Stored:
        """The floating-point tensors of a file whose names begin with `head`, with `put` in its place.

        Raises SparsityError for a file that cannot be read.
        """
        try:
            with safe_open(file, "pt") as f:
                keys = [k for k in f.keys() if k.startswith(head) and f.get_slice(k).get_dtype() in FLOATS]  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise SparsityError(f"{file} cannot be read: {error}") from None
        return cls({put + key.removeprefix(head): (file, key) for key in keys})

    def __or__(self, other: Stored) -> Stored:
        return Stored({**self._places, **other._places})

    def named(self, names: Mapping[str, str]) -> Stored:
        """Some of them under other names: new name -> name here."""
        return Stored({new: self._places[old] for new, old in names.items()})

    def __getitem__(self, name: str) -> Tensor:
        file, key = self._places[name]
        with safe_open(file, "pt") as f:
            made: Tensor = f.get_tensor(key)
        return made

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


@dataclass(frozen=True)
class States:
    """Parameters of one model at several moments. course: (turn, how to read them), the last one is its end.

    base: network -> digest of the start, where a run can begin there; a mask needs it. about: kept with a mask.
    """

    name: str
    start: Tensors
    course: list[tuple[int, Callable[[], Tensors]]] = field(default_factory=list)
    base: dict[str, str] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def is_run(self) -> bool:
        return bool(self.course)


def compare(
    a: str | Path,
    b: str | Path | None = None,
    *,
    start: str | Path | None = None,
    checkpoint: str = "newest",
    dtype: str = "bfloat16",
    tol: float = 1e-5,
    rank: bool = False,
    mask: str | Path | None = None,
    mask_tol: float = 0.0,
    random: int | None = None,
) -> dict[str, Any]:
    """Measure an update, or two and their overlap; returns plain values, see `sparsity` for what they are.

    One run: its start against its end, and against every checkpoint kept. Two runs: each of them, the overlap of what
    they changed, and how alike their ends are. Otherwise `a` is the reference and `b` the new parameters; with `start`,
    that is the reference, and `a` and `b` are two updates of it. Each is a run folder, a checkpoint, a model folder, a
    .safetensors file, or a builtin policy. checkpoint: which is the end of a run, as for `export`. rank: also the rank
    of every matrix of differences.
    mask: a file to write, of the weights that the one update changed by more than `mask_tol`, as stored. random: a
    seed, to choose as many weights of each matrix by lot instead.

    Raises SparsityError for what cannot be compared, naming the matrix, and for options that contradict each other.
    """
    if random is not None and mask is None:
        raise SparsityError(f"random={random} chooses the weights of a mask, and no mask is written; add --mask FILE")
    sides = [states(place, checkpoint) for place in (a, b) if place is not None]
    updates = _updates(sides, None if start is None else states(start, checkpoint))
    if mask is not None and len(updates) > 1:
        raise SparsityError("a mask is of one update, and here are two; give --mask with one run, or with two states")
    names = [u.name for u in updates]
    if len(updates) == 2:
        _alike(updates[0].start, updates[1].start, *names)
    made: dict[str, Any] = {"dtype": dtype, "tol": tol, "updates": [_measured(u, dtype, tol, rank) for u in updates]}
    if len(updates) == 2:
        made |= _together(updates, dtype, tol)
    if mask is not None:
        made["mask"] = _written(updates[0], Path(mask), dtype, mask_tol, random)
    return made


def _updates(sides: list[States], start: States | None) -> list[States]:
    """What is measured: states that have a start and a course."""
    if start is not None:
        if start.is_run:
            raise SparsityError(f"--start {start.name} is a run, which has a start and an end; give a model there")
        ends = [(s.name, s.course[-1] if s.is_run else (0, _kept(s.start))) for s in sides]
        return [States(name, start.start, [end], start.base) for name, end in ends]
    if all(s.is_run for s in sides):
        return sides
    if len(sides) == 1:
        raise SparsityError(f"{sides[0].name} is one state; give a run, or a second state that came of this one")
    before, after = sides
    if before.is_run:
        raise SparsityError(
            f"{before.name} is a run and {after.name} one state: which is compared with which? Give two runs, two "
            f"states (RUN/checkpoints/turn-N is one), or the state first"
        )
    end = after.course[-1] if after.is_run else (0, _kept(after.start))
    return [States(f"{before.name} -> {after.name}", before.start, [end], before.base)]


def _kept(tensors: Tensors) -> Callable[[], Tensors]:
    return lambda: tensors


def _alike(reference: Tensors, new: Tensors, *names: str) -> None:
    """Refuse two sets of parameters that are not of one model, before anything is measured."""
    try:
        for _ in paired(reference, new):
            pass
    except SparsityError as error:
        error.add_note(f"The reference is {names[0]}, and the new parameters are those of {names[1]}.")
        raise


# -- measuring -----------------------------------------------------------------------------------------------------


def _measured(update: States, dtype: str, tol: float, rank: bool) -> dict[str, Any]:
    """One update: totals, networks, layers, tensors; its course, and what was changed on the way and changed back."""
    course, touched = [], {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in update.start.items()}
    found: Sparsity | None = None
    for i, (turn, read) in enumerate(update.course):
        now = read()
        _alike(update.start, now, update.name, f"turn {turn}" if turn else update.name)
        last = i == len(update.course) - 1
        found = sparsity(update.start, now, dtype, tol, rank=rank and last)
        course.append({"turn": turn, **found.total.numbers()})
        changed = changes(update.start, now, dtype, tol)
        for name, mask in changed.items():
            touched[name] |= mask
    assert found is not None
    total, ever = found.total, sum(int(t.sum()) for t in touched.values())
    made: dict[str, Any] = {
        "update": update.name,
        "turn": update.course[-1][0],
        "base": update.base,
        "total": total.numbers(),
        "without_embeddings": found.without_embeddings.numbers(),
        **({"rank": found.rank} if rank else {}),
        "networks": {name: c.numbers() for name, c in found.networks.items()},
        "layers": {name: c.numbers() for name, c in found.layers.items()},
        "tensors": {name: {"shape": list(update.start[name].shape), **c.numbers()} for name, c in
                    found.tensors.items()},
    }  # fmt: skip
    if len(course) > 1:
        made |= {"course": course, "touched": ever / total.size, "changed_back": (ever - total.changed) / total.size}
    return made


def _together(updates: list[States], dtype: str, tol: float) -> dict[str, Any]:
    """Overlap of two updates, in all and by network and layer, and how alike their ends are."""
    ends = [u.course[-1][1]() for u in updates]
    first, second = (changes(u.start, end, dtype, tol) for u, end in zip(updates, ends))

    def shared(names: Iterable[str]) -> dict[str, float]:
        return overlap({n: first[n] for n in names}, {n: second[n] for n in names}).numbers()

    def grouped(key: Callable[[str], str]) -> dict[str, dict[str, float]]:
        places = dict.fromkeys(map(key, first))
        return {place: shared([n for n in first if key(n) == place]) for place in places}

    starts = sparsity(updates[0].start, updates[1].start, "float32", 0.0).total
    return {
        "one_start": starts.moved_float32 == 0,
        "overlap": shared(first),
        "networks": grouped(lambda name: name.partition("/")[0]),
        "layers": grouped(layer_of),
        "ends": sparsity(ends[0], ends[1], dtype, tol).total.numbers(),
    }


def _written(update: States, path: Path, dtype: str, tol: float, random: int | None) -> dict[str, Any]:
    if not update.base:
        raise SparsityError(
            f"a mask belongs to the base that a run can begin from, and the start of {update.name} is none; give a "
            f"run, or model folders (`trimtab export` writes one)"
        )
    masks = changes(update.start, update.course[-1][1](), dtype, tol)
    chosen = masks if random is None else scattered(masks, random)
    about = {**update.about, "dtype": dtype, "tol": tol, "turn": update.course[-1][0], "random": random}
    digest = write_mask(path, chosen, update.base, about)
    size, n = sum(int(m.sum()) for m in masks.values()), sum(m.numel() for m in masks.values())
    return {"file": str(path), "digest": digest, "weights": size, "density": size / n, "bytes": path.stat().st_size}


# -- reading -------------------------------------------------------------------------------------------------------


def states(place: str | Path, checkpoint: str = "newest") -> States:
    """What a path or a name is. Raises SparsityError for what is nothing of the kind."""
    path = Path(place).expanduser()
    if not path.exists() and str(place) in BUILTIN:
        from trimtab.policies.builtin import load_policy

        policy = load_policy(str(place), dtype="float32")
        return States(str(place), parameters({"policy": policy}), base={"policy": base_of(policy)})
    if (path / "manifest.json").is_file():
        return States(str(place), read_checkpoint(path))
    if (path / "model.json").is_file():
        return _model(place, _networks(path))
    if path.suffix == ".safetensors" and path.is_file():
        return States(str(place), Stored.of(path, put="policy/"))
    if (path / "adapter_config.json").is_file():
        return States(str(place), Stored.of(path / "adapter_model.safetensors", put="policy/"))
    if (path / "config.json").is_file():
        if "request" in RunFolder(path).config():
            return _run(RunFolder(path), checkpoint)
        return _model(place, _language_model(path))
    raise SparsityError(f"{place} is nothing that holds parameters; give {KINDS}. {nearest_path(path)}".strip())


def _run(folder: RunFolder, checkpoint: str) -> States:
    request, end = request_of(folder), choose(folder, checkpoint)
    with closing(build(request)) as made:
        start = {name: p.cpu().clone() for name, p in parameters(made.models).items()}
        base = {name: base_of(model) for name, model in made.models.items()}
    kept = [path for path in checkpoints(folder.checkpoints) if path.name <= end.name]
    course = [(_turn(path), _reading(path, start)) for path in kept]
    return States(str(folder.path), start, course, base, {"config": _config(folder, request), "seed": request.seed})


def _config(folder: RunFolder, request: Request) -> str:
    """A digest of what the run was, wherever it lies."""
    asked = [request.method, request.policy, request.env, request.seed]
    text = json.dumps([folder.config().get("resolved"), *asked], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _reading(path: Path, start: Tensors) -> Callable[[], Tensors]:
    """The trained parameters of a checkpoint; one that is missing there shows when they are paired."""

    def read() -> Tensors:
        held = read_checkpoint(path)
        return held.named({name: name for name in held if name in start})

    return read


def _turn(path: Path) -> int:
    return int(json.loads((path / "manifest.json").read_text())["clock"]["turns"])


def read_checkpoint(path: Path) -> Stored:
    """The networks of a checkpoint, by "NETWORK/parameter". Raises CheckpointError where it is damaged."""
    file = path / "tensors.safetensors"
    try:
        recorded = json.loads((path / "manifest.json").read_text())["digests"][file.name]
        with file.open("rb") as f:
            found = hashlib.file_digest(f, "sha256").hexdigest()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from None
    if found != recorded:
        raise CheckpointError(f"{file} is damaged: its sha256 is not the recorded {recorded[:12]}")
    return Stored.of(file, "/models/")


def _model(place: str | Path, tensors: Tensors) -> States:
    """A model folder: a run may begin there."""
    networks = dict.fromkeys(key.partition("/")[0] for key in tensors)
    mine = {n: [key for key in tensors if key.startswith(f"{n}/")] for n in networks}
    base = {n: hash_of((key.removeprefix(f"{n}/"), tensors[key]) for key in keys) for n, keys in mine.items()}
    return States(str(place), tensors, base=base)


def _networks(path: Path) -> Stored:
    """The exported networks of a control run."""
    names = json.loads((path / "model.json").read_text())["networks"]
    return reduce(Stored.__or__, (Stored.of(path / f"{name}.safetensors", put=f"{name}/") for name in names))


def _language_model(path: Path) -> Stored:
    """A transformers folder: the parameters of its class, tied ones once, under the names of a policy."""
    from transformers import AutoConfig, AutoModelForCausalLM

    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise SparsityError(f"{path} holds no .safetensors file; save the model with save_pretrained")
    held = reduce(Stored.__or__, map(Stored.of, files))
    with torch.device("meta"):
        names = [n for n, _ in AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)).named_parameters()]
    lost = [name for name in names if name not in held]
    if lost:
        raise SparsityError(f"{path} lacks {lost[0]!r} ({len(lost)} of the {len(names)} parameters of its model)")
    return held.named({f"policy/model.{name}": name for name in names})
