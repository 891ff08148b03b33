"""docs/faults.md: every row names a test that exists, and every test of faults stands in a row."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "faults.md").read_text()
ROWS = [line for line in DOCUMENT.splitlines() if line.startswith("| ") and "::" in line]
# Mechanics rather than faults: they need no row of their own.
HELPERS = {"test_documented.py"}


def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def named() -> set[tuple[str, str]]:
    return set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", DOCUMENT))


@pytest.mark.parametrize(("path", "name"), sorted(named()))
def test_a_test_named_in_the_table_exists(path: str, name: str) -> None:
    assert (ROOT / path).is_file(), path
    assert name in functions(ROOT / path), f"{path} has no {name}"


def test_every_row_says_what_happens_and_names_a_test() -> None:
    assert len(ROWS) > 30
    for row in ROWS:
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        assert len(cells) == 4, row
        assert all(cells), row
        assert re.fullmatch(r"(`tests/[\w/]+\.py::\w+`(, )?)+", cells[3].strip("| ")), row


PLACES = sorted(set(re.findall(r"`([a-z]+/?[a-z_]*\.\w+(?:\.\w+)*)`", DOCUMENT)) - {"config.json"})


@pytest.mark.parametrize("name", PLACES)
def test_a_place_named_in_the_table_exists(name: str) -> None:
    source = ROOT / "src" / "trimtab"
    module, _, path = name.removesuffix(".py").partition(".")
    assert (source / f"{module}.py").is_file()
    text = (source / f"{module}.py").read_text()
    assert all(re.search(rf"(def|class) {part}\b", text) for part in path.split(".") if part), name


def test_every_file_of_fault_tests_stands_in_the_table() -> None:
    files = {p.name for p in (ROOT / "tests" / "faults").glob("test_*.py")} - HELPERS
    assert files <= {Path(path).name for path, _ in named()}
