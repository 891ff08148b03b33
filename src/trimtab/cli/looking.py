"""Commands that only look: methods, diff, explain, doctor."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Annotated, Any

from tyro.conf import Positional, UseAppendAction, arg

from trimtab.cli.printing import table
from trimtab.cli.setting import Expression, Folder


@dataclass(frozen=True)
class Methods:
    """List the methods, or search them: what each changes, and in which stages."""

    search: str | None = None
    """Words of a name, alias, title, arXiv id, preset or idea; all must be found. None found is no error (exit 0)."""
    json: bool = False
    """Print a JSON list instead of a table."""

    def __call__(self) -> int:
        from trimtab.catalogue.describe import method_rows

        if self.search is not None:
            return self._found(self.search)
        rows = method_rows()
        if self.json:
            print(json.dumps(rows, indent=1))
            return 0
        heads = ["name", "base", "world", "what it is", "paper", "stages it sets"]
        keys = ("name", "base", "world", "title", "arxiv")
        table("methods", heads, [[*(r[k] or "-" for k in keys), ", ".join(r["stages"])] for r in rows])
        return 0

    def _found(self, text: str) -> int:
        from trimtab.catalogue.describe import method_rows
        from trimtab.catalogue.search import nothing_found, search

        hits, rows = search(text), {r["name"]: r for r in method_rows()}
        if self.json:
            found = [{**rows[h.definition.name], "score": h.score, "why": list(h.why)} for h in hits]
            print(json.dumps(found, indent=1))
        if not hits:
            print(nothing_found(text), file=sys.stderr if self.json else sys.stdout)
        elif not self.json:
            lines = [[h.definition.name, h.definition.title, h.definition.arxiv or "-", "; ".join(h.why)] for h in hits]
            table(f"methods with {text!r}", ["name", "what it is", "paper", "found in"], lines)
        return 0


@dataclass(frozen=True)
class Diff:
    """Print exactly what differs between two methods."""

    a: Annotated[Positional[str], arg(metavar="A", help="A method expression.")]
    b: Annotated[Positional[str], arg(metavar="B", help="Another one.")]
    json: bool = False
    """Print a JSON list instead of a table."""

    def __call__(self) -> int:
        from trimtab.core.method import diff
        from trimtab.core.registry import parse

        rows = diff(parse(self.a), parse(self.b))
        if self.json:
            print(json.dumps([{"address": p, "a": x, "b": y} for p, x, y in rows], indent=1))
        elif not rows:
            print(f"{self.a} and {self.b} are the same method")
        else:
            table(f"{self.a} -> {self.b}", ["address", self.a, self.b], [[p, x or "-", y or "-"] for p, x, y in rows])
        return 0


@dataclass(frozen=True)
class Explain:
    """Print the numbered pipeline of a method, with every option's value and where it comes from."""

    method: Expression
    set: UseAppendAction[tuple[str, ...]] = ()
    """piece.option=value, as for train."""
    policy: str = ""
    """A run whose networks a control method begins with, as for train."""
    json: bool = False
    """Print a JSON list instead of a table."""

    def __call__(self) -> int:
        from trimtab.catalogue.describe import pipeline
        from trimtab.runs.request import Request, configured

        method = configured(Request(self.method, self.policy, "", "", set=self.set))
        title, rows, notes = pipeline(method)
        if self.policy:
            notes.append(f"note: {self._started(method)}")
        if self.json:
            print(json.dumps([dict(zip(("place", "address", "value", "origin"), r)) for r in rows], indent=1))
            return 0
        table(title, ["#", "address", "value", "set by"], rows)
        for note in notes:
            print(note)
        return 0

    def _started(self, method: Any) -> str:
        """What the networks begin with. Raises MethodError for a language method, of which a policy changes nothing."""
        from trimtab.core.errors import MethodError
        from trimtab.policies.start import read_start
        from trimtab.runs.worlds import world_of

        if world_of(self.method) != "control":
            raise MethodError(f"{self.method} is the same method whatever policy it trains; leave --policy out")
        return read_start(self.policy).said(method)


@dataclass(frozen=True)
class Report:
    """Write the report of a run anew, finished or running, and say what its numbers suggest (exit code 0 either way).

    trimtab report runs/grpo-tiny-s0
    """

    run: Folder
    json: bool = False
    """Print the object of findings.json and nothing else."""

    def __call__(self) -> int:
        from trimtab.report.diagnose import RULES
        from trimtab.report.folder import RunFolder
        from trimtab.report.html import write_report

        page = write_report(self.run)
        made = RunFolder(self.run).read_json("findings")
        if self.json:
            print(json.dumps(made))
            return 0
        for found in made["findings"]:
            print(f"- {found['sentence']}")
        about = {rule.kind: rule.about for rule in RULES}
        calm = [about[kind] for kind in made["checked"] if kind not in {f["kind"] for f in made["findings"]}]
        print(f"no finding: {'; '.join(calm)}" if calm else "nothing else could be checked")
        print(f"report: {page}")
        return 0


@dataclass(frozen=True)
class Doctor:
    """Say what this machine has for trimtab, and what to do about what is missing."""

    json: bool = False
    """Print a JSON object instead of lines."""

    def __call__(self) -> int:
        from trimtab.catalogue.describe import diagnose_machine

        facts, advice = diagnose_machine()
        if self.json:
            print(json.dumps({"facts": facts, "advice": advice}, indent=1))
        else:
            table("this machine", ["what", "found"], [[k, str(v)] for k, v in facts.items()])
            print("\n".join(f"- {a}" for a in advice) if advice else "Nothing to do: `trimtab train` will work here.")
        return 1 if "missing" in facts.values() else 0
