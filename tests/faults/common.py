"""The command line in this process, on the smallest policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file

from trimtab.cli import main
from trimtab.core.state import checkpoints
from trimtab.report.folder import RunFolder
from trimtab.runs.experiment import Request

ENV = "toy:sum(limit=5)"
SMALL = ("collect.prompts=3", "collect.group=4", "collect.new_tokens=3", "update.lr=3e-3")
# Rewards that differ within most groups of a random policy, so that parameters move.
LETTERS = "import zlib\ndef grade(problem, text):\n    return zlib.crc32(text.encode()) % 3\n"


class Said(NamedTuple):
    """What a command answered."""

    code: int
    out: str
    err: str


class Say:
    """Runs commands in this process; what they print is read through capsys."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *words: str) -> Said:
        code = main(list(words))
        out, err = self.capsys.readouterr()
        return Said(code, out, err)

    def train(self, out: Path | str, *words: str, method: str = "grpo", env: str = ENV, policy: str = "nano") -> Said:
        settings = [f"--set={s}" for s in SMALL] if method not in ("sft",) else ["--set=collect.prompts=3"]
        steps = [] if "--steps" in words else ["--steps", "4"]
        usual = ["--policy", policy, "--env", env, "--out", str(out), *settings, *steps]
        return self("train", method, *usual, *words)


def refused(said: Said, *parts: str) -> None:
    """Exit code 1 and one sentence that holds every part; no traceback."""
    assert said.code == 1
    for part in parts:
        assert part in said.err, said.err
    assert "Traceback" not in said.err
    assert said.err.startswith("trimtab: ")


def ask(out: Path, **more: Any) -> Request:
    usual = {"steps": 6, "set": SMALL, "eval_every": 2, "save_every": 2, "threads": 1}
    return Request("grpo", "nano", ENV, str(out), **{**usual, **more})


def outcome(path: Path) -> dict[str, Any]:
    """What two runs must agree on: the parameters' bytes, and every record without the time it took."""
    folder = RunFolder(path)
    newest = checkpoints(folder.checkpoints)[-1]
    tensors = load_file(newest / "tensors.safetensors")
    records = {k: getattr(folder, k)() for k in ("metrics", "evaluations", "samples")}
    plain = {k: [{n: v for n, v in r.items() if n != "seconds"} for r in rows] for k, rows in records.items()}
    return {"turn": newest.name, "tensors": {k: v.numpy().tobytes() for k, v in tensors.items()}, **plain}
