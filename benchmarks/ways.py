"""Which way of training is fastest on this machine and learns: all weights in float32 or bfloat16, or an adapter.

    python benchmarks/ways.py --runs runs/ways --out docs/results/speed-language/ways

Each run is an ordinary `trimtab train` folder; finished ones are not run again. Run it on an idle machine: times are
wall-clock seconds. Learning rates: the default for all weights, ten times that for an adapter, neither of them tuned.
"""

from __future__ import annotations

import argparse
import json
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

from trimtab.report.folder import RunFolder
from trimtab.runs.experiment import Request, command, resume, train
from trimtab.runs.meters import machine_words

ENV = "reasoning-gym:chain_sum(min_terms=2,max_terms=2,min_digits=1,max_digits=1)"
SIZES = ("collect.prompts=8", "collect.group=16", "collect.new_tokens=8", "collect.revisit=0.25")
ADAPTER = ("update.lr=linear(start=3e-4, end=0.0)",)
WAYS: dict[str, dict[str, Any]] = {
    "all weights, float32": {"dtype": "float32"},
    "all weights, float32 with bfloat16 products": {"dtype": "bfloat16"},
    "adapter of rank 16, bfloat16 products": {"dtype": "bfloat16", "lora": 16, "set": (*SIZES, *ADAPTER)},
}


def asked(way: str, seed: int, given: argparse.Namespace) -> Request:
    out = given.runs / f"{'-'.join(way.replace(',', '').split())}-s{seed}"
    settings: dict[str, Any] = {"set": SIZES, **WAYS[way]}
    return Request("grpo", "smollm2", ENV, str(out), steps=given.steps, seed=seed, eval_every=10, **settings)


def finished(request: Request) -> RunFolder:
    folder = RunFolder(request.out)
    if not folder.holds_run():
        train(request, mode="plain")
    elif folder.metrics()[-1]["turn"] < request.steps:
        resume(request.out, mode="plain")
    return RunFolder(request.out)


def read(way: str, request: Request) -> dict[str, Any]:
    """Seconds of a turn (median of all but the first), and held-out accuracy at every evaluation."""
    folder = finished(request)
    times = [record["seconds"] for record in folder.metrics()]
    each = [b - a for a, b in pairwise(times)]
    points = [{"turn": e["turn"], "greedy": e["mean"], "sampled": e["sampled"]} for e in folder.evaluations()]
    return {
        "way": way, "seed": request.seed, "seconds_a_turn": statistics.median(each), "turns": len(times),
        "command": command(request), "evaluations": points,
    }  # fmt: skip


def page(results: dict[str, Any]) -> str:
    machine = results["machine"]
    lines = [
        "# Which way of training is fastest, and learns",
        "",
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, torch {machine['torch']}. "
        f"GRPO of SmolLM2-135M on sums of two numbers from 0 to 9, {results['turns']} turns of 8 x 16 rollouts of at "
        "most 8 tokens. Made by `python benchmarks/ways.py`; the learning rate is the default, ten times that for the "
        "adapter, neither of them tuned.",
        "",
        "| way | seed | a turn | greedy before -> after | sampled before -> after |",
        "|---|---|---|---|---|",
    ]
    for r in results["rows"]:
        first, last = r["evaluations"][0], r["evaluations"][-1]
        learned = [f"{first[how]:.0%} -> {last[how]:.0%}" for how in ("greedy", "sampled")]
        lines.append(f"| {r['way']} | {r['seed']} | {r['seconds_a_turn']:.2f} s | {learned[0]} | {learned[1]} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/ways"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/speed-language/ways"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=30)
    given = parser.parse_args()
    rows = [read(way, asked(way, seed, given)) for seed in given.seeds for way in WAYS]
    results = {"machine": machine_words(threads_of(given, rows)), "turns": given.steps, "rows": rows}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (given.out / "README.md").write_text(page(results))


def threads_of(given: argparse.Namespace, rows: list[dict[str, Any]]) -> int:
    """What the runs wrote down."""
    threads: int = RunFolder(asked(rows[0]["way"], rows[0]["seed"], given).out).config()["request"]["threads"]
    return threads


if __name__ == "__main__":
    main()
