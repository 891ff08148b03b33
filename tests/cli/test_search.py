"""Finding methods by name, alias, title, arXiv id, preset and idea."""

from __future__ import annotations

import json
import re

import pytest

from trimtab.catalogue.search import SearchError, near, search
from trimtab.cli import main
from trimtab.core.registry import methods


def names(text: str) -> list[str]:
    return [hit.definition.name for hit in search(text)]


def test_every_method_is_first_for_its_own_name_alias_and_paper() -> None:
    for d in methods().values():
        for key in (d.name, d.name.upper().replace("_", "-"), *d.aliases, *([f"arXiv:{d.arxiv}v3"] if d.arxiv else [])):
            assert names(key)[0] == d.name, key
        assert d.name in names(d.title), d.title


def test_presets_and_ideas_say_where_they_were_found() -> None:
    hit = next(h for h in search("trl") if h.definition.name == "grpo")
    assert hit.why == ("preset trl",)
    with_preset = [d.name for d in methods().values() if "trl" in d.presets]
    assert names("trl")[: len(with_preset)] == with_preset, "in order of registration, before those that mention it"
    hit = next(h for h in search("leave-one-out baseline") if h.definition.name == "rloo")
    assert hit.why == ("title: leave", "title: one", "title: out", "title: baseline")
    for d in methods().values():
        word = max(re.findall(r"\b[a-z]{5,}\b", d.doc), key=len)
        assert d.name in names(word), f"{word} is in the description of {d.name}"


def test_all_words_must_be_found() -> None:
    assert "rloo" in names("leave baseline")
    assert names("leave baseline zebra") == []
    assert "grpo" not in names("leave baseline supervised")


def test_the_whole_text_as_written_ranks_higher() -> None:
    scores = {h.definition.name: h.score for h in search("policy optimization")}
    assert max(scores, key=scores.__getitem__) == names("policy optimization")[0]
    assert scores["grpo"] > {h.definition.name: h.score for h in search("optimization policy")}["grpo"]


def test_nothing_found_suggests_and_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert near("grop")[0] == "grpo"
    assert main(["methods", "--search", "grop"]) == 0
    assert "Nearest: 'grpo'" in capsys.readouterr().out
    assert main(["methods", "--search", "qqqq", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == []
    assert "No method has 'qqqq'" in captured.err


@pytest.mark.parametrize("text", ["", " ", "--", "_"])
def test_no_word_is_refused(text: str) -> None:
    with pytest.raises(SearchError, match="no word to look for"):
        search(text)


def test_json_has_the_fields_of_the_list_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--search", "2402.03300", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["name"], row["why"]) == ("grpo", ["arXiv 2402.03300"])
    assert {"world", "base", "title", "stages", "claim", "presets", "score"} <= set(row)
    assert main(["methods", "--search", "group std"]) == 0
    assert "found in" in capsys.readouterr().out
