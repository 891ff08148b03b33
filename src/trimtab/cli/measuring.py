"""Commands that measure: profile, plan, claim, sparsity."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from trimtab.cli.printing import plain, table
from trimtab.cli.setting import Expression, Settings


@dataclass(frozen=True)
class Profile:
    """Measure where the seconds and the memory of a turn go, phase by phase, and how fast this machine could be.

    trimtab profile grpo --policy smollm2 --env 'reasoning-gym:chain_sum(max_terms=2)'
    """

    method: Expression
    setting: Settings
    turns: int | None = None
    """Turns that are measured, after two that are not (default: 3; of a control method as many as take 2 seconds)."""
    seed: int = 0
    """Of everything random."""
    out: str = ""
    """A folder for profile.json and the page profile.html; nothing is written by default."""
    json: bool = False
    """Print one JSON object, and nothing else."""

    def __call__(self) -> int:
        from trimtab.report.profile_page import write_profile
        from trimtab.runs.profile import heads, lines, profile, remarks

        found = profile(self.setting.request(self.method, "", seed=self.seed), self.turns)
        rows, said = lines(found), remarks(found)
        page = write_profile(found, heads(found), rows, said, Path(self.out)) if self.out else None
        if self.json:
            print(json.dumps(found))
            return 0
        table(f"{found['method']}, a turn", list(heads(found)), rows)
        print("\n".join(said))
        if page:
            print(f"page: {page}")
        return 0


@dataclass(frozen=True)
class Plan:
    """Predict what a run will take: seconds, memory, disk. Trains a little on small batches to find out; keeps nothing.

    trimtab plan grpo --policy smollm2 --env 'reasoning-gym:chain_sum(max_terms=2)' --steps 100
    """

    method: Expression
    setting: Settings
    seed: int = 0
    """Of everything random."""
    keep: int = 2
    """Checkpoints kept."""
    json: bool = False
    """Print one JSON object, and nothing else."""

    def __call__(self) -> int:
        from trimtab.runs.plan import lines, plan

        found = plan(self.setting.request(self.method, "", seed=self.seed, keep=self.keep))
        if self.json:
            print(json.dumps(found))
            return 0
        table(f"{found['method']}, {found['turns']} turns", ["what", "how much"], [list(line) for line in lines(found)])
        print("\n".join(["Assumed:", *(f"- {text}" for text in found["assumed"])]))
        print("\n".join(f"note: {note}" for note in found["notes"]))
        return 0


@dataclass(frozen=True)
class Claim:
    """Put to the test what a paper says about its method; exit code 0 whatever the verdict.

    trimtab claim bapo
    """

    name: Annotated[Positional[str], arg(metavar="NAME", help="A method that has a claim: bnpo, bapo, rec.")] = ""
    all: bool = False
    """Every claim there is."""
    full: bool = False
    """The effect on a small language model instead of the mechanism: for the background; go on by asking again."""
    seeds: int | None = None
    """How many seeds (default: the claim's own)."""
    out: str = ""
    """A folder for NAME.json, the rows as a JSON list; rows of the other scope there are kept."""
    json: bool = False
    """Print a JSON list of rows, and nothing else."""

    def __call__(self) -> int:
        from trimtab.claims.show import measured, shown

        rows = measured(self.name, every=self.all, full=self.full, seeds=self.seeds, out=self.out, quiet=self.json)
        print(json.dumps(rows, indent=1)) if self.json else shown(rows)
        return 0


@dataclass(frozen=True)
class Sparsity:
    """Measure which weights an update changed, as they are stored: of a run, of two and their overlap, or A to B.

    trimtab sparsity runs/gcd
    trimtab sparsity runs/grpo-s0 runs/grpo-s1
    trimtab sparsity ./base-model ./tuned-model --rank
    trimtab sparsity runs/gcd --mask gcd.mask    # then: trimtab train 'subnetwork(mask="gcd.mask")+grpo' ...
    """

    a: Annotated[
        Positional[str], arg(metavar="A", help="A run folder, a checkpoint, a model folder, a .safetensors file.")
    ]
    b: Annotated[Positional[str], arg(metavar="B", help="Another one: two runs are compared, else A is the base.")] = ""
    start: str = ""
    """A model that A and B are both updates of, where they are no runs."""
    checkpoint: str = "newest"
    """The end of a run: newest, best (the highest held-out mean among those kept), or the number of a turn."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """How weights are stored; float32 is always shown beside it."""
    tol: float = 1e-5
    """Weights that differ by no more are equal."""
    rank: bool = False
    """Also the rank of every matrix of differences."""
    mask: str = ""
    """A file to write: which weights of each matrix changed, one bit each, for subnetwork(mask=...)."""
    mask_tol: float = 0.0
    """Weights that differ by no more are left out of the mask; 0 takes in any change that is visible in --dtype."""
    random: int | None = None
    """With --mask: a seed, to choose as many weights of each matrix by lot: the control of a sub-network."""
    out: str = ""
    """The folder for sparsity.json and the plots; runs/sparsity-A-B by default."""
    json: bool = False
    """Print one JSON object, and nothing else."""

    def __call__(self) -> int:
        from trimtab.report.records import to_json
        from trimtab.report.sparsity import write_sparsity
        from trimtab.runs.sparsity import compare
        from trimtab.runs.sparsity_words import sentences, tables

        made = compare(
            self.a, self.b or None, start=self.start or None, checkpoint=self.checkpoint, dtype=self.dtype,
            tol=self.tol, rank=self.rank, mask=self.mask or None, mask_tol=self.mask_tol, random=self.random,
        )  # fmt: skip
        names = [Path(place).name for place in (self.a, self.b) if place]
        paths = write_sparsity(self.out or f"runs/sparsity-{plain(*names)}", made)
        if self.json:
            print(to_json({**made, "files": [str(p) for p in paths]}))
            return 0
        for title, heads, rows in tables(made):
            table(title, heads, rows)
        print("\n".join([*sentences(made), f"plots and numbers: {paths[0].parent}"]))
        return 0
