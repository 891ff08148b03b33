"""Commands that measure: profile, plan, claim."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from trimtab.cli.printing import table
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
