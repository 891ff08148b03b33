"""Checkpoints that are damaged or belong to another run, and a config.json edited by hand: what resume answers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.common import Say as Say
from tests.faults.common import ask, outcome, refused
from trimtab.core import state as module
from trimtab.core.state import checkpoints
from trimtab.report.folder import RunFolder
from trimtab.runs.experiment import train


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four turns with checkpoints of turns 2 and 4, and beside it one of six turns."""
    folder = tmp_path_factory.mktemp("runs")
    train(ask(folder / "four", steps=4), mode="silent")
    train(ask(folder / "six", steps=6), mode="silent")
    assert outcome(folder / "four")["tensors"] != outcome(folder / "six")["tensors"], "nothing would be compared"
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made / "four", tmp_path / "a")
    return tmp_path / "a"


def newest(run: Path) -> Path:
    return checkpoints(RunFolder(run).checkpoints)[-1]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def lacking(path: Path) -> None:
    manifest = json.loads(path.read_text())
    del manifest["digests"]
    path.write_text(json.dumps(manifest))


DAMAGE: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "truncated tensors": ("tensors.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-9])),
    "tampered tensors": ("tensors.safetensors", flip),
    "missing tensors": ("tensors.safetensors", Path.unlink),
    "tampered state": ("state.json", flip),
    "empty state": ("state.json", lambda p: p.write_text("")),
    "truncated manifest": ("manifest.json", lambda p: p.write_text(p.read_text()[:50])),
    "lacking manifest": ("manifest.json", lacking),
    "manifest of another shape": ("manifest.json", lambda p: p.write_text("[]")),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_without_it_the_run_goes_on_from_the_one_before(
    how: str, run: Path, made: Path, say: Say
) -> None:
    name, damage = DAMAGE[how]
    damage(newest(run) / name)
    records = RunFolder(run).metrics()
    said = say("resume", "a", "--steps", "6")
    refused(said, f"turn-00000004/{name} is damaged", "Delete that folder to go on from the checkpoint before it")
    assert RunFolder(run).metrics() == records, "a refusal changes nothing"
    shutil.rmtree(newest(run))
    assert newest(run).name == "turn-00000002"
    assert say("resume", "a", "--steps", "6").code == 0
    assert outcome(run) == outcome(made / "six"), "to the same bits as a run that was never damaged"


def test_without_any_checkpoint_left_the_run_begins_again(run: Path, made: Path, say: Say) -> None:
    shutil.rmtree(run / "checkpoints")
    assert say("resume", "a", "--steps", "6").code == 0
    assert outcome(run) == outcome(made / "six")


def edit(run: Path, **request: Any) -> None:
    path = run / "config.json"
    config = json.loads(path.read_text())
    config["request"] |= request
    path.write_text(json.dumps(config))


EDITS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "another method": (
        {"method": "rloo"},
        ("was written by grpo", "but this run is rloo", "the same method"),
    ),
    "other options": ({"method": "grpo(clip_high=0.3)"}, ("was written by grpo", "the same method and options")),
    "another setting": ({"set": ["collect.new_tokens=4"]}, ("the same method and options",)),
    "an unknown method": ({"method": "grop"}, ("Did you mean 'grpo'?",)),
    "an unknown key": ({"stepz": 3}, ("'stepz'", "Did you mean 'steps'?", "'versions'")),
    "another seed": ({"seed": 5}, ("asks for seed=5", "is of seed=0", "put 0 back")),
    "another environment": ({"env": "toy:sum(limit=6)"}, ("now has other problems", "start a new run")),
    "a number as text": ({"steps": "many"}, ("steps='many' must be a whole number",)),
    "no turns": ({"steps": 0}, ("steps=0 must be a whole number of at least 1",)),
    "an adapter": ({"lora": 2}, ("does not fit this run",)),
}


@pytest.mark.parametrize("how", EDITS)
def test_a_config_edited_by_hand_is_refused_and_nothing_changes(how: str, run: Path, say: Say) -> None:
    request, parts = EDITS[how]
    edit(run, **request)
    before = outcome(run)
    refused(say("resume", "a"), *parts)
    assert outcome(run) == before


@pytest.mark.parametrize(
    ("text", "part"),
    [("{", "cannot be read as JSON"), ("[]", "a JSON object is needed"), ("{}", "has no 'request'"),
     ('{"request": {"method": "grpo"}}', "has no 'policy'")],
)  # fmt: skip
def test_a_config_that_is_no_config_is_refused(text: str, part: str, run: Path, say: Say) -> None:
    (run / "config.json").write_text(text)
    refused(say("resume", "a"), "config.json", part)


def test_a_checkpoint_of_another_version_is_refused(run: Path, say: Say) -> None:
    path = newest(run) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": module.FORMAT + 1}))
    refused(say("resume", "a", "--steps", "6"), f"has format {module.FORMAT + 1}; this version reads format",
            "start a new run")  # fmt: skip


def test_resume_of_a_folder_that_holds_no_run(say: Say) -> None:
    Path("empty").mkdir()
    for place in ("empty", "nowhere"):
        refused(say("resume", place), f"there is no {place}/config.json", "a run folder?")
