"""The networks of an earlier run, for another one to begin with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from trimtab.core.errors import MethodError
from trimtab.core.method import Method, show
from trimtab.core.network import Network

ABOUT, ACTING = "model.json", "acting"
MOMENTS = "obs_moments"  # of the piece `normalised_obs`
NOT_OF_THE_NUMBERS = ("matmul",)  # options that a network may have otherwise than the one it begins as


@dataclass(frozen=True)
class Start:
    """A model folder of the control world, read. about: its `model.json`. networks: tensors by network and name.

    acting: what the policy reads beside its parameters, by `key/name`. name: what the user called it. digest: of every
    file, so another digest is another start.
    """

    name: str
    folder: Path
    about: Mapping[str, Any]
    networks: Mapping[str, Mapping[str, Tensor]]
    acting: Mapping[str, Tensor]
    digest: str

    def taken(self, method: Method) -> list[str]:
        """The networks of a method that are begun with, in its order."""
        return [name for name in wanted(method) if name in self.networks]

    def moments(self) -> dict[str, Any]:
        """The state of the moments of observations; {} where the policy saw them raw."""
        head = f"{MOMENTS}/"
        found = {key.removeprefix(head): t.clone() for key, t in self.acting.items() if key.startswith(head)}
        return {**found, "count": float(found["count"])} if found else {}

    def said(self, method: Method) -> str:
        """Which networks begin with what, as one sentence."""
        taken = self.taken(method)
        anew = [name for name in wanted(method) if name not in taken]
        left = [name for name in self.networks if name not in taken]
        about = self.about
        made = f"{_listed(taken)} {_begin(taken)} as in {self.name} ({about['method']} on {about['environment']}, turn "
        made += f"{about['turns']:,})" + (", with its moments of observations" if self.moments() else "")
        made += f"; {_listed(anew)} {_begin(anew)} anew" if anew else ""
        return made + (f"; {_listed(left)} of it {'is' if len(left) == 1 else 'are'} left out" if left else "") + "."


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _begin(names: list[str]) -> str:
    return "begins" if len(names) == 1 else "begin"


def wanted(method: Method) -> dict[str, Network]:
    """The networks of a method and of all its phases. Raises MethodError where two phases disagree."""
    named: dict[str, Network] = {}
    for m in (method, *(p.method for p in method.phases)):
        for name, network in m.networks.items():
            if named.setdefault(name, network) != network:
                raise MethodError(f"network {name!r} is {named[name]} in one phase and {network} in another")
    return named


def described(method: Method, environment: Any) -> dict[str, Any]:
    """What `model.json` says of the networks, so that another run can tell whether they are its own kind."""
    return {
        "networks": {name: _facts(network) for name, network in wanted(method).items()},
        "spaces": spaces_of(environment),
        "normalised": normalised(method),
    }


def spaces_of(environment: Any) -> dict[str, str]:
    return {"observation": str(environment.observation_space), "action": str(environment.action_space)}


def normalised(method: Method) -> float | None:
    """How far from 0 the policy sees a normalised observation; None where it sees them raw."""
    now = method.phases[0].method if method.phases else method
    clips = [p.options["clip"] for p in now.pieces if p.stage == "act" and p.name == "normalised_obs"]
    return float(clips[0]) if clips else None


def _facts(network: Network) -> dict[str, str]:
    rows = replace(network, start="").flatten("kind")
    return {k.removeprefix("kind."): show(v) for k, v in rows.items() if k not in _SKIPPED}


_SKIPPED = tuple(f"kind.{name}" for name in NOT_OF_THE_NUMBERS)


# -- reading ---------------------------------------------------------------------------------------------------------


def read_start(path: str | Path, name: str = "") -> Start:
    """The model of a run folder (or a model folder itself). name: what to call it; by default the path.

    Raises MethodError where there is none, where it is not of the control world, or where its files are damaged.
    """
    given, name = Path(path).expanduser(), name or str(path)
    if not given.is_dir():
        raise MethodError(
            f"--policy {name}: a control method begins with the networks of an earlier run, and there is no such "
            f"folder; give the folder of a run, or leave it out to begin anew"
        )
    folder = given / "model" if (given / "model").is_dir() else given
    if not (folder / ABOUT).is_file():
        if (given / "config.json").is_file() and (given / "checkpoints").is_dir():
            raise MethodError(
                f"--policy {name}: that run has no model yet; finish it with: trimtab resume {name} (or write the one "
                f"of its newest checkpoint with trimtab export {name}, and give that folder)"
            )
        raise MethodError(f"--policy {name} holds no model of a control run: there is no {folder / ABOUT}")
    try:
        about = json.loads((folder / ABOUT).read_bytes())
        networks = {n: load_file(folder / f"{n}.safetensors") for n in about["networks"]}
        acting = load_file(folder / f"{ACTING}.safetensors") if (folder / f"{ACTING}.safetensors").is_file() else {}
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise MethodError(f"--policy {name}: {folder} is damaged ({type(error).__name__}: {error})") from error
    if not {"spaces", "normalised", "turns"} <= set(about):
        raise MethodError(f"--policy {name} was written by an earlier version; write it again: trimtab export {name}")
    return Start(name, folder, about, networks, acting, _digest(folder, about))


def _digest(folder: Path, about: Mapping[str, Any]) -> str:
    made = hashlib.sha256()
    for name in (ABOUT, *(f"{n}.safetensors" for n in (*sorted(about["networks"]), ACTING))):
        if (folder / name).is_file():
            made.update(name.encode() + b"\0" + (folder / name).read_bytes())
    return made.hexdigest()[:16]


# -- fitting ---------------------------------------------------------------------------------------------------------


def started(method: Method, start: Start) -> Method:
    """The method with the digest of what its networks begin with: part of its fingerprint.

    Every network of that name is taken; what the earlier run has not begins anew. Raises MethodError where it has no
    policy, where networks of one name are different ones, or where observations are normalised in one of them only.
    """
    mine = wanted(method)
    if "policy" not in mine or "policy" not in start.networks:
        who = method.name if "policy" not in mine else start.name
        raise MethodError(f"{who} has no network called 'policy', so nothing can begin with that of {start.name}")
    for name in start.taken(method):
        _alike(name, _facts(mine[name]), start.about["networks"][name], method, start)
    here, there = normalised(method), start.about["normalised"]
    if here != there:
        words = [f"observations {'raw' if c is None else f'normalised, at most {c:g} from 0'}" for c in (there, here)]
        raise MethodError(
            f"the policy of {start.name} saw {words[0]}, and that of {method.name} sees {words[1]}; let both see the "
            f"same (ppo(normalise_obs=...), --set normalised_obs.clip=...)"
        )
    if method.phases:
        return method.each(lambda _, inside: _with_digest(inside, start))
    return _with_digest(method, start)


def _with_digest(method: Method, start: Start) -> Method:
    taken = {n: replace(w, start=start.digest) for n, w in method.networks.items() if n in start.networks}
    return method.but(networks=taken)


def _alike(name: str, mine: Mapping[str, str], theirs: Mapping[str, str], method: Method, start: Start) -> None:
    if theirs.get("kind") != mine["kind"]:  # then the rest of it is not comparable
        mine, theirs = {"kind": mine["kind"]}, {"kind": theirs.get("kind", "unknown")}
    if odd := _apart(theirs, mine):
        raise MethodError(
            f"the network {name!r} of {start.name} ({start.about['method']}) is another one than that of "
            f"{method.name}: {'; '.join(odd)}. Make them alike, or begin anew without --policy"
        )


def _apart(there: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    both = {k: (there.get(k, "absent"), here.get(k, "absent")) for k in {**there, **here}}
    return [f"{k} is {x} there and {y} here" for k, (x, y) in both.items() if x != y]


def check_spaces(environment: Any, start: Start) -> None:
    """Raise MethodError where the earlier run acted in another space."""
    mine, theirs = spaces_of(environment), start.about["spaces"]
    for kind in mine:
        if mine[kind] != theirs[kind]:
            raise MethodError(
                f"the networks of {start.name} are made for the {kind} space {theirs[kind]} of "
                f"{start.about['environment']}, and that of {environment.spec} is {mine[kind]}; they can only go on "
                f"where spaces are the same"
            )


def fill(name: str, network: Network, module: nn.Module, start: Start | None) -> None:
    """Give a network the numbers that it is to begin with. Raises MethodError where they are not the ones named."""
    given = start.digest if start is not None and name in start.networks else ""
    if network.start != given:
        raise MethodError(
            f"network {name!r} is to begin {'with ' + network.start if network.start else 'anew'}, and is given "
            f"{given or 'nothing'}; read the start named with read_start, and mark the method with started"
        )
    if start is None or not given:
        return
    mine, theirs = module.state_dict(), start.networks[name]
    shapes = [{k: str(list(t.shape)) for k, t in tensors.items()} for tensors in (theirs, mine)]
    if odd := _apart(*shapes):
        raise MethodError(f"the network {name!r} of {start.name} does not fit: {'; '.join(odd)}")
    module.load_state_dict({k: t.clone() for k, t in theirs.items()})
