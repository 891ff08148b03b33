"""The main job, measured: three seeds, a control that pays for format alone, and the untrained model read leniently.

    python benchmarks/main_job.py --runs runs/main-job-results --out docs/results/main-job

Each run is an ordinary `trimtab train` folder; one that is finished is not run again, so this can be stopped and
started. Run it on an idle machine: times are wall-clock seconds of training on the threads that `trimtab` chose.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trimtab.evaluation import Evaluation, evaluate
from trimtab.policies.builtin import load_policy
from trimtab.report.compare import curve, overlay
from trimtab.report.folder import RunFolder
from trimtab.report.style import Theme
from trimtab.runs.experiment import Request, build, command, request_of, resume, train

ENV = "reasoning-gym:chain_sum(min_terms=2,max_terms=2,min_digits=1,max_digits=1)"
FORMAT = "trimtab.environments.rewards:bare_integer"
LENIENT = "trimtab.environments.rewards:last_integer"


def asked(out: Path, seed: int, settings: tuple[str, ...], steps: int, **more: Any) -> Request:
    return Request("grpo", "smollm2", ENV, str(out), steps=steps, seed=seed, set=settings, eval_every=5, **more)


def finished(request: Request) -> RunFolder:
    """The folder of this request, run to its end now or before."""
    folder = RunFolder(request.out)
    if not folder.holds_run():
        train(request, mode="plain")
    elif folder.metrics()[-1]["turn"] < request.steps:
        resume(request.out, mode="plain")
    return RunFolder(request.out)


def measured(policy: Any, reward: str | None = None, new_tokens: int = 8) -> Evaluation:
    """Held-out accuracy under the data set's own scorer, or another one."""
    from trimtab.environments.text import load_environment

    environment = load_environment(ENV, reward=reward)
    made = evaluate(policy, environment, problems=50, new_tokens=new_tokens)
    environment.close()
    return made


def read(policy: Any, new_tokens: int = 8) -> dict[str, Any]:
    """Greedy accuracy, read strictly (the data set's scorer) and leniently (the last integer counts)."""
    strict = measured(policy, new_tokens=new_tokens).summary()
    return {"strict": strict, "lenient": measured(policy, LENIENT, new_tokens).summary()}


def sampled(policy: Any) -> float:
    return measured(policy).sampled


def trained(folder: RunFolder) -> Any:
    """The policy of a finished run."""
    torch.set_num_threads(request_of(folder).threads)
    return load_policy(str(folder.model))


def negatives(folder: RunFolder) -> dict[str, list[int]]:
    """Held-out answers right before and after, and how many there are: those below zero, and the rest."""
    counts = {"below zero": [0, 0, 0], "others": [0, 0, 0]}
    for sample in folder.samples():
        if sample.get("split") == "eval":
            row = counts["below zero" if int(sample["answer"]) < 0 else "others"]
            after = sample["stage"] == "after"
            row[after] += sample["reward"] >= 1
            row[2] += after
    return counts


def seed_row(folder: RunFolder) -> dict[str, Any]:
    evaluations, metrics = folder.evaluations(), folder.metrics()
    n = evaluations[-1]["n"]
    return {
        "seed": request_of(folder).seed,
        "seconds": metrics[-1]["seconds"],
        "turns": metrics[-1]["turn"],
        "decisions": metrics[-1]["decisions"],
        "sampled": [evaluations[0]["sampled"], evaluations[-1]["sampled"]],
        "curve": [[e["turn"], round(e["seconds"], 1), round(e["mean"] * n)] for e in evaluations],
        "n": n,
        "before": evaluations[0]["mean"],
        "kinds": negatives(folder),
        "last_three": [round(e["mean"] * n) for e in evaluations[-3:]],
        "after": [evaluations[-1][k] for k in ("mean", "low", "high")],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/main-job-results"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/main-job"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--control-seeds", type=int, nargs="*", default=[0])
    given = parser.parse_args()
    settings = tuple(given.set)

    runs = [finished(asked(given.runs / f"seed{s}", s, settings, given.steps)) for s in given.seeds]
    controls = [
        finished(asked(given.runs / f"format-seed{s}", s, settings, given.steps, reward=FORMAT))
        for s in given.control_seeds
    ]
    start = build(replace(request_of(runs[0]), out="")).policy
    before = sampled(start)
    results: dict[str, Any] = {
        "command": command(replace(request_of(runs[0]), out="", threads=0, seed=0)),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": request_of(runs[0]).threads,
        "versions": runs[0].config()["versions"],
        "seeds": [seed_row(f) for f in runs],
        "untrained": read(start),
        "chat": read(load_policy("smollm2", chat=True), new_tokens=24),
        "format_control": [
            {"seed": request_of(f).seed, **read(trained(f)), "sampled": [before, sampled(trained(f))]} for f in controls
        ],
        "trained": [read(trained(f)) for f in runs],
    }
    publish(given.out, runs, results)


def share(row: dict[str, Any]) -> str:
    """A proportion as a reader wants it."""
    return f"{row['mean']:.0%} [{row['low']:.0%}, {row['high']:.0%}]"


def page(results: dict[str, Any]) -> str:
    """The result in words and tables, made from its own numbers."""
    seeds, controls = results["seeds"], results["format_control"]
    n = seeds[0]["n"]
    lines = [
        "# The main job: a 135M language model learns on two CPU cores",
        "",
        f"`{results['command']}`",
        "",
        f"Seeds {', '.join(str(s['seed']) for s in seeds)}; {results['machine']}, {results['threads']} threads, torch "
        f"{results['versions']['torch']}. {n} held-out problems, chosen by a hash of the question from the 200 of this "
        f"data set; none is ever trained on. Made by `python benchmarks/main_job.py`.",
        "",
        '<picture><source media="(prefers-color-scheme: dark)" srcset="accuracy-dark.svg">'
        '<img src="accuracy-light.svg" alt="held-out accuracy against seconds of training"></picture>',
        "",
        "| seed | greedy before | last three evaluations | after, 95% interval | sampled before -> after | training |",
        "|---|---|---|---|---|---|",
    ]
    for s in seeds:
        mean, low, high = s["after"]
        last = ", ".join(f"{k}/{n}" for k in s["last_three"])
        lines.append(
            f"| {s['seed']} | {round(s['before'] * n)}/{n} | {last} | {mean:.0%} [{low:.0%}, {high:.0%}] | "
            f"{s['sampled'][0]:.0%} -> {s['sampled'][1]:.0%} | {s['seconds']:.0f} s, {s['turns']} turns |"
        )
    lines += ["", "| seed | answers below zero, right before -> after | other answers |", "|---|---|---|"]
    for s in seeds:
        below, others = s["kinds"]["below zero"], s["kinds"]["others"]
        lines.append(
            f"| {s['seed']} | {below[0]} -> {below[1]} of {below[2]} | {others[0]} -> {others[1]} of {others[2]} |"
        )
    strict, lenient = results["untrained"]["strict"], results["untrained"]["lenient"]
    lines += [
        "",
        '"Sampled" is one answer a problem drawn at temperature 1, which is what training sees; "greedy" takes the '
        "most probable token.",
        "",
        "## Format or arithmetic?",
        "",
        "| arm | greedy, strict scorer | greedy, last integer counts | sampled before -> after |",
        "|---|---|---|---|",
        f"| untrained | {share(strict)} | {share(lenient)} | |",
        f"| untrained, through the chat template, 24 tokens | {share(results['chat']['strict'])} | "
        f"{share(results['chat']['lenient'])} | |",
    ]
    for c in controls:
        lines.append(
            f"| paid for any bare integer, seed {c['seed']} | {share(c['strict'])} | {share(c['lenient'])} | "
            f"{c['sampled'][0]:.0%} -> {c['sampled'][1]:.0%} |"
        )
    for s, t in zip(seeds, results["trained"]):
        lines.append(
            f"| paid by the data set's scorer, seed {s['seed']} | {share(t['strict'])} | {share(t['lenient'])} | "
            f"{s['sampled'][0]:.0%} -> {s['sampled'][1]:.0%} |"
        )
    return "\n".join([*lines, "", NOTES, ""])


NOTES = """## How to read this

- **Where it starts.** The question is given as plain text, the way reasoning-gym words it. Read greedily the untrained
  model already answers most of these problems in the right form; sampled, it rambles. Through the chat template it
  answers in a sentence, which the strict scorer refuses whatever the number says.
- **Format.** The control is the same method on the same problems, paid for any bare integer, right or wrong. What it
  gains in sampled accuracy is form; its greedy accuracy shows that form alone teaches no arithmetic.
- **Arithmetic.** What is left, the rise of greedy accuracy over the untrained model, is arithmetic, and most of it is
  differences below zero: the untrained model answers none of them right (second table).
- **What limits it.** By the end nearly every training group is all right, so nothing is left to learn from, while a few
  held-out problems, mostly differences below zero, are still answered with a wrong number.
- **How the recipe was chosen.** A first recipe with 8 rollouts a problem gave, in the last three evaluations, 46, 48,
  48 (seed 0), 46, 46, 46 (seed 1) and 43, 44, 45 (seed 2): below the goal of 45 on one seed. Sixteen rollouts were then
  tried on seed 10, and the recipe above was run once on seeds 0, 1 and 2. The held-out problems were looked at while
  choosing, so read them as validation. All seeds share the same 50 problems: three seeds do not make 150."""


def publish(out: Path, runs: list[RunFolder], results: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    for folder, row in zip(runs, results["seeds"]):
        place = out / f"seed{row['seed']}"
        place.mkdir(exist_ok=True)
        for name in ("config.json", "eval.jsonl", "metrics.jsonl"):
            shutil.copy(folder.path / name, place / name)
    shutil.copy(runs[0].report, out / "report-seed0.html")
    themes: tuple[Theme, ...] = ("light", "dark")
    for theme in themes:
        picture = overlay(
            {
                "greedy": [curve(f, "held-out", "seconds") for f in runs],
                "sampled, temperature 1": [curve(f.evaluations(), "sampled", "seconds") for f in runs],
            },
            title="SmolLM2-135M learns sums on two CPU cores",
            x_label="seconds of training",
            y_label="accuracy on 50 held-out problems",
            share=True,
            theme=theme,
        )
        (out / f"accuracy-{theme}.svg").write_bytes(picture)
    (out / "README.md").write_text(page(results))
    print(json.dumps({k: v for k, v in results.items() if k != "versions"}, indent=1))


if __name__ == "__main__":
    main()
