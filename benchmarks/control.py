"""Control works against Stable-Baselines3 and against bare loops, and how their cost grows: one row of JSON a work, one
thread.

    make peers && make bench-control         # or: python benchmarks/control.py --only sac --rounds 1

Each side of each work runs in a process of its own (benchmarks/control_work.py), ours and theirs by turns; theirs is
Stable-Baselines3, or the same update as a loop written by hand (benchmarks/bare.py). A ratio is
how many times as fast ours is: medians over the rounds. What else ran is measured before and after every work; on a
busy machine it refuses, unless --busy is given, and then the row says `busy`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimtab.machine import busy
from trimtab.runs.meters import QUIET, beside, machine_words

HERE = Path(__file__).parent
OUT = HERE.parent / "docs" / "results" / "bench-control.json"
SB3, BARE = "Stable-Baselines3", "a bare loop"


@dataclass(frozen=True)
class Work:
    """name: of the row. method: which loop. goal: least ratio, set before measuring; None where there is no peer.

    peer: whose process is theirs, where there is a goal.
    """

    name: str
    method: str
    metric: str
    size: dict[str, Any] = field(default_factory=dict)
    goal: float | None = None
    peer: str = SB3


def works() -> list[Work]:
    replayed = {"task": "HalfCheetah-v5", "updates": 1000}
    rolled = {"task": "HalfCheetah-v5", "envs": 8, "horizon": 256, "turns": 3}
    narrow = {"options": {"matmul": "bfloat16"}}
    made = [
        Work("sac, HalfCheetah-v5, float32", "sac", "updates_per_second", replayed, 1.4),
        Work("sac, HalfCheetah-v5, bfloat16 products", "sac", "updates_per_second", {**replayed, **narrow}, 2.5),
        Work("td3, HalfCheetah-v5, float32", "td3", "updates_per_second", replayed, 1.4),
        Work("td3, HalfCheetah-v5, bfloat16 products", "td3", "updates_per_second", {**replayed, **narrow}, 2.5),
        Work("ppo, HalfCheetah-v5, 8 environments", "ppo", "steps_per_second", rolled, 1.6),
    ]
    made += [
        Work("loop, sac, float32", "sac", "updates_per_second", replayed, 1 / 1.1, BARE),
        Work("loop, sac, bfloat16 products", "sac", "updates_per_second", {**replayed, **narrow}, 1 / 1.1, BARE),
        Work("loop, ppo, 8 environments", "ppo", "steps_per_second", rolled, 1 / 1.1, BARE),
    ]
    few = {**replayed, "updates": 200}
    made += [Work(f"growth, sac, batch {n}", "sac", "updates_per_second", {**few, "options": {"batch": n}})
             for n in (64, 256, 1024, 4096)]  # fmt: skip
    made += [Work(f"growth, sac, {n} critics", "sac", "updates_per_second", {**few, "options": {"critics": n}})
             for n in (2, 8, 32)]  # fmt: skip
    made += [Work(f"growth, ppo, {n} environments", "ppo", "steps_per_second",
                  {**rolled, "envs": n, "horizon": 2048 // n, "turns": 2}) for n in (1, 8, 64)]  # fmt: skip
    return made


def one(python: str, side: str, work: Work, threads: int) -> dict[str, Any]:
    """What one process said; `{"failed": why}` when it gave no result."""
    words = [python, str(HERE / "control_work.py"), side, work.method, json.dumps({**work.size, "threads": threads})]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if side == "theirs":
        environment.pop("PYTHONPATH", None)
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it was killed"])[-1]
        return {"failed": f"exit {done.returncode}: {last[:300]}"}
    made: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return made


def measured(work: Work, given: argparse.Namespace) -> dict[str, Any]:
    """The row of one work: ours, theirs, ours, theirs, ..."""
    theirs = ("theirs", given.peers) if work.peer == SB3 else ("bare", sys.executable)
    sides = {"ours": ("ours", sys.executable), **({"theirs": theirs} if work.goal else {})}
    seen: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []}
    with beside() as others:
        for _ in range(given.rounds):
            for side, (word, python) in sides.items():
                seen[side].append(one(python, word, work, given.threads))
    values = {side: [m[work.metric] for m in made if work.metric in m] for side, made in seen.items()}
    mine, other = (statistics.median(values[side]) if values[side] else None for side in ("ours", "theirs"))
    return {
        "work": work.name, "peer": work.peer if work.goal else None, "metric": work.metric, "ours": mine,
        "theirs": other, "ratio": mine / other if mine and other else None, "goal": work.goal, "rounds": values,
        "size": {**work.size, "threads": given.threads},
        "failed": {side: m["failed"] for side, made in seen.items() for m in made if "failed" in m},
        "beside": others, "busy": others["busy"],
        "versions": {s: next((m["versions"] for m in made if "versions" in m), {}) for s, made in seen.items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default=os.environ.get("PEERS", ".venv-peers/bin/python"), help="their python")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="times that each side runs, by turns")
    parser.add_argument("--only", default="", help="works whose name holds this text")
    parser.add_argument("--again", action="store_true", help="run works that are in the results too")
    parser.add_argument("--busy", action="store_true", help="measure beside other work all the same")
    given = parser.parse_args()
    cores = busy()
    if cores > QUIET and not given.busy:
        sys.exit(f"other work keeps {cores:.1f} cores busy, so times would mean little; stop it, or give --busy")
    rows = {r["work"]: r for r in json.loads(given.out.read_text())["rows"]} if given.out.exists() else {}
    for work in works():
        if given.only in work.name and (given.again or work.name not in rows):
            rows[work.name] = r = measured(work, given)
            print(f"{r['work']}: {r['ours']} against {r['theirs']} {r['metric']}, ratio {r['ratio']} {r['failed']}")
        listed = [rows[w.name] for w in works() if w.name in rows]
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps({"machine": machine_words(given.threads), "rows": listed}, indent=1) + "\n")


if __name__ == "__main__":
    main()
