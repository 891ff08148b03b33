"""The command line. Heavy imports happen inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import json
import os
import sys
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, UseAppendAction, arg, subcommand

Expression = Annotated[
    Positional[str],
    arg(metavar="EXPR", help="A method, or several: grpo, rloo, 'd3s+bapo', 'grpo(kl=0.04, per=\"row\")'."),
]
Folder = Annotated[Positional[str], arg(metavar="DIR", help="A run folder.")]


@dataclass(frozen=True)
class Setting:
    """What a run needs besides its method: shared by all arms of a comparison."""

    policy: str
    """smollm2, tiny, nano, a Hugging Face id, or a local model or adapter folder."""
    env: str
    """'reasoning-gym:NAME(key=value, ...)', FILE.jsonl, or 'datasets:NAME(...)'."""
    steps: int | None = None
    """Turns: one batch of rollouts and its updates (default: 60)."""
    decisions: int | None = None
    """Instead of --steps: stop after the first turn that reaches this many decisions (tokens) of the policy."""
    set: UseAppendAction[tuple[str, ...]] = ()
    """piece.option=value, once per option, for example --set update.lr=1e-5 --set collect.group=16."""
    rows: int | None = None
    """Rows per update (default: the method's)."""
    memory: int | None = None
    """Rows in memory at once; changes nothing beyond rounding (default: all)."""
    passes: int | None = None
    """Passes over each batch (default: the method's)."""
    lora: int = 0
    """Rank of a low-rank adapter; 0 trains all parameters."""
    dtype: Literal["auto", "bfloat16", "float32", "float64"] = "auto"
    """How the forward pass computes; parameters stay float32."""
    checkpointing: bool = False
    """Compute each layer again in the backward: less memory for long texts, a fifth to a half more time."""
    chat: bool | None = None
    """Put prompts into the chat template (default: if the tokenizer has one)."""
    reward: str | None = None
    """exact, math-verify, or module:function (default: the data set's own scorer)."""
    prompt: str | None = None
    """A template such as 'Answer with a number. {question}'."""
    eval_every: int = 10
    """Turns between evaluations on held-out problems."""
    eval_problems: int = 50
    """Held-out problems per evaluation."""
    eval_env: str | None = None
    """Another environment to be held out on, with the same reward and prompt (default: the one trained on)."""
    eval_samples: int = 1
    """Answers to each held-out problem; more than one needs a temperature above 0."""
    eval_k: str = ""
    """For pass@k: 1,4 for example, each at most the number of samples."""
    eval_temperature: float = 0.0
    """Of evaluated answers; 0 is greedy."""
    save_every: int = 25
    """Turns between checkpoints; one is always made at the end and on Ctrl-C."""
    threads: int = 0
    """CPU threads; 0 chooses: the idle cores for a real model, 1 for a small one."""
    tensorboard: bool = False
    """Also write OUT/tensorboard, to be read by `tensorboard --logdir` (needs the extra `tensorboard`)."""

    def request(self, method: str, out: str, **more: Any) -> Any:
        """The whole request. Raises MethodError for two budgets."""
        from trimtab.runs.commands import one_budget
        from trimtab.runs.experiment import Request

        one_budget(self.steps, self.decisions)
        wanted = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "steps"}
        if self.steps is not None:
            wanted["steps"] = self.steps
        return Request(method, out=out, **wanted, **more)


Settings = Annotated[Setting, arg(name="")]


@dataclass(frozen=True)
class Train:
    """Train a policy with a method on an environment, into a run folder.

    trimtab train grpo --policy smollm2 --env 'reasoning-gym:chain_sum(min_terms=2,max_terms=2)'
    """

    method: Expression
    setting: Settings
    out: str = ""
    """The run folder; runs/METHOD-POLICY-sSEED by default. One that holds a run is refused: resume it."""
    seed: int = 0
    """Of everything random. The held-out problems do not depend on it."""
    keep: int = 2
    """Checkpoints kept."""
    json: bool = False
    """Print one JSON object at the end, and nothing else."""

    def __call__(self) -> int:
        from trimtab.runs.experiment import train

        out = self.out or f"runs/{_plain(self.method, Path(self.setting.policy).name)}-s{self.seed}"
        request = self.setting.request(self.method, out, seed=self.seed, keep=self.keep)
        return _outcome(train(request, mode="silent" if self.json else "auto"), self.json)


@dataclass(frozen=True)
class Compare:
    """Compare methods with the first one: same seeds, same budget in decisions. Repeat the command to go on with it.

    trimtab compare grpo 'grpo(clip_high=0.28)' --policy smollm2 --env 'reasoning-gym:chain_sum(max_terms=2)' --seeds 5
    """

    methods: Annotated[
        Positional[tuple[str, ...]],
        arg(metavar="EXPR EXPR ...", help="2 to 6 methods, options of one in its brackets; the first is the base."),
    ]
    setting: Settings
    """--steps counts turns of the first method; the others get, seed by seed, the decisions that it used."""
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
        from trimtab.runs.comparison import compare

        out = self.out or f"runs/compare-{_plain(*self.methods, Path(self.setting.policy).name)}"
        seeds = range(self.first_seed, self.first_seed + self.seeds)
        request = self.setting.request("", out)
        made = compare(request, self.methods, seeds, jobs=self.jobs, mode="silent" if self.json else "auto")
        if self.json:
            print(json.dumps(made))
        else:
            for title, heads, rows in comparison_tables(made):
                if rows:
                    _table(title, heads, rows)
            print("\n".join([*made["conclusions"], *(f"note: {note}" for note in made["notes"])]))
            if "report" in made:
                print(f"report: {made['report']}")
        if not made["finished"]:
            print(f"stopped; go on with: {made['command']}", file=sys.stderr)
            return 130
        return 1 if any(a["failures"] for a in made["arms"]) else 0


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
        return _outcome(resume(self.run, mode=mode, steps=self.steps, decisions=self.decisions), self.json)


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
        return _outcome(evaluate_folder(self.run, problems=self.problems, env=self.env, **options), self.json)


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


@dataclass(frozen=True)
class Profile:
    """Measure where the seconds and the memory of a turn go, phase by phase, and how fast this machine could be.

    trimtab profile grpo --policy smollm2 --env 'reasoning-gym:chain_sum(max_terms=2)'
    """

    method: Expression
    setting: Settings
    turns: int = 3
    """Turns that are measured, after two that are not."""
    seed: int = 0
    """Of everything random."""
    out: str = ""
    """A folder for profile.json and the page profile.html; nothing is written by default."""
    json: bool = False
    """Print one JSON object, and nothing else."""

    def __call__(self) -> int:
        from trimtab.report.profile_page import write_profile
        from trimtab.runs.profile import HEADS, profile, remarks, table

        found = profile(self.setting.request(self.method, "", seed=self.seed), self.turns)
        rows, said = table(found), remarks(found)
        page = write_profile(found, HEADS, rows, said, Path(self.out)) if self.out else None
        if self.json:
            print(json.dumps(found))
            return 0
        _table(f"{found['method']}, a turn", list(HEADS), rows)
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
        _table(
            f"{found['method']}, {found['turns']} turns", ["what", "how much"], [list(line) for line in lines(found)]
        )
        print("\n".join(["Assumed:", *(f"- {text}" for text in found["assumed"])]))
        print("\n".join(f"note: {note}" for note in found["notes"]))
        return 0


@dataclass(frozen=True)
class Methods:
    """List the methods, or search them: what each changes, and in which stages."""

    search: str | None = None
    """Words of a name, alias, title, arXiv id, preset or idea; all must be found. None found is no error (exit 0)."""
    json: bool = False
    """Print a JSON list instead of a table."""

    def __call__(self) -> int:
        from trimtab.catalogue.describe import method_rows

        if self.search is not None:
            return self._found(self.search)
        rows = method_rows()
        if self.json:
            print(json.dumps(rows, indent=1))
            return 0
        heads = ["name", "base", "world", "what it is", "paper", "stages it sets"]
        keys = ("name", "base", "world", "title", "arxiv")
        _table("methods", heads, [[*(r[k] or "-" for k in keys), ", ".join(r["stages"])] for r in rows])
        return 0

    def _found(self, text: str) -> int:
        from trimtab.catalogue.describe import method_rows
        from trimtab.catalogue.search import nothing_found, search

        hits, rows = search(text), {r["name"]: r for r in method_rows()}
        if self.json:
            found = [{**rows[h.definition.name], "score": h.score, "why": list(h.why)} for h in hits]
            print(json.dumps(found, indent=1))
        if not hits:
            print(nothing_found(text), file=sys.stderr if self.json else sys.stdout)
        elif not self.json:
            lines = [[h.definition.name, h.definition.title, h.definition.arxiv or "-", "; ".join(h.why)] for h in hits]
            _table(f"methods with {text!r}", ["name", "what it is", "paper", "found in"], lines)
        return 0


@dataclass(frozen=True)
class Diff:
    """Print exactly what differs between two methods."""

    a: Annotated[Positional[str], arg(metavar="A", help="A method expression.")]
    b: Annotated[Positional[str], arg(metavar="B", help="Another one.")]
    json: bool = False
    """Print a JSON list instead of a table."""

    def __call__(self) -> int:
        from trimtab.core.method import diff
        from trimtab.core.registry import parse

        rows = diff(parse(self.a), parse(self.b))
        if self.json:
            print(json.dumps([{"address": p, "a": x, "b": y} for p, x, y in rows], indent=1))
        elif not rows:
            print(f"{self.a} and {self.b} are the same method")
        else:
            _table(f"{self.a} -> {self.b}", ["address", self.a, self.b], [[p, x or "-", y or "-"] for p, x, y in rows])
        return 0


@dataclass(frozen=True)
class Explain:
    """Print the numbered pipeline of a method, with every option's value and where it comes from."""

    method: Expression
    set: UseAppendAction[tuple[str, ...]] = ()
    """piece.option=value, as for train."""
    json: bool = False
    """Print a JSON list instead of a table."""

    def __call__(self) -> int:
        from trimtab.catalogue.describe import pipeline
        from trimtab.runs.experiment import Request, configured

        title, rows, notes = pipeline(configured(Request(self.method, "", "", "", set=self.set)))
        if self.json:
            print(json.dumps([dict(zip(("place", "address", "value", "origin"), r)) for r in rows], indent=1))
            return 0
        _table(title, ["#", "address", "value", "set by"], rows)
        for note in notes:
            print(note)
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
class Doctor:
    """Say what this machine has for trimtab, and what to do about what is missing."""

    json: bool = False
    """Print a JSON object instead of lines."""

    def __call__(self) -> int:
        from trimtab.catalogue.describe import diagnose_machine

        facts, advice = diagnose_machine()
        if self.json:
            print(json.dumps({"facts": facts, "advice": advice}, indent=1))
        else:
            _table("this machine", ["what", "found"], [[k, str(v)] for k, v in facts.items()])
            print("\n".join(f"- {a}" for a in advice) if advice else "Nothing to do: `trimtab train` will work here.")
        return 1 if "missing" in facts.values() else 0


Command = (
    Annotated[Train, subcommand("train")]
    | Annotated[Resume, subcommand("resume")]
    | Annotated[Compare, subcommand("compare")]
    | Annotated[Eval, subcommand("eval")]
    | Annotated[Export, subcommand("export")]
    | Annotated[Profile, subcommand("profile")]
    | Annotated[Plan, subcommand("plan")]
    | Annotated[Methods, subcommand("methods")]
    | Annotated[Diff, subcommand("diff")]
    | Annotated[Explain, subcommand("explain")]
    | Annotated[Claim, subcommand("claim")]
    | Annotated[Doctor, subcommand("doctor")]
)


def _outcome(made: dict[str, Any], as_json: bool) -> int:
    """Say what came of a run: one JSON object, or sentences."""
    from trimtab.report.records import to_json
    from trimtab.report.words import is_number

    if as_json:
        print(to_json(made))
        return 0
    before, after = made["eval"]["before"], made["eval"]["after"]

    def said(e: dict[str, Any]) -> str:
        if not e:
            return "not measured"
        known = is_number(e["low"]) and is_number(e["high"])  # one problem has no spread
        ends = f" [{e['low']:.1%}, {e['high']:.1%}]" if known else ""
        return f"{e['mean']:.1%}{ends} of {e['n']}"

    print(f"held-out: {said(before)} before, {said(after)} after, {made['seconds']:.0f} s")
    asked = after.get("pass_at", {})
    if asked:

        def cell(e: dict[str, Any], k: str) -> str:
            return said({**e["pass_at"][k], "n": e["n"]}) if k in e.get("pass_at", {}) else "not measured"

        _table("held-out", ["", "before", "after"], [[f"pass@{k}", cell(before, k), cell(after, k)] for k in asked])
    if not made.get("finished", True):
        print(f"stopped after turn {made['turns']}; go on with: trimtab resume {made['run']}")
    if "report" in made:
        print(f"report: {made['report']}")
    return 0


def _plain(*parts: str) -> str:
    """Text as part of a file name."""
    return "".join(c if c.isalnum() or c in "._-+" else "-" for c in "-".join(parts))


def _table(title: str, heads: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for head in heads:
        table.add_column(head, overflow="fold")
    for row in rows:
        table.add_row(*[Text(str(cell)) for cell in row])
    Console().print(table)


_usual = warnings.formatwarning


def _formatted(message: Warning | str, kind: type[Warning], *more: Any) -> str:
    """A warning of ours as one sentence, without the place in our code that gave it."""
    from trimtab.core.errors import TrimtabWarning

    return f"trimtab: {message}\n" if issubclass(kind, TrimtabWarning) else _usual(message, kind, *more)


def main(argv: list[str] | None = None) -> int:
    """Entry point: parse, run, and turn every deliberate refusal into one sentence and exit code 1."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    command: Any = tyro.cli(
        Command,
        prog="trimtab",
        description="Policy optimization methods as small named changes to one loop.",
        args=argv,
    )
    from trimtab.core.errors import TrimtabError
    from trimtab.machine import keep_freed_memory

    keep_freed_memory()
    warnings.formatwarning = _formatted  # type: ignore[assignment]
    try:
        return int(command())
    except TrimtabError as error:
        print("\n".join([f"trimtab: {error}", *getattr(error, "__notes__", [])]), file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("trimtab: stopped at once; what followed the last checkpoint is lost", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
