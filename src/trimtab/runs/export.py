"""Write the model of a run, finished or interrupted, as a folder that transformers loads."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

from trimtab.core.errors import TrimtabError
from trimtab.core.state import State, checkpoints, load
from trimtab.report.folder import RunFolder
from trimtab.runs.language import LanguageExperiment
from trimtab.runs.request import request_of
from trimtab.runs.worlds import Experiment, build


class ExportError(TrimtabError):
    """A run holds nothing to export, or the target cannot take it."""


def export(
    run: str | Path, *, out: str | Path | None = None, checkpoint: str = "newest", merge: bool = False
) -> dict[str, Any]:
    """Write the policy at a checkpoint of `run` into `out`; returns `{"run", "model", "turn", "kind"}`.

    out: a folder that is absent or empty; by default `RUN/export/turn-N`, or `RUN/export/turn-N-merged`.
    checkpoint: "newest", "best" (of those kept and evaluated, the one with the highest held-out mean; the later of
    equal ones), or the number of a turn. merge: add the low-rank adapter to the weights it adapts; without, a run with
    `--lora` gives an adapter folder that names its base.

    kind is "model" or "adapter"; `AutoModelForCausalLM.from_pretrained` loads both (an adapter with peft installed).
    A control run gives a file of tensors for each network. Parameters are written in the precision in which they were
    trained. The run is only read.

    Raises ExportError for a run without checkpoints, an unknown checkpoint, a target that holds something, or a merge
    without an adapter; RunFolderError or CheckpointError when the run cannot be read.
    """
    folder = RunFolder(run)
    request = request_of(folder)
    if merge and not request.lora and not _is_adapter(request.policy):
        raise ExportError(f"{run} trained all parameters, so there is no adapter to merge; leave --merge out")
    chosen = choose(folder, checkpoint)
    turn = _turn(chosen)
    target = Path(out) if out else folder.path / "export" / f"{chosen.name}{'-merged' if merge else ''}"
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ExportError(f"{target} is there already; give another folder with --out, or remove that one")
    with closing(build(request)) as made:
        state = made.begin()
        load(state, chosen)
    try:
        _write(made, state, target, merge)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)  # half a model must not look like one
        raise
    adapter = isinstance(made, LanguageExperiment) and made.policy.lora and not merge
    return {"run": str(folder.path), "model": str(target), "turn": turn, "kind": "adapter" if adapter else "model"}


def choose(folder: RunFolder, which: str) -> Path:
    """The checkpoint that "newest", "best" or a turn's number names. Raises ExportError with what there is."""
    kept = {_turn(path): path for path in checkpoints(folder.checkpoints)}
    if not kept:
        raise ExportError(
            f"{folder.path} has no checkpoint yet, so there is no trained model to export; "
            f"go on with: trimtab resume {folder.path}"
        )
    there = f"Kept are the checkpoints of turns {', '.join(map(str, kept))}."
    if which == "newest":
        return kept[max(kept)]
    if which == "best":
        means = {int(r["turn"]): r["mean"] for r in folder.evaluations() if r.get("mean") is not None}
        known = [turn for turn in kept if turn in means]
        if not known:
            raise ExportError(
                f"no kept checkpoint of {folder.path} was evaluated, so none is known to be best. {there} "
                f"Give one of these turns, or 'newest'."
            )
        return kept[max(known, key=lambda turn: (means[turn], turn))]
    if not which.isdecimal():
        raise ExportError(f"--checkpoint {which!r} is not one of newest, best, or the number of a turn. {there}")
    if int(which) not in kept:
        raise ExportError(f"{folder.path} has no checkpoint of turn {which}. {there}")
    return kept[int(which)]


def _turn(checkpoint: Path) -> int:
    return int(json.loads((checkpoint / "manifest.json").read_text())["clock"]["turns"])


def _is_adapter(policy: str) -> bool:
    return (Path(policy).expanduser() / "adapter_config.json").is_file()


def _write(made: Experiment, state: State, target: Path, merge: bool) -> None:
    if not merge or not isinstance(made, LanguageExperiment):
        made.export(target, state)
        return
    from trimtab.policies.language import NOTES

    policy = made.policy
    policy.model.to(policy.wide).merge_and_unload().save_pretrained(target)  # its base may be held in bfloat16
    policy.tokenizer.save_pretrained(target)
    (target / NOTES).write_text(json.dumps({"chat": policy.chat}) + "\n")
