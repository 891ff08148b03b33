"""Train only a sub-network: a mask file says which weights, and every other weight keeps its bits.

A mask file is safetensors: for each parameter, "NETWORK/name", one bit a weight, eight to a byte; and its header says
of which base it is, in which shapes, and how it was made. It may be used on that base alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from trimtab.core.batch import Batch
from trimtab.core.closure import Closure, Gradient, Params
from trimtab.core.disk import writing
from trimtab.core.errors import MethodError, TrimtabError
from trimtab.core.kit import Kit
from trimtab.core.piece import Piece, piece
from trimtab.stages.update import Logs

FORMAT = "trimtab-mask-1"
HEADER = "trimtab"  # one key: a header of several would be written in no fixed order, and its digest would not hold


class MaskError(TrimtabError):
    """A mask file cannot be read or written, or belongs to another base."""


# -- the file ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskFile:
    """A mask file, and the digest of what it held when it was named: both go into the fingerprint of a run."""

    path: str
    digest: str

    @classmethod
    def of(cls, path: str | Path) -> MaskFile:
        """Raises MaskError where there is no such file."""
        return cls(str(path), digest_of(Path(path)))

    def __repr__(self) -> str:
        return f"MaskFile({self.path!r}, sha256 {self.digest})"


def digest_of(path: Path) -> str:
    """The first 16 letters of the sha256 of a file. Raises MaskError where it cannot be read."""
    try:
        stamp = path.stat()
        return _digest(path, stamp.st_mtime_ns, stamp.st_size)
    except OSError as error:
        raise MaskError(
            f"the mask {path} cannot be read ({error.strerror}); `trimtab sparsity RUN --mask FILE` writes one"
        ) from None


@lru_cache(maxsize=32)
def _digest(path: Path, when: int, size: int) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()[:16]


def hash_of(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """A digest of named parameters in float32, so that it does not depend on the precision that holds them."""
    each = []
    for name, p in parameters:
        content = hashlib.sha256(p.detach().float().cpu().contiguous().numpy().data)
        each.append(f"{name} {list(p.shape)} {content.hexdigest()}\n")
    return hashlib.sha256("".join(sorted(each)).encode()).hexdigest()[:16]


def base_of(model: nn.Module) -> str:
    """`hash_of` every parameter of a network, the frozen ones too: they are part of what a mask was made for."""
    return hash_of(model.named_parameters())


def write_mask(path: str | Path, masks: Mapping[str, Tensor], base: Mapping[str, str], about: Mapping[str, Any]) -> str:
    """Write masks ("NETWORK/name" -> bool tensor) to a file; returns its digest. The same mask gives the same bytes.

    base: network -> `base_of` what the mask is for. about: how it was made, kept as it is (config, seed, dtype, ...).
    Raises MaskError where a file of other content is there already, DiskError where none can be written.
    """
    path = Path(path)
    header = {"format": FORMAT, "base": dict(base), "shapes": {n: list(m.shape) for n, m in masks.items()}, **about}
    packed = {n: torch.from_numpy(np.packbits(m.detach().cpu().numpy().reshape(-1))) for n, m in masks.items()}
    content = save(packed, metadata={HEADER: json.dumps(header, sort_keys=True)})
    if path.exists() and path.read_bytes() != content:
        raise MaskError(f"{path} is there already and holds something else; give another file, or remove that one")
    with writing(path, len(content)):
        path.parent.mkdir(parents=True, exist_ok=True)
        work = path.with_name(f".writing-{path.name}")
        work.write_bytes(content)
        work.rename(path)
    return hashlib.sha256(content).hexdigest()[:16]


def read_header(path: str | Path) -> dict[str, Any]:
    """What a mask file says of itself. Raises MaskError for a file that is none."""
    try:
        with safe_open(path, "pt") as f:
            header: dict[str, Any] = json.loads((f.metadata() or {}).get(HEADER, "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise MaskError(f"{path} cannot be read as a mask: {error}") from None
    if header.get("format") != FORMAT:
        raise MaskError(
            f"{path} is no mask of this version ({FORMAT}); `trimtab sparsity RUN --mask FILE` writes one, and a model "
            f"is none"
        )
    return header


def read_mask(path: str | Path, network: str) -> dict[str, Tensor]:
    """The masks of one network, by parameter name, bool. Raises MaskError for a file that is none, or damaged."""
    header, made = read_header(path), {}
    with safe_open(path, "pt") as f:
        for key in f.keys():  # noqa: SIM118  it is no mapping
            owner, _, name = key.partition("/")
            if owner != network:
                continue
            shape, bits = header["shapes"][key], f.get_tensor(key)
            count = int(np.prod(shape, dtype=np.int64))
            if len(bits) != -(-count // 8):
                raise MaskError(f"{path} is damaged: {key!r} has {len(bits)} bytes for {count} weights")
            made[name] = torch.from_numpy(np.unpackbits(bits.numpy(), count=count)).bool().view(shape)
    return made


# -- the update ----------------------------------------------------------------------------------------------------


@dataclass
class Chosen:
    """Which weights of a network are trained. A checkpoint holds nothing of it: the file's digest is in the method."""

    masks: dict[str, Tensor] = field(default_factory=dict)

    @property
    def density(self) -> float:
        return sum(int(m.sum()) for m in self.masks.values()) / sum(m.numel() for m in self.masks.values())

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        """Nothing was saved."""


def choose(kit: Kit, options: Mapping[str, Any]) -> Chosen:
    """The masks of the track's network; without a file every weight. Raises MaskError where they do not fit."""
    if sum(p.name == "masked" for p in kit.method.track(kit.scope).update.walk()) > 1:
        raise MethodError(
            f"the update of track {kit.scope!r} has two masks, and one of them would be ignored; make one mask of them"
        )
    trained, file = kit.trained(kit.model), options["mask"]
    if file is None:
        return Chosen({name: torch.ones((), dtype=torch.bool, device=p.device).expand(p.shape) for name, p in
                       trained.items()})  # fmt: skip
    return Chosen(fitting(file, kit.model, kit.models[kit.model], trained))


def fitting(file: MaskFile, network: str, model: nn.Module, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks of a file for a network, checked: file, base, names and shapes."""
    if digest_of(Path(file.path)) != file.digest:
        raise MaskError(f"{file.path} has changed since it was named: its sha256 is not {file.digest} any more")
    base = read_header(file.path)["base"]
    if network not in base:
        raise MaskError(
            f"{file.path} holds masks of {', '.join(sorted(base))} and none of {network!r}, which this method trains; "
            f"make the mask of a run of the same method"
        )
    masks, mine = read_mask(file.path, network), base_of(model)
    for name in [*trained, *masks]:
        there = [list(where[name].shape) if name in where else None for where in (trained, masks)]
        if there[0] != there[1]:
            said = ["is not there" if s is None else f"has shape {s}" for s in there]
            raise MaskError(f"{file.path} is for another network: {name!r} {said[0]} in {network!r}, {said[1]} in it")
    if base[network] != mine:
        raise MaskError(
            f"{file.path} was made for {network!r} as it was at the start of its run (sha256 {base[network]}), and "
            f"here it starts as {mine}. A mask belongs to its base: start from the same policy, with the same seed "
            f"where its weights are drawn by it."
        )
    return {name: masks[name].to(p.device) for name, p in trained.items()}


class MaskedClosure:
    """A closure whose gradients are zero off the masks; everything else of it is as it was.

    `norm` of what it gives stays that of the whole gradient, so that clipping by it shortens as it would have without
    a mask. seen: the norm of what was left of every gradient asked for, in order.
    """

    def __init__(self, closure: Closure, masks: Mapping[str, Tensor]) -> None:
        self._closure, self._masks = closure, masks
        self.seen: list[Tensor] = []

    def __call__(
        self, params: Params | None = None, where: Tensor | None = None, create_graph: bool = False
    ) -> Gradient:
        made = self._closure(params, where, create_graph)
        zero = next(iter(made.grads.values())).new_zeros(())
        left = replace(made, grads={name: torch.where(self._masks[name], g, zero) for name, g in made.grads.items()})
        self.seen.append(left.norm.detach())
        vars(left)["norm"] = made.norm  # in the place of the one that was computed
        return left

    def anew(self, rows: Batch) -> MaskedClosure:
        """The same on other rows; what is left of its gradients is seen here."""
        made = MaskedClosure(self._closure.anew(rows), self._masks)
        made.seen = self.seen
        return made

    def __getattr__(self, name: str) -> Any:  # params, terms, micro, batch, kit, ...
        return getattr(self._closure, name)


def _named_file(options: Mapping[str, Any]) -> str | None:
    mask = options["mask"]
    if mask is None or isinstance(mask, MaskFile):
        return None
    return f"mask={mask!r} is not a mask file with its digest; write subnetwork(mask={mask!r}), which reads it"


@piece("update", state={"subnetwork": choose}, validate=_named_file, one_gradient=True)
def masked(
    kit: Kit, closure: Closure, *, inner: Callable[..., tuple[Logs, bool]], mask: MaskFile | None = None
) -> tuple[Logs, bool]:
    """A wrap, see `subnetwork`: `g <- m g` for every gradient that is asked for, and `theta <- m theta_new + (1 - m)
    theta_old` after the step, by choice and not by arithmetic, so that what is not chosen keeps its bits."""
    chosen: Chosen = kit.state["subnetwork"]
    old = {name: p.detach().clone() for name, p in closure.params.items()}
    inside = MaskedClosure(closure, chosen.masks)
    logs, stop = inner(inside)
    with torch.no_grad():
        for name, start in old.items():
            parameter = closure.params[name]
            parameter.copy_(torch.where(chosen.masks[name], parameter, start))
    logs = {**logs, "subnetwork": 1.0 if mask is None else chosen.density}
    return ({**logs, "grad_norm_inside": torch.stack(inside.seen).mean()} if inside.seen else logs), stop


def subnetwork(mask: str | Path | MaskFile | None = None) -> Piece:
    """A wrap of an update: train only the weights that a mask file chooses (`method.wrap("update", subnetwork(FILE))`).

    Gradients are zero off the mask, after clipping by the norm of the whole gradient; moments then stay zero there.
    Whatever the update does to the other weights all the same (decay, a direction that it differentiates itself) is
    undone, to the bit. Logs `subnetwork`, the share of weights that is trained, and `grad_norm_inside`, the norm of
    what is left of the gradient; `grad_norm` stays that of all of it.
    mask: a file that `trimtab sparsity RUN --mask FILE` has written, for the network and the base that this run starts
    from; its digest becomes part of the method. None chooses every weight, and is bitwise the update inside.

    Raises MaskError for a file that cannot be read, when named, and that does not fit, when the run begins. Source:
    arXiv 2505.11711, conjecture 1; the order of clipping and the decay are ours, the paper does not say.
    """
    return masked(mask=mask if mask is None or isinstance(mask, MaskFile) else MaskFile.of(mask))
