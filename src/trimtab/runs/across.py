"""Several methods on several tasks: an ordinary comparison for each, and what they say together.

OUT/TASK/     a comparison each, with its own runs, comparison.json and report.html
OUT/comparison.json, OUT/report.html    over all of them
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from trimtab.core.errors import nearest
from trimtab.report.across import across
from trimtab.report.records import to_json, write_atomic
from trimtab.runs.comparison import ComparisonError, Job, Plan, checked_jobs, plan, slug, written
from trimtab.runs.jobs import work
from trimtab.runs.request import Request


@dataclass(frozen=True)
class Suite:
    """The comparisons, one a task, with the same arms and seeds. given: by task, the scores that are 0 and 1."""

    request: Request
    plans: tuple[Plan, ...]
    given: Mapping[str, tuple[float, float]]

    def jobs(self) -> list[Job]:
        """Every run, seed by seed, so that the first seeds of all tasks come first."""
        first = self.plans[0]
        return [Job(one, arm, seed) for seed in first.seeds for one in self.plans for arm in first.arms]

    def command(self, jobs: int) -> str:
        """The command line that repeats, and so resumes, all of it."""
        words = shlex.split(replace(self.plans[0], request=self.request).command(jobs))
        place = words.index("--env") + 1
        words[place : place + 1] = [one.request.env for one in self.plans]
        words += [w for task, (low, high) in self.given.items() for w in ("--reference", f"{task}={low:g},{high:g}")]
        return shlex.join(words)


def suite(
    request: Request,
    environments: Sequence[str],
    expressions: Sequence[str],
    seeds: Sequence[int],
    references: Sequence[str] = (),
) -> Suite:
    """Comparisons that can be run. Raises a TrimtabError, naming task and arm, for what cannot.

    request: see `comparison.plan`; its environment is not read. references: "TASK=LOW,HIGH".
    """
    if len(environments) < 2 or len(set(environments)) < len(environments):
        raise ComparisonError(f"the environments {list(environments)} must be at least two, each once")
    given = dict(_reference(text, environments) for text in references)
    if request.eval_env is not None:
        raise ComparisonError("--eval-env is one environment, and several are compared on; compare on each by itself")
    out = Path(request.out)
    plans = tuple(
        plan(replace(request, env=env, out=str(out / slug(env))), expressions, seeds, env) for env in environments
    )
    return Suite(replace(request, env=environments[0]), plans, given)


def _reference(text: str, environments: Sequence[str]) -> tuple[str, tuple[float, float]]:
    """`TASK=LOW,HIGH` as the task and its two scores."""
    task, _, numbers = text.rpartition("=")
    try:
        low, high = (float(part) for part in numbers.split(","))
    except ValueError:
        low = high = 0.0
    if not task or not low < high or high - low == float("inf"):
        raise ComparisonError(
            f"--reference {text!r} is not of the form TASK=LOW,HIGH with LOW below HIGH: the scores that are 0 and 1"
        )
    if task not in environments:
        raise ComparisonError(f"--reference {text!r}: {task!r} is not compared on. {nearest(task, environments)}")
    return task, (low, high)


def compare_across(
    request: Request,
    environments: Sequence[str],
    expressions: Sequence[str],
    seeds: Sequence[int],
    *,
    references: Sequence[str] = (),
    jobs: int = 1,
    mode: Literal["auto", "plain", "silent"] = "auto",
) -> dict[str, Any]:
    """Run what is not finished yet, then analyse; returns what `comparison.json` holds: `tasks` is a comparison each.

    request, environments, expressions, seeds, references: see `suite`. The rest is as in `comparison.compare`.
    """
    from trimtab.report.across_page import write_across

    made = suite(request, environments, expressions, seeds, references)
    failures, stopped = work(made.jobs(), checked_jobs(jobs), mode)
    tasks = {one.label: written(one, failures, 1, finished=not stopped) for one in made.plans}
    first = next(iter(tasks.values()))
    arms = [a["arm"] for a in first["arms"]]
    found = {
        "command": made.command(jobs),
        "out": request.out,
        "task": {"policy": request.policy, "environments": list(environments)},
        **{key: first[key] for key in ("budget", "seeds", "base", "primary", "differences", "versions", "machine")},
        "tasks": tasks,
        **across(first["base"], arms, tasks, made.given),
        "finished": not stopped,
    }
    out = Path(request.out)
    write_atomic(out / "comparison.json", to_json(found, indent=1) + "\n")
    if any(arm["seeds"] for one in tasks.values() for arm in one["arms"]):
        found["report"] = str(write_across(out, found))
    return found
