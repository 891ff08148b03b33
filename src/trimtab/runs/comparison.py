"""Several methods on one task: the same seeds, the same budget in decisions, each run an ordinary run folder.

OUT/ARM/seedK/    the runs: finished ones are kept, interrupted ones go on, so repeating the command resumes
OUT/comparison.json, OUT/report.html, OUT/held-out-{light,dark}.svg    made from them
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from trimtab.core.errors import TrimtabError
from trimtab.core.method import Method, diff
from trimtab.report.folder import RunFolder
from trimtab.report.paired import Run, compared, measured
from trimtab.report.records import to_json, write_atomic
from trimtab.report.style import CYCLE
from trimtab.runs.commands import command, options
from trimtab.runs.jobs import work
from trimtab.runs.request import Request, configured, request_of

# What a recorded request may differ in without being another run: where it is, what else it writes, how fast it is.
_FREE = ("out", "threads", "keep", "save_every", "tensorboard")


class ComparisonError(TrimtabError):
    """Arms cannot be compared, or a folder holds something else."""


@dataclass(frozen=True)
class Arm:
    """One expression, its method with every setting applied, and the name of its folder."""

    expression: str
    method: Method = field(compare=False)
    slug: str


@dataclass(frozen=True)
class Plan:
    """A comparison: the shared request (its method is empty, its `out` the whole folder), the arms and the seeds.

    The budget is `request.decisions` where given; else the first arm runs `request.steps` turns, and the others get,
    seed by seed, the decisions that it used. label: what tells its runs from those of another plan.
    """

    request: Request
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    label: str = ""

    @property
    def out(self) -> Path:
        return Path(self.request.out)

    def jobs(self) -> list[Job]:
        """Every run, seed by seed, the first arm first."""
        return [Job(self, arm, seed) for seed in self.seeds for arm in self.arms]

    def command(self, jobs: int = 1) -> str:
        """The command line that repeats, and so resumes, this comparison."""
        more = ["--seeds", str(len(self.seeds))]
        more += ["--first-seed", str(self.seeds[0])] if self.seeds[0] else []
        more += ["--jobs", str(jobs)] if jobs > 1 else []
        given = [a.expression for a in self.arms]
        return shlex.join(["trimtab", "compare", *given, *options(replace(self.request, seed=0)), *more])


@dataclass(frozen=True)
class Job:
    """One run of a comparison: an arm with a seed."""

    plan: Plan
    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        where = f" on {self.plan.label}" if self.plan.label else ""
        return f"{self.arm.expression}{where}, seed {self.seed}"

    @property
    def first(self) -> Job:
        """The run whose decisions are the budget of this one."""
        return Job(self.plan, self.plan.arms[0], self.seed)

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.plan.out / self.arm.slug / f"seed{self.seed}")

    def request(self) -> Request | None:
        """What to run; None while the budget is not known, because the first arm has not finished this seed."""
        mine = replace(self.plan.request, method=self.arm.expression, out=str(self.folder.path), seed=self.seed, keep=1)
        if self == self.first or "decisions" in mine.budget:
            return mine
        return replace(mine, decisions=self.first.folder.metrics()[-1]["decisions"]) if self.first.finished() else None

    def finished(self) -> bool:
        """Whether its folder holds the whole run. Raises ComparisonError when it holds another one."""
        request = self.request()
        if request is None or not self.folder.holds_run():
            return False
        self.check(request)
        metrics, evaluations = self.folder.metrics(), self.folder.evaluations()
        if not metrics or not evaluations or evaluations[-1]["turn"] != metrics[-1]["turn"]:
            return False
        ((unit, n),) = request.budget.items()
        return bool(metrics[-1]["turn" if unit == "turns" else unit] >= n and self.folder.model.is_dir())

    def check(self, request: Request) -> None:
        """Refuse a folder that holds a run of another request or of another definition of the method."""
        there, mine = asdict(request_of(self.folder)), asdict(request)
        there["policy"] = self.folder.config()["request"]["policy"]  # as it was asked for; the fingerprint tells more
        if there["decisions"] is not None and mine["decisions"] is not None:
            there["steps"] = mine["steps"]  # not read
        odd = [
            f"{k} is {there[k]!r} there and {mine[k]!r} here" for k in mine if k not in _FREE and there[k] != mine[k]
        ]
        if self.folder.config().get("fingerprint") != self.arm.method.fingerprint():
            odd = odd or ["the method has been redefined, or the policy that it begins with has changed, since"]
        if odd:
            raise ComparisonError(
                f"{self.folder.path} holds another run: {'; '.join(odd)}. Choose another --out, ask for the same "
                "again, or remove that folder"
            )

    def result(self, failures: dict[Job, str]) -> Run:
        """What came of it, read off its folder."""
        arm, seed = self.arm.expression, self.seed
        if self.finished():
            return measured(arm, seed, self.folder.metrics(), self.folder.evaluations())
        if self in failures:
            return Run(arm, seed, state="failed", reason=failures[self])
        return Run(arm, seed, state="unfinished")


def plan(request: Request, expressions: Sequence[str], seeds: Sequence[int], label: str = "") -> Plan:
    """A comparison that can be run. Raises a TrimtabError, naming the arm, for what cannot be compared.

    request: what all arms share; its method and seed are not read. expressions: 2 to 6 different methods. label: see
    `Plan`.
    """
    if not 2 <= len(expressions) <= len(CYCLE):
        raise ComparisonError(
            f"{len(expressions)} methods were given; compare takes 2 to {len(CYCLE)} (a picture holds no more lines), "
            "the first being the one that the others are compared with"
        )
    if not seeds or len(set(seeds)) < len(seeds):
        raise ComparisonError(f"the seeds {list(seeds)} cannot be paired; give at least one, each once")
    arms: list[Arm] = []
    for expression in expressions:
        try:
            method = configured(replace(request, method=expression))
        except TrimtabError as error:
            raise ComparisonError(f"arm {expression!r}: {error}") from error
        for other in arms:
            if other.method.fingerprint() == method.fingerprint():
                raise ComparisonError(f"{other.expression!r} and {expression!r} are the same method; give each once")
        arms.append(Arm(expression, method, slug(expression)))
    made = Plan(replace(request, method="", seed=0), tuple(arms), tuple(seeds), label)
    for job in made.jobs():
        if (known := job.request()) is not None and job.folder.holds_run():
            job.check(known)
    return made


def slug(expression: str) -> str:
    """A folder name: the expression where it is one, else a readable one with a digest of it."""
    plain = re.sub(r"[^A-Za-z0-9._+-]+", "-", expression).strip("-")[:60]
    return plain if plain == expression else f"{plain}-{hashlib.sha256(expression.encode()).hexdigest()[:6]}"


def compare(
    request: Request,
    expressions: Sequence[str],
    seeds: Sequence[int],
    *,
    jobs: int = 1,
    mode: Literal["auto", "plain", "silent"] = "auto",
) -> dict[str, Any]:
    """Run what is not finished yet, then analyse; returns what `comparison.json` holds.

    request, expressions, seeds: see `plan`. jobs: runs at once, each a process with one thread (1: in this process).
    A run that fails is recorded as failed and the others go on; on Ctrl-C `finished` is false, and the same call goes
    on from there.
    """
    made = plan(request, expressions, seeds)
    failures, stopped = work(made.jobs(), checked_jobs(jobs), mode)
    return written(made, failures, jobs, finished=not stopped)


def checked_jobs(jobs: int) -> int:
    if jobs < 1:
        raise ComparisonError(f"jobs={jobs} is not a number of runs at once; give 1 or more")
    return jobs


def written(made: Plan, failures: dict[Job, str], jobs: int, *, finished: bool) -> dict[str, Any]:
    """The comparison from whatever the folders hold, with its `comparison.json` and its page."""
    from trimtab.report.comparison import write_comparison

    found = analysed(made, failures, jobs) | {"finished": finished}
    made.out.mkdir(parents=True, exist_ok=True)
    write_atomic(made.out / "comparison.json", to_json(found, indent=1) + "\n")
    if any(arm["seeds"] for arm in found["arms"]):
        found["report"] = str(write_comparison(made.out, found))
    return found


def analysed(made: Plan, failures: dict[Job, str], jobs: int = 1) -> dict[str, Any]:
    """The comparison as plain data, from whatever the folders hold."""
    results = [job.result(failures) for job in made.jobs()]
    found = compared([a.expression for a in made.arms], made.seeds, results)
    folders = {j: j.folder for j, r in zip(made.jobs(), results) if r.state == "finished"}
    versions = [f.config().get("versions", {}) for f in folders.values()]
    if any(v != versions[0] for v in versions):
        found["notes"].append("The runs were made with different versions (see the config.json of each).")
    base = made.arms[0]
    ((unit, most),) = replace(made.request, method=base.expression).budget.items()
    return {
        "command": made.command(jobs),
        "out": str(made.out),
        "task": {"policy": made.request.policy, "environment": made.request.env},
        "budget": {"turns of the first" if unit == "turns" else unit: most},
        "seeds": list(made.seeds),
        **found,
        "runs": [_run_record(job, result) for job, result in zip(made.jobs(), results)],
        "differences": {
            a.expression: [{"address": p, "base": x, "arm": y} for p, x, y in diff(base.method, a.method)]
            for a in made.arms[1:]
        },
        "versions": versions[0] if versions else {},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def _run_record(job: Job, result: Run) -> dict[str, Any]:
    request = job.request()
    return {
        **asdict(result),
        "run": str(job.folder.path),
        "threads": request_of(job.folder).threads if result.state == "finished" else None,
        "command": command(request) if request else None,
    }
