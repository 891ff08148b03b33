from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from trimtab.report.folder import RunFolder, RunFolderError
from trimtab.report.lock import LockedError
from trimtab.report.records import RecordError, read_records, to_json, write_atomic

CONFIG = {"method": "bnpo", "seed": 0}


def run_of(path: Path, turns: int) -> RunFolder:
    with RunFolder(path).create(CONFIG) as folder:
        folder.write_eval({"turn": 0, "mean": 0.1})
        for turn in range(1, turns + 1):
            folder.write_metrics({"turn": turn, "reward": turn / 10})
            folder.write_samples([{"turn": turn, "response": "a"}, {"turn": turn, "response": "b"}])
    return folder


def test_create_write_read(tmp_path):
    folder = run_of(tmp_path / "deep" / "run", 3)
    assert folder.config() == CONFIG
    assert [r["turn"] for r in folder.metrics()] == [1, 2, 3]
    assert folder.evaluations() == [{"turn": 0, "mean": 0.1}]
    assert len(folder.samples()) == 6
    assert folder.damaged() == 0
    with pytest.raises(RunFolderError, match="not open"):
        folder.write_metrics({"turn": 4})


def test_records_reach_the_file_at_once(tmp_path):
    folder = RunFolder(tmp_path).create(CONFIG)
    folder.write_metrics({"turn": 1})
    assert RunFolder(tmp_path).metrics() == [{"turn": 1}]
    folder.sync()
    folder.close()
    folder.close()


def test_a_used_folder_is_refused_with_the_way_to_resume(tmp_path):
    run_of(tmp_path, 2)
    with pytest.raises(RunFolderError, match=r"2 turns.*`trimtab train --resume .*`"):
        RunFolder(tmp_path, resume_with="trimtab train --resume {path}").create(CONFIG)
    assert len(RunFolder(tmp_path).metrics()) == 2
    with RunFolder(tmp_path).resume(None):
        pass  # the refusal gave its lock back


def test_a_run_that_died_before_its_first_record_can_be_started_again(tmp_path):
    RunFolder(tmp_path).create(CONFIG).close()
    RunFolder(tmp_path).create({"method": "grpo"}).close()
    assert RunFolder(tmp_path).config() == {"method": "grpo"}
    (tmp_path / "checkpoints" / "000001").mkdir()
    with pytest.raises(RunFolderError, match="0 turns"):
        RunFolder(tmp_path).create(CONFIG)


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(RunFolderError, match="not a folder"):
        RunFolder(tmp_path / "x").create(CONFIG)


def test_resume_leaves_no_duplicates(tmp_path):
    run_of(tmp_path, 5)
    with RunFolder(tmp_path).resume(3) as folder:
        for turn in (4, 5):
            folder.write_metrics({"turn": turn, "again": True})
    records = RunFolder(tmp_path).metrics()
    assert [r["turn"] for r in records] == [1, 2, 3, 4, 5]
    assert [r.get("again", False) for r in records] == [False] * 3 + [True] * 2
    assert max(r["turn"] for r in RunFolder(tmp_path).samples()) == 3
    assert len(RunFolder(tmp_path).evaluations()) == 1


def test_resume_of_nothing(tmp_path):
    with pytest.raises(RunFolderError, match="no run to resume"):
        RunFolder(tmp_path).resume(1)


@pytest.mark.parametrize("cut", [1, 5, 15])
def test_a_torn_last_line_is_skipped_then_cut(tmp_path, cut):
    run_of(tmp_path, 3)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    left = 3 if cut == 1 else 2  # only the newline is gone: the record is whole
    assert [r["turn"] for r in RunFolder(tmp_path).metrics()] == [1, 2, 3][:left]
    assert RunFolder(tmp_path).damaged() == 0
    with RunFolder(tmp_path).resume(None) as folder:
        folder.write_metrics({"turn": 9})
    assert [r["turn"] for r in RunFolder(tmp_path).metrics()] == [*[1, 2, 3][:left], 9]


def test_damage_inside_is_counted_not_fatal(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"turn": 1}\n\x00\x00\xff\n[1]\n\n{"turn": 2}\n' + b"[" * 100_000 + b"\n")
    assert read_records(path) == ([{"turn": 1}, {"turn": 2}], 3)


def test_floats_that_are_not_finite_are_null_and_named(tmp_path):
    with RunFolder(tmp_path).create(CONFIG) as folder:
        folder.write_metrics({"turn": 1, "grad_norm": math.inf, "a": {"b": [1.0, math.nan]}, "c": -math.inf})
    line = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(line, parse_constant=pytest.fail)
    assert record["grad_norm"] is None
    assert record["a"] == {"b": [1.0, None]}
    assert record["not_finite"] == {"grad_norm": "inf", "a.b[1]": "nan", "c": "-inf"}


def test_what_json_can_take():
    @dataclass
    class Point:
        x: int

    value = {
        "p": Path("a"),
        "n": np.float32(0.5),
        "v": np.arange(2),
        "d": Point(1),
        "s": {"b", "a"},
        "t": (1, None),
        3: True,
    }
    assert json.loads(to_json(value)) == {
        "p": "a", "n": 0.5, "v": [0, 1], "d": {"x": 1}, "s": ["a", "b"], "t": [1, None], "3": True,
    }  # fmt: skip
    assert json.loads(to_json({"half": "\ud83d", "e": "é"})) == {"half": "\ud83d", "e": "é"}
    with pytest.raises(RecordError, match=r"options\.f holds a function"):
        to_json({"options": {"f": lambda: 0}})


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    write_atomic(path, "old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_json_that_is_missing_or_broken(tmp_path):
    with pytest.raises(RunFolderError, match="a run folder"):
        RunFolder(tmp_path).config()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RunFolderError, match="cannot be read"):
        RunFolder(tmp_path).config()
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(RunFolderError, match="list"):
        RunFolder(tmp_path).config()


def test_two_runs_in_one_process(tmp_path):
    first = RunFolder(tmp_path).create(CONFIG)
    with pytest.raises(LockedError, match="this process"):
        RunFolder(tmp_path).create(CONFIG)
    first.write_metrics({"turn": 1})
    first.close()
    RunFolder(tmp_path).resume(None).close()


# The lock is loaded by itself, since importing the package in the child would cost the test a second.
HOLD = """
import sys, importlib.util, pathlib, types
class TrimtabError(Exception): pass
errors = types.ModuleType("trimtab.core.errors"); errors.TrimtabError = TrimtabError
for name in ("trimtab", "trimtab.core"): sys.modules[name] = types.ModuleType(name)
sys.modules["trimtab.core.errors"] = errors
spec = importlib.util.spec_from_file_location("lock", sys.argv[2])
lock = importlib.util.module_from_spec(spec); spec.loader.exec_module(lock)
lock.FolderLock(pathlib.Path(sys.argv[1])).acquire()
print("held", flush=True); sys.stdin.read()
"""


@pytest.mark.skipif(os.name != "posix", reason="kills with SIGKILL")
def test_two_processes_and_the_lock_of_a_dead_one(tmp_path):
    import trimtab.report.lock as lock

    RunFolder(tmp_path).create(CONFIG).close()
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), str(lock.__file__)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdin is not None
    assert child.stdout is not None
    with child.stdin, child.stdout:
        assert child.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match=f"process {child.pid} .since "):
            RunFolder(tmp_path).resume(None)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert str(child.pid) in (tmp_path / ".lock").read_text()  # stale, and in nobody's way
        RunFolder(tmp_path).resume(None).close()
