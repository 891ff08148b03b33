"""A claim is a value: what a paper says, the arms that test it, and where the effect must lie for it to hold."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trimtab import __version__
from trimtab.claims.statistics import ClaimError, Effect, Kind, paired_effect
from trimtab.core.errors import TrimtabError, nearest
from trimtab.core.method import Method
from trimtab.report.lock import FolderLock

VERDICTS = ("holds", "does not hold", "inconclusive")
RUNS = Path("runs/claims")
Region = tuple[float, float]


def above(threshold: float) -> Region:
    """The effect is larger than this."""
    return threshold, math.inf


def below(threshold: float) -> Region:
    """The effect is smaller than this."""
    return -math.inf, threshold


def within(low: float, high: float) -> Region:
    """The effect lies between these: a claim that something makes no difference."""
    return low, high


@dataclass(frozen=True)
class Arm:
    """One thing that is run. what: in words. make: `seed -> Method`; most make the same method for every seed."""

    what: str
    make: Callable[[int], Method]


@dataclass(frozen=True)
class Part:
    """One sentence of a claim that can turn out false, with the arms that decide it.

    says: the sentence. metric: which of the study's numbers. method, baseline: the arms whose paired effect is taken.
    controls: at least one matched arm, which says what else the effect could be due to. region: where the effect must
    lie for the sentence to hold (`above`, `below`, `within`). kind: "difference" (method - baseline) or "ratio".
    curve: a number measured along the way under `curve@turn`; its means over seeds are published beside, for a picture.
    """

    says: str
    metric: str
    method: str
    baseline: str
    controls: tuple[str, ...]
    region: Region
    kind: Kind = "difference"
    curve: str = ""

    def arms(self) -> dict[str, str]:
        """arm -> its role."""
        return {self.baseline: "baseline", self.method: "method", **dict.fromkeys(self.controls, "control")}


@dataclass(frozen=True)
class Study:
    """Arms, how one of them is measured, and what is read off.

    measure: `(method, seed) -> {metric: number}`, a function of its arguments alone, so that a pair of arms with one
    seed is a pair. seeds: how many by default. about: settings of `measure` that a fingerprint must see.
    """

    arms: Mapping[str, Arm]
    parts: tuple[Part, ...]
    measure: Callable[[Method, int], Mapping[str, float]]
    seeds: int
    about: str = ""

    def __post_init__(self) -> None:
        for part in self.parts:
            roles = part.arms()
            unknown = [name for name in roles if name not in self.arms]
            if unknown:
                raise ClaimError(f"{part.says!r} names the arm {unknown[0]!r}. {nearest(unknown[0], self.arms)}")
            if not part.controls or len(roles) != 2 + len(part.controls):
                raise ClaimError(f"{part.says!r} needs a method, a baseline and a control, all different")
            if not part.region[0] < part.region[1]:
                raise ClaimError(f"{part.says!r} asks for an effect in {part.region}, which is empty")

    def used(self) -> list[str]:
        """The arms that some part names, in written order."""
        named = {name for part in self.parts for name in part.arms()}
        return [name for name in self.arms if name in named]


@dataclass(frozen=True)
class Claim:
    """What a paper says about one method, in our words, and how it is put to the test.

    mechanism: the smallest problem on which the effect can be seen or fail, minutes at most. full: its effect on a
    small language model, in the background.
    """

    method: str
    statement: str
    mechanism: Study
    full: Study


@dataclass(frozen=True)
class Record:
    """One arm with one seed, measured: a line of `runs/claims/NAME/full.jsonl`. seconds: of the processor."""

    arm: str
    seed: int
    fingerprint: str
    values: Mapping[str, float]
    seconds: float


def verdict(effect: Effect, region: Region) -> str:
    """ "holds" if the interval lies inside the region, "does not hold" if outside it, else "inconclusive"."""
    if region[0] < effect.low and effect.high < region[1]:
        return "holds"
    if effect.high <= region[0] or effect.low >= region[1]:
        return "does not hold"
    return "inconclusive"


def measure(
    claim: Claim,
    *,
    seeds: int | None = None,
    full: bool = False,
    say: Callable[[str], None] = lambda line: None,
    folder: Path = RUNS,
) -> list[dict[str, Any]]:
    """Run a claim's study and return one row per part (see `row`), whatever the verdicts.

    seeds: how many, 0, 1, ... (default: the study's). full: the effect on a small language model instead of the
    mechanism; its records go to `folder/NAME/full.jsonl` as they are made, and those that are there already under the
    same fingerprint (method, settings, versions), or in another claim's file, are not measured again. say: is told each
    arm and seed.
    Raises `ClaimError` for fewer than 2 seeds.
    """
    study = claim.full if full else claim.mechanism
    count = study.seeds if seeds is None else seeds
    if count < 2:
        raise ClaimError(f"seeds={count}: one seed says nothing about the spread; give 2 or more")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that a published number does not depend on how many cores were idle
    try:
        records = _resumed(claim, study, count, say, folder) if full else _measured(study, count, say)
    finally:
        torch.set_num_threads(threads)
    scope = "full" if full else "mechanism"
    return [row(claim, study, i, records, count, scope) for i in range(len(study.parts))]


def row(claim: Claim, study: Study, index: int, records: Sequence[Record], seeds: int, scope: str) -> dict[str, Any]:
    """What one part came to, as plain JSON values.

    method, claim, part ("a", "b", ...), scope, metric, arms (`name -> role, what, mean, std, seconds, values`), effect,
    effect_is, low, high, interval, region ([low, high], None for unbounded), detectable, verdict, seeds, seconds,
    statement, versions.
    """
    part = study.parts[index]
    values = {name: [r.values[part.metric] for r in records if r.arm == name] for name in part.arms()}
    effect = paired_effect(values[part.method], values[part.baseline], part.kind)
    arms = {
        name: {
            "role": role,
            "what": study.arms[name].what,
            "mean": float(np.mean(values[name])),
            "std": float(np.std(values[name], ddof=1)),
            "seconds": round(sum(r.seconds for r in records if r.arm == name), 1),
            "values": values[name],
            **_curve(part.curve, [r for r in records if r.arm == name]),
        }
        for name, role in part.arms().items()
    }
    return {
        "method": claim.method,
        "claim": part.says,
        "part": "abcdefghijklmnopqrstuvwxyz"[index],
        "scope": scope,
        "metric": part.metric,
        "arms": arms,
        "effect": effect.value,
        "effect_is": f"{part.method} {'-' if part.kind == 'difference' else '/'} {part.baseline}",
        "low": effect.low,
        "high": effect.high,
        "interval": effect.how,
        "region": [None if math.isinf(limit) else limit for limit in part.region],
        "detectable": effect.detectable,
        "verdict": verdict(effect, part.region),
        "seeds": seeds,
        "seconds": round(sum(r.seconds for r in records if r.arm in values), 1),
        "statement": claim.statement,
        "versions": versions(),
    }


def _curve(name: str, records: Sequence[Record]) -> dict[str, Any]:
    """`{"curve": [[turn, mean over seeds], ...]}` of what was measured along the way; nothing where no curve is."""
    if not name:
        return {}
    turns = sorted(int(key.partition("@")[2]) for key in records[0].values if key.startswith(f"{name}@"))
    return {"curve": [[t, round(float(np.mean([r.values[f"{name}@{t}"] for r in records])), 4)] for t in turns]}


def versions() -> dict[str, str]:
    """What a number depends on besides the settings."""
    return {"trimtab": __version__, "torch": torch.__version__, "numpy": np.__version__}


def fingerprint(study: Study, method: Method) -> str:
    """A digest of everything that a record depends on but its seed."""
    text = json.dumps([method.fingerprint(), study.about, versions()])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# -- measuring ---------------------------------------------------------------------------------------------------


def _measured(study: Study, seeds: int, say: Callable[[str], None]) -> list[Record]:
    return [_one(study, name, seed, say) for name in study.used() for seed in range(seeds)]


def _one(study: Study, name: str, seed: int, say: Callable[[str], None]) -> Record:
    started = time.process_time()
    try:
        method = study.arms[name].make(seed)
        values = {k: float(v) for k, v in study.measure(method, seed).items()}
    except TrimtabError as error:
        error.add_note(f"This was the arm {name!r} with seed {seed}.")
        raise
    seconds = time.process_time() - started
    numbers = ", ".join(f"{k} {v:.4g}" for k, v in values.items())
    say(f"{name}, seed {seed}: {numbers} ({seconds:.1f} s)")
    return Record(name, seed, fingerprint(study, method), values, seconds)


def _resumed(claim: Claim, study: Study, seeds: int, say: Callable[[str], None], folder: Path) -> list[Record]:
    """As `_measured`, seed by seed through all arms, each record kept on disk as soon as it is made."""
    place = folder / claim.method
    place.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(place)
    lock.acquire()
    try:
        path = place / "full.jsonl"
        wanted = {part.metric for part in study.parts}
        own = recorded(path)
        # Claims share arms, such as plain GRPO: what another one has measured under the same fingerprint is the same.
        every = [*own, *(r for other in sorted(folder.glob("*/full.jsonl")) if other != path for r in recorded(other))]
        kept = {(r.seed, r.fingerprint): r for r in reversed(every) if wanted <= set(r.values)}
        made: list[Record] = []
        for seed in range(seeds):
            for name in study.used():
                found = kept.get((seed, fingerprint(study, study.arms[name].make(seed))))
                if found is not None:
                    say(f"{name}, seed {seed}: measured before, kept")
                    record = replace(found, arm=name)
                else:
                    record = _one(study, name, seed, say)
                if record not in own:
                    _append(path, record)
                made.append(record)
        return made
    finally:
        lock.release()


def recorded(path: Path) -> list[Record]:
    """The records of a file; a line cut short by a kill is left out, and so measured again."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(Record(**json.loads(line)))
        except (json.JSONDecodeError, TypeError):
            continue
    return records


def _append(path: Path, record: Record) -> None:
    cut = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a") as f:
        f.write(("\n" if cut else "") + json.dumps(asdict(record)) + "\n")
        f.flush()
        os.fsync(f.fileno())


def write(rows: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    """`folder/METHOD.json`: these rows, and those of the other scope if the file has some; returns its path.

    Raises `ClaimError` when the file is there and is something else.
    """
    path = folder / f"{rows[0]['method']}.json"
    scope = rows[0]["scope"]
    try:
        others = [r for r in json.loads(path.read_text()) if r["scope"] != scope] if path.exists() else []
    except (json.JSONDecodeError, TypeError, KeyError):
        raise ClaimError(f"{path} is not a list of claim rows; move it away, or write to another folder") from None
    folder.mkdir(parents=True, exist_ok=True)
    both = [*rows, *others] if scope == "mechanism" else [*others, *rows]
    path.write_text(json.dumps(both, indent=1, allow_nan=False) + "\n")
    return path
