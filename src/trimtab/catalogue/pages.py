"""A page per method, made from its definition: `python -m trimtab.catalogue.pages docs/methods`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from trimtab.catalogue.describe import pipeline, stages_of
from trimtab.catalogue.evidence import evidence
from trimtab.catalogue.options import Option, options
from trimtab.claims import statement_of
from trimtab.core.errors import TrimtabError
from trimtab.core.method import diff, show
from trimtab.core.registry import Definition, methods

MARK = "<!-- Made by `make docs` from the definition of the method; edit that, not this page. -->"
ENV = "reasoning-gym:chain_sum(min_terms=2,max_terms=2,min_digits=1,max_digits=1)"
PAIRS = "pairs.jsonl"
TRAINED_BY_CLI = "language"  # the world whose methods `trimtab train` can run


def pages(claims: Path) -> dict[str, str]:
    """`file name -> text` of every page and of their index. claims: the folder of `NAME.json` records of evidence.

    Raises EvidenceError naming the file for a record that cannot be read.
    """
    known = methods()
    made = {f"{name}.md": page(d, claims) for name, d in known.items()}
    return {"README.md": index(list(known.values()), claims), "edits.md": edits(list(known.values())), **made}


def write(folder: Path) -> list[str]:
    """Write all pages into `folder` and remove those of methods that are gone; returns the names that changed.

    Evidence is read from `../results/claims` beside the folder.
    """
    made = pages(folder.parent / "results" / "claims")
    folder.mkdir(parents=True, exist_ok=True)
    there = {p.name: p.read_text(encoding="utf-8") for p in folder.glob("*.md")}
    for name, text in made.items():
        if there.get(name) != text:
            (folder / name).write_text(text, encoding="utf-8")
    gone = [name for name, text in there.items() if name not in made and MARK in text]
    for name in gone:
        (folder / name).unlink()
    return sorted([name for name, text in made.items() if there.get(name) != text] + gone)


def index(known: list[Definition], claims: Path) -> str:
    """The table of all methods."""
    rows = []
    for d in known:
        found = evidence(claims / f"{d.name}.json")
        verdicts = ", ".join(dict.fromkeys(row.verdict for row in found)) if found else "none recorded"
        rows.append(
            [f"[`{d.name}`]({d.name}.md)", f"`{d.base.name}`" if d.base else "-", d.title, _paper(d) or "-",
             ", ".join(stages_of(d)), verdicts]
        )  # fmt: skip
    return _joined(
        "# Methods",
        MARK,
        "One page for each registered method: what it changes, its options, its pipeline, and what has been measured. "
        "`trimtab methods --search TEXT` finds them by name, paper or idea; [edits](edits.md) is a table of what each "
        "changes.",
        _table(["method", "base", "what it is", "paper", "stages it sets", "claims"], rows),
    )


KINDS = {"swap": "swaps", "wrap": "wraps", "then": "adds", "set": "sets", "drop": "drops"}


def edits(known: list[Definition]) -> str:
    """The table of what every method does to its base, by kind of edit."""
    rows = []
    for d, base in [(d, d.base) for d in known if d.base is not None]:
        made = d()
        done: dict[str, dict[str, None]] = {kind: {} for kind in KINDS}
        for one in [p.method for p in made.phases] or [made]:
            for e in one.edits:
                if e.by == d.name:
                    done[e.kind][f"`{e.path}`" + (f" ({e.text})" if e.kind == "wrap" else "")] = None
        rows.append([f"[`{d.name}`]({d.name}.md)", f"`{base.name}`", *(", ".join(done[k]) or "-" for k in KINDS)])
    return _joined(
        "# What each method does to its base",
        MARK,
        "With the default options. Two methods that swap one address, or one address inside the other, cannot be used "
        "together, but for a method and what it stands on; wraps stack. The rules are in "
        "[composition](../composition.md).",
        _table(["method", "base", *KINDS.values()], rows),
    )


def page(d: Definition, claims: Path) -> str:
    """One method's page."""
    return _joined(
        f"# `{d.name}`: {_plain(d.title)}",
        MARK,
        _facts(d),
        _plain(d.doc),
        "## What it changes",
        _changes(d),
        "## Options",
        _options(d),
        *(["## Presets", _presets(d)] if d.presets else []),
        *(["## Neutral setting", _neutral(d)] if d.neutral and d.base else []),
        "## Running it",
        _running(d),
        "## Pipeline",
        "Everything in force with the defaults, in running order (`trimtab explain " + d.name + "`).",
        _pipeline(d),
        "## Evidence",
        _evidence(d, claims / f"{d.name}.json"),
    )


# -- sections -------------------------------------------------------------------------------------------------------
def _facts(d: Definition) -> str:
    base = f"[`{d.base.name}`]({d.base.name}.md)" if d.base else "none, it is a method of its own"
    lines = [
        f"- Paper: {_paper(d) or 'none of its own'}",
        f"- Base: {base}",
        f"- World: {d.world}; sets the stages {', '.join(stages_of(d))}",
    ]
    if d.aliases:
        lines.append(f"- Also called: {', '.join(f'`{a}`' for a in d.aliases)}")
    if d.confusable:
        lines.append(f"- Not to be confused: {_plain(d.confusable)}")
    return "\n".join(lines)


def _changes(d: Definition) -> str:
    if d.base is None:
        return "It changes no base. Its pipeline is below."
    rows = [[_code(p), _code(a) or "-", _code(b) or "-"] for p, a, b in diff(d.base(), d())]
    if not rows:
        return f"With its defaults it is `{d.base.name}`; see its options."
    return _table(["address", f"in `{d.base.name}`", f"in `{d.name}`"], rows)


def _options(d: Definition) -> str:
    rows = [[_code(o.name), _code(show(o.default)), _where(o), _plain(o.text) or "-"] for o in options(d)]
    return _table(["option", "default", "read by", "what it is"], rows) if rows else "It has none."


def _where(option: Option) -> str:
    found = ", ".join(map(_code, option.read_by))
    return found if found else "seen only beside other options"


def _presets(d: Definition) -> str:
    rows = []
    for name, given in d.presets.items():
        differs = diff(d(), d(preset=name))
        rows.append(
            [_code(name), ", ".join(_code(f"{k}={show(v)}") for k, v in given.items()),
             ", ".join(_code(f"{p}: {a or '-'} -> {b or '-'}") for p, a, b in differs) or "nothing, these are defaults"]
        )  # fmt: skip
    table = _table(["preset", "sets", "which changes"], rows)
    return f'Written `{d.name}(preset="{next(iter(d.presets))}")`; options beside it win.\n\n{table}'


def _neutral(d: Definition) -> str:
    assert d.neutral is not None
    assert d.base is not None
    here, base = _call(d.name, d.neutral.options), _call(d.base.name, d.neutral.base_options)
    degree = {"exact": "to the bit", "rounding": "to rounding", "law": "as far as its law says"}
    said = f"`{here}` is `{base}` {degree.get(d.neutral.level, d.neutral.level)}"
    return f"{said}: {_plain(d.neutral.why)}." if d.neutral.why else f"{said}."


def _running(d: Definition) -> str:
    python = "\n".join(
        [
            "```python",
            "import trimtab",
            "",
            f'method = trimtab.parse("{d.name}")',
            "for step in trimtab.run(method, environment, policy, until=60):",
            "    print(step.turn, step.logs)",
            "```",
        ]
    )
    if d.world != TRAINED_BY_CLI:
        return python
    made = d()
    first = made.phases[0].method if made.phases else made
    pairs = first.get("collect").core.name == "preferences"
    needs = "`pairs.jsonl` has the fields prompt, chosen and rejected.\n\n" if pairs else ""
    env = PAIRS if pairs else f"'{ENV}'"
    return f"```bash\ntrimtab train {d.name} --policy smollm2 \\\n  --env {env}\n```\n\n{needs}{python}"


def _pipeline(d: Definition) -> str:
    _, rows, _ = pipeline(d())
    return _table(["#", "address", "value", "set by"], [[place, _code(a), _code(v), by] for place, a, v, by in rows])


def _evidence(d: Definition, path: Path) -> str:
    found = evidence(path)
    said = statement_of(d.name)
    claim = f"What the paper says: {_plain(said)}\n\n" if said else ""
    if not found:
        return claim + "No claim recorded yet."
    heads = ["claim", "metric", "arms (mean over seeds)", "effect [95% interval]", "detectable", "seeds", "seconds",
             "verdict"]  # fmt: skip
    rows = [
        [
            _plain(r.claim),
            _plain(r.metric),
            _plain(r.arms),
            r.effect,
            r.detectable,
            r.seeds,
            r.seconds,
            _plain(r.verdict),
        ]
        for r in found
    ]
    source = f"From [{path.name}](../results/claims/{path.name}). Detectable: the smallest effect it could have found."
    return f"{claim}{_table(heads, rows)}\n\n{source}"


# -- markdown -------------------------------------------------------------------------------------------------------
def _paper(d: Definition) -> str:
    return f"[arXiv {d.arxiv}](https://arxiv.org/abs/{d.arxiv})" if d.arxiv else ""


def _call(name: str, given: dict[str, Any]) -> str:
    inside = ", ".join(f"{k}={show(v)}" for k, v in given.items())
    return f"{name}({inside})" if inside else name


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _plain(text: str) -> str:
    """Prose as Markdown: what is between backticks stays, elsewhere nothing means emphasis, a tag or a heading."""
    parts = text.split("`")
    for i in range(0, len(parts), 2):
        for sign in "\\*_<#[":
            parts[i] = parts[i].replace(sign, "\\" + sign)
    return "`".join(parts)


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in r) + " |" for r in lines)


def _joined(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"


def main(argv: list[str]) -> int:
    """`python -m trimtab.catalogue.pages FOLDER`: write the pages, and say which changed."""
    if len(argv) != 1 or argv[0].startswith("-"):
        print("usage: python -m trimtab.catalogue.pages FOLDER (docs/methods in a checkout)", file=sys.stderr)
        return 2
    try:
        changed = write(Path(argv[0]))
    except TrimtabError as error:
        print(f"trimtab: {error}", file=sys.stderr)
        return 1
    print("\n".join(f"wrote {name}" for name in changed) or "nothing changed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
