"""kill -9 at random moments, and at chosen ones within a checkpoint: the run goes on to the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.faults.common import outcome
from trimtab.core.state import checkpoints
from trimtab.report.folder import RunFolder

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")

# One process imports everything; every attempt is a fork of it, so that dozens of kills take seconds.
CHILD = textwrap.dedent("""
    import json, os, random, signal, sys, time
    from pathlib import Path
    import transformers.models.llama.modeling_llama
    from tests.faults.common import ask
    from tests.faults.conftest import letters
    from trimtab.core import state
    from trimtab.environments import scoring
    from trimtab.runs.experiment import resume, train
    from trimtab.report import html
    from trimtab.report.folder import RunFolder
    from trimtab.core.state import checkpoints

    scoring.FAST["exact"] = letters
    root, dice = Path(sys.argv[1]), random.Random(int(sys.argv[2]))

    def page(folder):  # without plots, where most kills would land
        RunFolder(folder).write_json("findings", {"findings": [], "checked": []})
        return folder

    html.write_report = page
    STEPS = ("_write", "save_file", "_digest", "_sync")

    def die_within(name, nth):
        real, left = getattr(state, name), [nth]
        def step(*args, **more):
            left[0] -= 1
            if left[0] == 0 and dice.random() < 0.5:
                os.kill(os.getpid(), signal.SIGKILL)
            made = real(*args, **more)
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return made
        setattr(state, name, step)

    def attempt(out, fault):
        child = os.fork()
        if child:
            return child
        sys.stderr = open(root / "errors", "a")
        try:
            if fault:
                fault()
            if (out / "config.json").exists():
                resume(out, mode="silent")
            else:
                train(ask(out, steps=24, save_every=2, eval_every=6), mode="silent")
            os._exit(0)
        except BaseException as error:
            print(repr(error), getattr(error, "__notes__", ""), file=sys.stderr)
            os._exit(1)

    def ending(child):
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def await_turn(out, child, turn):
        records = out / "metrics.jsonl"
        while not (records.exists() and records.read_bytes().count(b"\\n") >= turn):
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return
            time.sleep(0.001)

    def killed(mode, most):
        # Attempts until one ends by itself, and the checkpoints that each of them found.
        kills, codes, seen, out = 0, [], [], root / mode
        while not codes or codes[-1] == -signal.SIGKILL:
            seen.append([c.name for c in checkpoints(out / "checkpoints")])
            if mode == "random":
                child = attempt(out, None)
                if kills < most:
                    await_turn(out, child, int(seen[-1][-1][5:] if seen[-1] else 0) + dice.randint(1, 4))
                    time.sleep(dice.uniform(0, usual / 16))  # about a turn, its evaluation or its checkpoint
                    os.kill(child, signal.SIGKILL)  # one that has ended is still ours to wait for
            else:
                name, nth = dice.choice(STEPS), dice.randint(1, 6)
                child = attempt(out, (lambda: die_within(name, nth)) if kills < most else None)
            codes.append(ending(child))
            kills += codes[-1] == -signal.SIGKILL
        return {"kills": kills, "codes": codes, "seen": seen}

    started = time.monotonic()
    assert ending(attempt(root / "whole", None)) == 0
    usual = time.monotonic() - started
    print(json.dumps({mode: killed(mode, 8) for mode in ("random", "within")}))
""")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """Runs "whole", "random" and "within" a checkpoint, what their attempts came to, and what was printed."""
    root, folder = Path(__file__).parents[2], tmp_path_factory.mktemp("killed")
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), "7"],
        capture_output=True, text=True, cwd=folder, check=False, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    errors = folder / "errors"
    return folder, json.loads(done.stdout), errors.read_text() if errors.exists() else ""


@pytest.mark.parametrize("mode", ["random", "within"])
def test_a_run_killed_again_and_again_ends_at_the_same_bits(mode: str, runs: tuple[Path, dict[str, Any], str]) -> None:
    folder, answers, errors = runs
    said, mine, whole = answers[mode], folder / mode, folder / "whole"
    assert said["codes"][-1] == 0, errors
    assert said["kills"] >= 3, f"too few kills to show anything: {said['codes']}"
    reached = [names[-1] if names else "" for names in said["seen"]]
    assert reached == sorted(reached), "a complete checkpoint was lost"
    assert len(set(reached)) > 2, "every kill came at the same moment"
    assert outcome(mine) == outcome(whole)
    assert [r["turn"] for r in RunFolder(mine).metrics()] == list(range(1, 25)), "no turn is missing or there twice"
    assert RunFolder(mine).damaged() == 0
    names = [sorted(p.name for p in (f / "checkpoints").iterdir()) for f in (mine, whole)]
    assert names[0] == names[1] == [c.name for c in checkpoints(whole / "checkpoints")]
