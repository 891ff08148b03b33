"""How much of a network an update has changed, as its weights are stored: sparsity, rank, overlap.

In exact arithmetic nearly every weight moves in nearly every update. Stored in bfloat16, a change below half the
distance to the next number disappears: that is the sparsity reported for fine-tuned language models, so what float32
shows is always measured beside it. Mukherjee, Yuan, Hakkani-Tur and Peng 2025, arXiv 2505.11711.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from trimtab.core.batch import Batch
from trimtab.core.errors import TrimtabError, nearest
from trimtab.core.kit import Kit
from trimtab.core.piece import piece

TOL = 1e-5  # the paper's: of what is stored, counts as equal
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
RELATIVE = (1e-4, 1e-3, 1e-2)  # tolerances in units of a tensor's root mean square
CHUNK = 2**22  # numbers compared at once: 32 MiB in float64

Tensors = Mapping[str, Tensor]


class SparsityError(TrimtabError):
    """Two sets of parameters cannot be compared, or an option of the comparison is none."""


def parameters(models: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """What the networks learn, by "NETWORK/parameter": no buffers, nothing frozen, tied weights once; not copied."""
    return {f"{m}/{n}": p.detach() for m, net in models.items() for n, p in net.named_parameters() if p.requires_grad}


# -- what has changed ----------------------------------------------------------------------------------------------


def paired(reference: Tensors, new: Tensors) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, before, after) of every tensor, one that is tied to an earlier one on both sides left out.

    Raises SparsityError, naming the tensor, where one is missing, of another shape, or no floating-point number.
    """
    for here, there, side in ((reference, new, "new parameters"), (new, reference, "reference")):
        lost = [name for name in here if name not in there]
        if lost:
            raise SparsityError(
                f"{lost[0]!r} is not among the {side} ({len(lost)} of {len(here)} are not); a comparison leaves out "
                f"nothing. Compare two states of one model. {nearest(lost[0], there)}"
            )
    held = isinstance(reference, dict) and isinstance(new, dict)  # what is read anew each time is tied to nothing
    seen: set[tuple[int, ...]] = set()
    for name, before in reference.items():
        after = new[name]
        if before.shape != after.shape:
            raise SparsityError(
                f"{name!r} has shape {list(before.shape)} in the reference and {list(after.shape)} in the new "
                f"parameters; compare two states of one model"
            )
        if not (before.is_floating_point() and after.is_floating_point()):
            raise SparsityError(f"{name!r} holds {before.dtype} and {after.dtype}, not floating-point numbers")
        if not before.numel():
            continue
        places = (before.data_ptr(), after.data_ptr(), before.storage_offset(), *before.shape)
        if not held or places not in seen:
            seen.add(places)
            yield name, before, after


def changes(reference: Tensors, new: Tensors, dtype: str = "bfloat16", tol: float = 0.0) -> dict[str, Tensor]:
    """Where each tensor has changed, bool: `|cast(new) - cast(reference)| > tol`. Options as for `sparsity`."""
    view, tol = _view(dtype), _tolerance(tol)
    return {
        name: torch.cat([distance(a, b, view) > tol for a, b in _chunks(name, before, after)]).view(before.shape)
        for name, before, after in paired(reference, new)
    }


def distance(before: Tensor, after: Tensor, view: torch.dtype) -> Tensor:
    """`|after - before|` in float64, of what is left of both when they are stored as `view`; subtracted in float32."""
    return (after.to(view).float() - before.to(view).float()).double().abs()


def _chunks(name: str, before: Tensor, after: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    there = after.detach().to(before.device)
    for a, b in zip(before.detach().reshape(-1).split(CHUNK), there.reshape(-1).split(CHUNK)):
        if not bool(torch.isfinite(a).all() & torch.isfinite(b).all()):
            raise SparsityError(f"{name!r} holds numbers that are not finite, which are neither equal nor different")
        yield a, b


def _view(dtype: str) -> torch.dtype:
    if dtype not in DTYPES:
        raise SparsityError(
            f"dtype={dtype!r} is no precision that weights are stored in here. {nearest(dtype, DTYPES)}"
        )
    return DTYPES[dtype]


def _tolerance(tol: float) -> float:
    if not 0 <= tol < math.inf:
        raise SparsityError(
            f"tol={tol!r} must be a number of at least 0: how far apart two weights may be and be equal"
        )
    return tol


# -- how much ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Count:
    """So many weights, and how many of them differ; counts of several tensors add up.

    size: weights. changed: by more than the tolerance, as stored. visible: at all, as stored. changed_float32,
    moved_float32: the same in float32. beyond: for each of `RELATIVE`, by more than that many root mean squares of
    their tensor, in float32. rank: the rank of the stored difference, where it was asked for. full: the largest it
    could have.
    """

    size: int = 0
    changed: int = 0
    visible: int = 0
    changed_float32: int = 0
    moved_float32: int = 0
    beyond: tuple[int, ...] = (0,) * len(RELATIVE)
    rank: int = 0
    full: int = 0

    def __add__(self, other: Count) -> Count:
        made = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if f.name != "beyond"}
        return Count(**made, beyond=tuple(a + b for a, b in zip(self.beyond, other.beyond)))

    def share(self, what: str = "changed") -> float:
        """The share of weights that did *not* differ in this sense; nan of no weights."""
        return 1 - getattr(self, what) / self.size if self.size else math.nan

    @property
    def sparsity(self) -> float:
        """The share of weights that are equal, as stored, within the tolerance."""
        return self.share()

    def numbers(self) -> dict[str, float]:
        """Every share, by name, for a table or a file."""
        made = {
            "weights": self.size,
            "sparsity": self.share(),
            "unchanged": self.share("visible"),
            "sparsity_float32": self.share("changed_float32"),
            "unchanged_float32": self.share("moved_float32"),
        }
        for level, n in zip(RELATIVE, self.beyond):
            made[f"within_{level:g}_rms"] = 1 - n / self.size if self.size else math.nan
        return made | ({"rank": self.rank / self.full} if self.full else {})


@dataclass(frozen=True)
class Sparsity:
    """An update, tensor by tensor. dtype, tol: how it was looked at."""

    tensors: dict[str, Count]
    dtype: str
    tol: float

    @property
    def total(self) -> Count:
        """All weights; larger tensors count for more."""
        return sum(self.tensors.values(), Count())

    @property
    def layers(self) -> dict[str, Count]:
        """By layer, in order."""
        return self._grouped(layer_of)

    @property
    def networks(self) -> dict[str, Count]:
        """By network, where names are "NETWORK/parameter"."""
        return self._grouped(lambda name: name.partition("/")[0])

    @property
    def without_embeddings(self) -> Count:
        """All weights but embeddings: rows of tokens that never occur have no gradient, and so look sparse."""
        return sum((c for name, c in self.tensors.items() if not is_embedding(name)), Count())

    @property
    def rank(self) -> float:
        """The mean over matrices of `rank / min(shape)`; nan where no rank was asked for, or there is no matrix."""
        shares = [c.rank / c.full for c in self.tensors.values() if c.full]
        return sum(shares) / len(shares) if shares else math.nan

    def _grouped(self, key: Callable[[str], str]) -> dict[str, Count]:
        made: dict[str, Count] = {}
        for name, c in self.tensors.items():
            place = key(name)
            made[place] = made.get(place, Count()) + c
        return made


def sparsity(
    reference: Tensors, new: Tensors, dtype: str = "bfloat16", tol: float = TOL, *, rank: bool = False
) -> Sparsity:
    """How much of `reference` is still there in `new`: `1 - #{i: |new_i - reference_i| > tol} / n`.

    Both sides are cast to `dtype` first, subtracted in float32 and compared in float64; a difference of exactly tol is
    equal. (The released script subtracts in bfloat16: that rounds a difference, never one that is zero, so only
    results with tol > 0 can differ, by a hair.) tol acts on small weights alone: from 2^-9 on, one step of bfloat16 is
    more than 1e-5.
    dtype: bfloat16, float16 or float32; what float32 shows is always counted beside it. tol: >= 0, absolute. rank:
    also the rank of every difference that is a matrix and no norm, which takes a singular value decomposition each.

    Raises SparsityError, naming the tensor, for one that is missing, of another shape, or not finite, and for an
    unknown dtype or a negative tol. Source: arXiv 2505.11711, section 3 and its released analysis.
    """
    view, tol = _view(dtype), _tolerance(tol)
    counts = {name: _count(name, a, b, view, tol, rank) for name, a, b in paired(reference, new)}
    return Sparsity(counts, dtype, tol)


def _count(name: str, before: Tensor, after: Tensor, view: torch.dtype, tol: float, rank: bool) -> Count:
    scale = float(before.detach().double().square().mean().sqrt())
    made = Count()
    for a, b in _chunks(name, before, after):
        stored, exact = distance(a, b, view), distance(a, b, torch.float32)
        made += Count(
            size=a.numel(),
            changed=int((stored > tol).sum()),
            visible=int((stored > 0).sum()),
            changed_float32=int((exact > tol).sum()),
            moved_float32=int((exact > 0).sum()),
            beyond=tuple(int((exact > level * scale).sum()) for level in RELATIVE),
        )
    if rank and before.dim() == 2 and "norm" not in name:
        delta = after.detach().to(before.device, view).float() - before.detach().to(view).float()
        made += Count(rank=int(torch.linalg.matrix_rank(delta)), full=min(delta.shape))
    return made


def layer_of(name: str) -> str:
    """The layer that a parameter belongs to: its name up to the first number, or without its last word."""
    found = re.match(r"(.*?\.\d+)(?=\.)", name)
    return found[1] if found else name.rpartition(".")[0] or name


def is_embedding(name: str) -> bool:
    """Whether a parameter is a table of embeddings, by its name."""
    return re.search(r"embed|\bwte\b|\bwpe\b", name) is not None


# -- two updates ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Overlap:
    """Two sets of changed weights among n: first, second, both are how many are in each."""

    first: int
    second: int
    both: int
    n: int

    @property
    def o1(self) -> float:
        """`|I1 & I2| / |I1|`; nan where the first set is empty."""
        return self.both / self.first if self.first else math.nan

    @property
    def o2(self) -> float:
        """`|I1 & I2| / |I2|`; nan where the second set is empty."""
        return self.both / self.second if self.second else math.nan

    def numbers(self) -> dict[str, float]:
        """o1, o2, and what each would be by chance: the density of the other set."""
        chance = (self.second / self.n, self.first / self.n) if self.n else (math.nan, math.nan)
        return {"o1": self.o1, "o2": self.o2, "chance_o1": chance[0], "chance_o2": chance[1]}


def overlap(first: Tensors, second: Tensors) -> Overlap:
    """How much two masks (as `changes` makes them) have in common.

    Raises SparsityError, naming the tensor, where one is missing or of another shape.
    """
    if first.keys() != second.keys():
        name = sorted(first.keys() ^ second.keys())[0]
        raise SparsityError(f"{name!r} is in one of the two masks alone; an overlap is of two updates of one model")
    for name, mask in first.items():
        if mask.shape != second[name].shape:
            raise SparsityError(
                f"{name!r} has shape {list(mask.shape)} in one mask and {list(second[name].shape)} in the other"
            )
    pairs = [(a, second[name]) for name, a in first.items()]
    sizes = ((int(a.sum()), int(b.sum()), int((a & b).sum()), a.numel()) for a, b in pairs)
    return Overlap(*(sum(column) for column in zip(*sizes))) if pairs else Overlap(0, 0, 0, 0)


def scattered(masks: Tensors, seed: int) -> dict[str, Tensor]:
    """Random masks with as many weights in every tensor: what a sub-network is to be compared with."""
    rng = torch.Generator().manual_seed(seed)
    made = {}
    for name, mask in masks.items():
        flat = torch.zeros(mask.numel(), dtype=torch.bool)
        flat[torch.randperm(mask.numel(), generator=rng)[: int(mask.sum())]] = True
        made[name] = flat.view(mask.shape)
    return made


# -- during a run --------------------------------------------------------------------------------------------------


def as_it_began(kit: Kit, options: Mapping[str, object]) -> dict[str, Tensor]:
    """The trained parameters at the start of the run."""
    return {name: p.detach().clone() for name, p in kit.trained(kit.model).items()}


def _sane(options: Mapping[str, object]) -> str | None:
    every = options["every"]
    return None if isinstance(every, int) and every >= 1 else f"every={every!r} must be a whole number of turns, >= 1"


@piece("probe", state={"began": as_it_began}, validate=_sane)
def update_sparsity(kit: Kit, batch: Batch, *, every: int = 10, dtype: str = "bfloat16", tol: float = TOL) -> Batch:
    """Every so many turns, `sparsity` of the track's network against the start of the run.

    Logs `sparsity` (as stored in `dtype`, within `tol`) and `unchanged_float32` (any change in float32), under the
    track's name where there are several. Holds, and saves, one more copy of the parameters.
    """
    if kit.clock.turns % every:
        return batch
    found = sparsity(kit.state["began"], kit.trained(kit.model), dtype, tol).total
    prefix = f"{kit.scope}/" if len(kit.method.tracks) > 1 else ""
    kit.log(f"{prefix}sparsity", found.sparsity)
    kit.log(f"{prefix}unchanged_float32", found.share("moved_float32"))
    return batch
