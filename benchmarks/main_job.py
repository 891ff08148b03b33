"""The main job, measured: three seeds, a control that pays for format alone, and the untrained model read leniently.

    python benchmarks/main_job.py --runs runs/main-job-results --out docs/results/main-job

Each run is an ordinary `trimtab train` folder; one that is finished is not run again, so this can be stopped and started.
Run it on an idle machine: times are wall-clock seconds of training on the threads that `trimtab` chose.
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

from trimtab.experiment import Request, build, command, request_of, resume, train
from trimtab.evaluation import evaluate
from trimtab.report.compare import curve, overlay
from trimtab.report.folder import RunFolder
from trimtab.report.intervals import wilson

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


def accuracy(policy: Any, reward: str | None = None) -> dict[str, Any]:
    """Greedy held-out accuracy under the data set's own scorer, or another one."""
    from trimtab.environments.text import load_environment

    environment = load_environment(ENV, reward=reward)
    made = evaluate(policy, environment, problems=50).summary()
    environment.close()
    return made


def trained(folder: RunFolder) -> Any:
    """The policy of a finished run."""
    from trimtab.policies.builtin import load_policy

    torch.set_num_threads(request_of(folder).threads)
    return load_policy(str(folder.model))


def seed_row(folder: RunFolder) -> dict[str, Any]:
    evaluations, metrics = folder.evaluations(), folder.metrics()
    n = evaluations[-1]["n"]
    return {
        "seed": request_of(folder).seed,
        "seconds": metrics[-1]["seconds"],
        "turns": metrics[-1]["turn"],
        "decisions": metrics[-1]["decisions"],
        "sampled": {"first_turn": metrics[0]["reward"], "last_turns": sum(m["reward"] for m in metrics[-5:]) / 5},
        "curve": [[e["turn"], round(e["seconds"], 1), round(e["mean"] * n)] for e in evaluations],
        "n": n,
        "before": evaluations[0]["mean"],
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
    parser.add_argument("--control-seeds", type=int, nargs="*", default=[0, 1, 2])
    given = parser.parse_args()
    settings = tuple(given.set)
    load = os.getloadavg()[0]

    runs = [finished(asked(given.runs / f"seed{s}", s, settings, given.steps)) for s in given.seeds]
    controls = [
        finished(asked(given.runs / f"format-seed{s}", s, settings, given.steps, reward=FORMAT))
        for s in given.control_seeds
    ]
    start = build(replace(request_of(runs[0]), out="")).policy
    results: dict[str, Any] = {
        "command": command(replace(request_of(runs[0]), out="", threads=0, seed=0)),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f} at the start",
        "threads": request_of(runs[0]).threads,
        "versions": runs[0].config()["versions"],
        "seeds": [seed_row(f) for f in runs],
        "untrained": {"strict": accuracy(start), "lenient": accuracy(start, LENIENT)},
        "format_control": [
            {"seed": request_of(f).seed, "strict": accuracy(trained(f)), "lenient": accuracy(trained(f), LENIENT)}
            for f in controls
        ],
    }
    results["pooled_after"] = pooled(results["seeds"])
    publish(given.out, runs, results)


def pooled(rows: list[dict[str, Any]]) -> dict[str, float]:
    """All seeds' last evaluations as one proportion. The problems are the same for every seed: read it with care."""
    right, n = sum(r["last_three"][-1] for r in rows), sum(r["n"] for r in rows)
    low, high = wilson(right, n)
    return {"mean": right / n, "low": low, "high": high, "n": n}


def publish(out: Path, runs: list[RunFolder], results: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    for folder, row in zip(runs, results["seeds"]):
        place = out / f"seed{row['seed']}"
        place.mkdir(exist_ok=True)
        for name in ("config.json", "eval.jsonl", "metrics.jsonl"):
            shutil.copy(folder.path / name, place / name)
    shutil.copy(runs[0].report, out / "report-seed0.html")
    for theme in ("light", "dark"):
        picture = overlay(
            {"GRPO, SmolLM2-135M, 3 seeds": [curve(f, "held-out", "seconds") for f in runs]},
            title="Held-out accuracy while a 135M model learns on two CPU cores",
            x_label="seconds of training",
            y_label="greedy accuracy on 50 held-out problems",
            share=True,
            smoothed=False,
            theme=theme,
        )
        (out / f"accuracy-{theme}.svg").write_bytes(picture)
    print(json.dumps({k: v for k, v in results.items() if k != "versions"}, indent=1))


if __name__ == "__main__":
    main()
