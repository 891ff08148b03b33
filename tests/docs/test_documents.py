"""What the documents show must work as shown."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import tyro

from tests.golden import twins
from tests.laws import checks
from tests.laws.table import table
from trimtab import cli
from trimtab.core import registry
from trimtab.core.registry import methods, parse

ROOT = Path(__file__).parents[2]


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), re.S)


def test_the_readme_shows_the_two_commands_first() -> None:
    first = blocks("README.md", "bash")[0]
    assert [line.split("#")[0].strip() for line in first.strip().splitlines()] == ["make run", "make test"]


def test_python_of_the_readme_runs_on_the_smallest_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loop, change, inside = blocks("README.md", "python")
    small = re.sub(r'"reasoning-gym:[^"]*"', '"toy:sum(limit=5)"', loop.replace('"smollm2"', '"nano"'))
    small = small.replace("until=60", "until=2").replace("% 20", "% 2").replace('"grpo(clip_high=0.28)"', '"grpo"')
    names: dict[str, Any] = {}
    exec(compile(small, "README.md", "exec"), names)
    assert (tmp_path / "model" / "config.json").exists()
    assert list((tmp_path / "checkpoints").glob("turn-*"))
    exec(compile(change, "README.md", "exec"), names)
    assert parse("grpo(clip_high=0.28)").get("surrogate.bound.high") == 0.28
    compile(inside, "README.md", "exec")  # tests/integrations runs it
    (asked,) = re.findall(r'method="([^"]+)"', inside)
    parse(asked)


def test_commands_of_the_readme_are_understood() -> None:
    shown = [line for block in blocks("README.md", "bash") for line in block.replace("\\\n", " ").splitlines()]
    lines = [line for line in shown if line.startswith("trimtab ")]
    assert len(lines) >= 8
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        made: Any = tyro.cli(cli.Command, args=words)  # type: ignore[arg-type]
        if isinstance(made, cli.Train):
            parse(made.method)


def test_the_method_of_contributing_passes_the_laws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks("CONTRIBUTING.md", "python")
    written = [line for line in code.splitlines() if line.strip() and not line.startswith("from")]
    assert len(written) <= 20, f"the method of CONTRIBUTING has {len(written)} lines besides its imports"
    before = dict(registry._METHODS)
    path = tmp_path / "mean_scaled.py"
    path.write_text(code)
    spec = importlib.util.spec_from_file_location("mean_scaled", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mean_scaled", module)
    try:
        spec.loader.exec_module(module)
        entry = table()["mean_scaled"]
        checks.check_invariance(entry)
        checks.check_neutral(entry)
        checks.check_surrogate(entry)
        checks.check_resume_here(entry, tmp_path / "checkpoints")
    finally:
        registry._METHODS.clear()
        registry._METHODS.update(before)
    assert "mean_scaled" not in methods()
    assert "mean_scaled" not in twins.TWINS


def test_every_registered_method_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    missing = [name for name in methods() if f"`{name}`" not in text]
    assert not missing, f"the README's table of methods lacks {missing}"
