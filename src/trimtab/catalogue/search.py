"""Find a method by whatever one remembers of it: a name, an alias, a title, an arXiv id, a preset, an idea."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import SequenceMatcher

from trimtab.core.errors import TrimtabError
from trimtab.core.registry import Definition, methods

# What a word is worth where it is found; a whole name counts more than a part of one.
_EXACT = {"name": 100, "alias": 90, "arXiv": 90, "preset": 60}
_PART = {"name": 50, "alias": 45, "arXiv": 40, "preset": 30, "title": 20, "idea": 8, "confusable": 4}
_WHOLE = 10  # added when the whole text stands there as written
_NEAR = 0.5  # similarity from which a name is suggested


class SearchError(TrimtabError):
    """Nothing was asked for."""


@dataclass(frozen=True)
class Hit:
    """A method that was found: how well, and where each word was seen."""

    definition: Definition
    score: int
    why: tuple[str, ...]


def search(text: str) -> list[Hit]:
    """Methods in which *every* word of `text` is found, best first; equally good ones in order of registration.

    A word counts where it begins a word of the name, an alias, the arXiv id, a preset's name, the paper's title, the
    docstring (the idea) or the note on what it is confused with, in this order of worth; case, `-` and `_` do not
    matter, and the whole text may be a name itself (`Dr. GRPO` is `dr_grpo`).
    Raises SearchError for a text without a letter or digit.
    """
    words = _words(text)
    if not words:
        raise SearchError(f"--search {text!r} has no word to look for; give a name, an arXiv id, or words of an idea")
    hits = [hit for d in methods().values() if (hit := _match(d, text, words))]
    return sorted(hits, key=lambda hit: -hit.score)


def near(text: str, most: int = 3) -> list[str]:
    """Names of the methods whose name or alias is most like `text`, for when nothing was found."""
    wanted = _squash(text)
    likeness: dict[str, float] = {}
    for d in methods().values():
        for spelling in (d.name, *d.aliases):
            likeness[d.name] = max(likeness.get(d.name, 0.0), SequenceMatcher(None, wanted, _squash(spelling)).ratio())
    good = sorted((name for name, value in likeness.items() if value >= _NEAR), key=lambda name: -likeness[name])
    return good[:most]


def _match(d: Definition, text: str, words: list[str]) -> Hit | None:
    places = _places(d)
    whole = _squash(re.sub(r"(?i)^arxiv:|v\d+$", "", text.strip()))
    score, why = 0, dict[str, None]()  # an ordered set
    for kind, value in places:
        if kind in _EXACT and _squash(value) == whole:
            return Hit(d, _EXACT[kind] + _WHOLE, (f"{kind} {value}",))
    for word in words:
        best = max(((_worth(kind, value, word), kind, value) for kind, value in places), key=lambda found: found[0])
        if best[0] == 0:
            return None
        score += best[0]
        why[_said(best[1], best[2], word)] = None
    if any(" ".join(words) in " ".join(_words(value)) for _, value in places):
        score += _WHOLE
    return Hit(d, score, tuple(why))


def _places(d: Definition) -> list[tuple[str, str]]:
    return [
        ("name", d.name),
        *(("alias", alias) for alias in d.aliases),
        ("arXiv", d.arxiv),
        *(("preset", preset) for preset in d.presets),
        ("title", d.title),
        ("idea", d.doc),
        ("confusable", d.confusable),
    ]


def _worth(kind: str, value: str, word: str) -> int:
    if kind in _EXACT and _squash(value) == _squash(word):
        return _EXACT[kind]
    return _PART[kind] if _first(value, word) is not None else 0


def _first(value: str, word: str) -> str | None:
    """The first word of `value` that begins with `word`."""
    return next((w for w in _words(value) if w.startswith(word)), None)


def _said(kind: str, value: str, word: str) -> str:
    if kind in _EXACT:
        return f"{kind} {value}"
    return f"{'not to be confused' if kind == 'confusable' else kind}: {_first(value, word)}"


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:\.[^\W_]+)*", text.lower())


def _squash(text: str) -> str:
    return re.sub(r"[\W_]+", "", text.lower())


def nothing_found(text: str) -> str:
    """The sentence for an empty result."""
    guesses: Iterable[str] = near(text)
    said = ", ".join(map(repr, guesses))
    hint = f"Nearest: {said}." if said else "`trimtab methods` lists all of them."
    return f"No method has {text!r} in its name, aliases, title, arXiv id, presets or description. {hint}"
