"""Every law over every method: registering a method is what puts it under these tests."""

from __future__ import annotations

import ast
import inspect
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.laws import checks
from tests.laws.table import Entry, table
from trimtab.core.check import pieces_of
from trimtab.core.loop import run
from trimtab.core.registry import methods
from trimtab.core.state import save

TABLE = table()
ENTRIES = pytest.mark.parametrize("entry", TABLE.values(), ids=TABLE.keys())
DEFINED = [e for e in TABLE.values() if e.definition is not None]
CHANGED = [e for e in DEFINED if e.definition and e.definition.base is not None]
SOURCE = Path(__file__).parents[2] / "src" / "trimtab"


def test_every_registered_method_is_in_the_table() -> None:
    assert set(methods()) <= set(TABLE)


@ENTRIES
def test_1_gradients_do_not_depend_on_how_the_batch_is_cut(entry: Entry) -> None:
    checks.check_invariance(entry)


@ENTRIES
def test_2_resume_is_bitwise(entry: Entry, tmp_path: Path) -> None:
    checks.check_resume_here(entry, tmp_path)


def test_2_one_fresh_process_resumes_every_method(tmp_path: Path) -> None:
    k, expected = checks.STEPS, {}
    for name, entry in TABLE.items():
        save(checks.advance(entry, k, 2 * k), tmp_path / name.replace(":", "_"))
        expected[name] = checks.digest(checks.advance(entry, 2 * k, 2 * k))
    child = textwrap.dedent("""
        import json, sys
        from pathlib import Path
        from tests.laws import checks
        from tests.laws.table import table
        from trimtab.core.loop import begin
        from trimtab.core.state import load
        folder, k, out = Path(sys.argv[1]), checks.STEPS, {}
        for name, entry in table().items():
            environment, models = entry.make(3)
            state = begin(entry.build(), environment, models, seed=3)
            load(state, folder / name.replace(":", "_"))
            out[name] = checks.digest(checks.advance(entry, k, 2 * k, state=state))
        print(json.dumps(out))
    """)
    root = Path(__file__).parents[2]
    places = os.pathsep.join([str(root), str(root / "src")])
    done = subprocess.run(
        [sys.executable, "-c", child, str(tmp_path)],
        capture_output=True, text=True, cwd=root, check=False, env={**os.environ, "PYTHONPATH": places},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    resumed = json.loads(done.stdout.strip().splitlines()[-1])
    for name, leaves in expected.items():
        differ = [k for k in leaves if resumed[name].get(k) != leaves[k]]
        assert not differ, f"{name} resumed in a fresh process differs in {differ[:5]}"


@pytest.mark.parametrize("entry", CHANGED, ids=[e.name for e in CHANGED])
def test_3_neutral_setting_is_the_base(entry: Entry) -> None:
    checks.check_neutral(entry)


@ENTRIES
def test_4_every_option_of_every_piece_is_read(entry: Entry) -> None:
    for _, piece in pieces_of(entry.build()):
        fn = inspect.unwrap(piece.fn)
        tree = ast.parse(textwrap.dedent(inspect.getsource(fn)))
        makers = [ast.parse(textwrap.dedent(inspect.getsource(make))) for make in piece.state.values()
                  if inspect.getsource(make).lstrip().startswith("def")]  # fmt: skip
        read = {n.id for t in (tree, *makers) for n in ast.walk(t) if isinstance(n, ast.Name)}
        words = (n.value for t in makers for n in ast.walk(t) if isinstance(n, ast.Constant))
        read |= {w for w in words if isinstance(w, str)}
        reserved = ("per", "rows", "unit")
        unread = [o for o in piece.options if o not in read and o not in reserved]
        assert not unread, f"{piece.name} accepts {unread} and never reads them"


@ENTRIES
def test_4_debug_mode_finds_no_undeclared_access(entry: Entry) -> None:
    environment, models = entry.make(0)
    steps = list(run(entry.build(), environment, models, until=checks.STEPS, debug=True))
    assert len(steps) == checks.STEPS


@ENTRIES
def test_5_surrogates_are_the_policy_gradient(entry: Entry) -> None:
    checks.check_surrogate(entry)


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_8_classes_are_abstract_or_final(path: Path) -> None:
    """No class of ours extends a concrete class of ours."""
    abstract = {"Schedule", "AppendOnly", "Protocol", "TrimtabError", "EnvironmentFailure", "MethodError"}
    ours = {
        n.name for p in SOURCE.rglob("*.py") for n in ast.walk(ast.parse(p.read_text())) if isinstance(n, ast.ClassDef)
    }
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            bases = {b.id for b in node.bases if isinstance(b, ast.Name)}
            concrete = (bases & ours) - abstract
            assert not concrete, f"{node.name} extends the concrete class {concrete}; wrap it instead"
