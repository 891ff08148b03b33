"""Commands that run something, or look at a run: train, resume, compare, eval, watch, export."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tyro.conf import Positional, UseAppendAction, arg

from trimtab.cli.printing import outcome, plain, table
from trimtab.cli.setting import Expression, Folder, Others, Settings


@dataclass(frozen=True)
class Train:
    """Train a policy with a method on an environment, into a run folder.

    trimtab train grpo --policy smollm2 --env 'reasoning-gym:chain_sum(min_terms=2,max_terms=2)'
    trimtab train ppo --env CartPole-v1
    """

    method: Expression
    setting: Settings
    out: str = ""
    """The run folder; by default runs/METHOD-POLICY-sSEED, or runs/METHOD-ENVIRONMENT-sSEED. A used one is refused."""
    seed: int = 0
    """Of everything random. The held-out problems do not depend on it."""
    keep: int = 2
    """Checkpoints kept."""
    json: bool = False
    """Print one JSON object at the end, and nothing else."""

    def __call__(self) -> int:
        from trimtab.runs.experiment import train

        out = self.out or f"runs/{plain(self.method, self.setting.task(self.method))}-s{self.seed}"
        request = self.setting.request(self.method, out, seed=self.seed, keep=self.keep)
        return outcome(train(request, mode="silent" if self.json else "auto"), self.json)


@dataclass(frozen=True)
class Resume:
    """Go on with a run from its newest checkpoint, to the same bits."""

    run: Folder
    steps: int | None = None
    """Another total number of turns (default: as first asked)."""
    decisions: int | None = None
    """Another total number of decisions, instead of turns."""
    json: bool = False
    """Print one JSON object at the end, and nothing else."""

    def __call__(self) -> int:
        from trimtab.runs.experiment import resume

        mode = "silent" if self.json else "auto"
        return outcome(resume(self.run, mode=mode, steps=self.steps, decisions=self.decisions), self.json)


@dataclass(frozen=True)
class Compare:
    """Compare methods with the first one: same seeds, same budget in decisions. Repeat the command to go on with it.

    trimtab compare grpo 'grpo(clip_high=0.28)' --policy smollm2 --env 'reasoning-gym:chain_sum(max_terms=2)' --seeds 5
    trimtab compare ppo sac --env Hopper-v5 HalfCheetah-v5 --seeds 3
    """

    methods: Annotated[
        Positional[tuple[str, ...]],
        arg(metavar="EXPR EXPR ...", help="2 to 6 methods, options of one in its brackets; the first is the base."),
    ]
    env: tuple[str, ...]
    """One or several, as for train; of several, scores are normalised and summarised together as well."""
    setting: Others
    """--steps counts turns of the first method; the others get, seed by seed, the decisions that it used."""
    reference: UseAppendAction[tuple[str, ...]] = ()
    """Of several environments: ENV=LOW,HIGH, the scores that count as 0 and 1 (default: of the first method, the mean
    before training and the mean at the end)."""
    out: str = ""
    """The folder of all runs; runs/compare-METHODS-POLICY by default."""
    seeds: int = 5
    """How many seeds; each is run under every method."""
    first_seed: int = 0
    """The seeds are this one and those that follow."""
    jobs: int = 1
    """Runs at once, each a process with one thread."""
    json: bool = False
    """Print the object of comparison.json at the end, and nothing else."""

    def __call__(self) -> int:
        from trimtab.catalogue.describe import comparison_tables

        made = self._made()
        if self.json:
            print(json.dumps(made))
        else:
            for title, heads, rows in comparison_tables(made):
                if rows:
                    table(title, heads, rows)
            print("\n".join([*made["conclusions"], *(f"note: {note}" for note in made["notes"])]))
            if "report" in made:
                print(f"report: {made['report']}")
        if not made["finished"]:
            print(f"stopped; go on with: {made['command']}", file=sys.stderr)
            return 130
        return 1 if any(a["failures"] for one in made.get("tasks", {"": made}).values() for a in one["arms"]) else 0

    def _made(self) -> dict[str, Any]:
        """The comparison on the one environment, or on each and over all of them."""
        from trimtab.runs.across import compare_across
        from trimtab.runs.comparison import ComparisonError, compare

        if not self.methods or not self.env:
            what = "environment" if self.methods else "method"  # all words behind --env are environments
            raise ComparisonError(f"no {what} was given; write: trimtab compare ppo a2c --env CartPole-v1 Acrobot-v1")
        out = self.out or f"runs/compare-{plain(*self.methods, self.setting.task(self.methods[0], *self.env))}"
        seeds = range(self.first_seed, self.first_seed + self.seeds)
        request = self.setting.request("", self.env[0], out)
        mode: Literal["silent", "auto"] = "silent" if self.json else "auto"
        if len(self.env) > 1:
            more = {"references": self.reference, "jobs": self.jobs}
            return compare_across(request, self.env, self.methods, seeds, **more, mode=mode)  # type: ignore[arg-type]
        if self.reference:
            raise ComparisonError("--reference puts the scores of several environments on one scale; there is one here")
        return compare(request, self.methods, seeds, jobs=self.jobs, mode=mode)


@dataclass(frozen=True)
class Eval:
    """Evaluate a run on held-out problems: its policy before training, and at its newest checkpoint."""

    run: Folder
    problems: int | None = None
    """How many held-out problems (default: as in training)."""
    env: str | None = None
    """Another environment to be held out on."""
    samples: int | None = None
    """Answers to each problem; more than one needs a temperature above 0 (default: as in training)."""
    k: str | None = None
    """For pass@k: 1,4,8 for example, each at most the number of samples (default: as in training)."""
    temperature: float | None = None
    """Of the answers; 0 is greedy (default: as in training)."""
    json: bool = False
    """Print one JSON object and nothing else."""

    def __call__(self) -> int:
        from trimtab.runs.experiment import evaluate_folder

        options = {"samples": self.samples, "k": self.k, "temperature": self.temperature}
        return outcome(evaluate_folder(self.run, problems=self.problems, env=self.env, **options), self.json)


@dataclass(frozen=True)
class Watch:
    """Make a video of an episode as the policy of a run plays it, without a display; the report shows it.

    trimtab watch runs/ppo-CartPole-v1-s0
    """

    run: Folder
    checkpoint: str = "newest"
    """newest, best (the highest held-out mean among those kept), or the number of a turn."""
    episode: int = 0
    """Which of the held-out episodes, as numbered in evaluation."""
    steps: int = 1000
    """Steps shown at most."""
    kind: Literal["mp4", "gif"] = "mp4"
    """The file made."""
    json: bool = False
    """Print one JSON object and nothing else."""

    def __call__(self) -> int:
        from trimtab.runs.watch import watch

        made = watch(self.run, checkpoint=self.checkpoint, episode=self.episode, steps=self.steps, kind=self.kind)
        if self.json:
            print(json.dumps(made))
        else:
            print(f"return {made['return']:.4g} in {made['length']} steps: {made['video']} ({made['bytes']:,} bytes)")
            print(f"report: {made['report']}")
        return 0


@dataclass(frozen=True)
class Export:
    """Write the model of a run, finished or interrupted, into a folder for `from_pretrained`."""

    run: Folder
    out: str | None = None
    """The folder to write, absent or empty (default: DIR/export/turn-N)."""
    checkpoint: str = "newest"
    """newest, best (the highest held-out mean among those kept), or the number of a turn."""
    merge: bool = False
    """Add the low-rank adapter to the weights, instead of writing an adapter folder."""
    json: bool = False
    """Print one JSON object and nothing else."""

    def __call__(self) -> int:
        from trimtab.runs.export import export

        made = export(self.run, out=self.out, checkpoint=self.checkpoint, merge=self.merge)
        if self.json:
            print(json.dumps(made))
        else:
            print(f"{made['kind']} of turn {made['turn']}: {made['model']}")
            print(f"load it with AutoModelForCausalLM.from_pretrained({made['model']!r})")
        return 0
