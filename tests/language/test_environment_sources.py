"""Where text problems come from: specs, files, data sets, procedures; and the sentence for each thing gone wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trimtab.core.errors import EnvironmentFailure
from trimtab.environments.spec import parse_spec
from trimtab.environments.text import load_environment

SUMS = "reasoning-gym:chain_sum(min_terms=2,max_terms=2,min_digits=1,max_digits=1)"


def refused(match: str, spec: str, **options) -> None:
    with pytest.raises(EnvironmentFailure, match=match):
        load_environment(spec, **options)


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def questions(count: int) -> list[dict]:
    return [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(count)]


# --- specs


def test_spec_literals_and_bare_words():
    spec = parse_spec(
        "datasets:org/name(split=train, name='a b', limit=-3, rate=.5, flag=True, parts=[1, {'k': None}])"
    )
    assert (spec.kind, spec.name) == ("datasets", "org/name")
    assert spec.options == {
        "split": "train",
        "name": "a b",
        "limit": -3,
        "rate": 0.5,
        "flag": True,
        "parts": [1, {"k": None}],
    }
    assert parse_spec("a (1).jsonl").name == "a (1).jsonl"
    assert parse_spec("a (1).jsonl(question=q)").options == {"question": "q"}
    assert parse_spec("toy:sum").options == {}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "is empty"),
        ("chain_sum", "Did you mean 'reasoning-gym:chain_sum'"),
        ("reasoning-gim:chain_sum", r"unknown kind.*Did you mean 'reasoning-gym'"),
        ("no/such.csv", "is not one trimtab knows"),
        ("toy:", "names no data set"),
        ("toy:sum)", r"'\)' without"),
        ("toy:sum(limit=3", "must end with"),
        ("toy:sum(3)", "has no name"),
        ("toy:sum(**x)", r"contain '\*\*'"),
        ("toy:sum(limit=3, limit=4)", "given twice"),
        ("toy:sum(limit=)", "cannot be read"),
        ("toy:sum(limit=2+x)", "is not a literal"),
        ("toy:sum(limit=__import__('os').getpid())", "is not a literal"),
        ("toy:sum(limit=true)", "limit=True"),
        ("toy:sum(limit=3).x(y=1)", "cannot be read"),
    ],
)
def test_spec_faults(text, match):
    with pytest.raises(EnvironmentFailure, match=match):
        parse_spec(text)


# --- toy


def test_toy_is_complete_and_plain():
    environment = load_environment("toy:sum(limit=5)")
    problems = environment.held_out() + environment.draw(environment.describe()["train"])
    assert len({p.key for p in problems}) == 36
    assert set("".join(p.question + (p.answer or "") for p in problems)) <= set("0123456789+-= ")
    assert all(environment.score(problems, [p.answer for p in problems]))
    assert not any(environment.score(problems, ["99"] * 36))


def test_toy_faults():
    refused("Did you mean 'sum'", "toy:sums")
    refused("Known: limit", "toy:sum(limits=3)")
    refused("between 1 and 99", "toy:sum(limit=0)")
    refused("must be int", "toy:sum(limit=five)")
    refused("must be int", "toy:sum(limit=True)")


# --- JSON lines


def test_jsonl_fields(tmp_path):
    rows = [{"question": f" {i}\n+ 1? ", "answer": i + 1, "level": "easy"} for i in range(20)]
    environment = load_environment(write(tmp_path / "f.jsonl", rows), prompt="[{level}] {question} {{}}")
    problem = environment.draw(1)[0]
    assert problem.entry["level"] == "easy"
    assert problem.prompt == f"[easy] {problem.question} {{}}"
    assert environment.score([problem], [f"  {problem.answer}\n"]) == [1.0]
    assert problem.where.startswith("line ")


def test_jsonl_messages(tmp_path):
    def row(i):
        return {
            "prompt": [{"role": "system", "content": "Be short."}, {"role": "user", "content": f"q{i}"}],
            "answer": "a",
        }

    environment = load_environment(
        write(tmp_path / "f.jsonl", [row(i) for i in range(9)]), prompt="Q: {question}", holdout=0
    )
    problem = environment.draw(1)[0]
    assert problem.prompt[0] == {"role": "system", "content": "Be short."}
    assert problem.prompt[1]["content"] == f"Q: {problem.question}"
    assert len({problem.key, *(p.key for p in environment.draw(8))}) == 9


def test_jsonl_duplicates_are_kept_once_and_counted(tmp_path):
    rows = [
        *questions(20),
        {"question": "What  is 3 + 3? ", "answer": "6"},
        {"question": "What is 4 + 4?", "answer": "9"},
    ]
    counts = load_environment(write(tmp_path / "f.jsonl", rows)).describe()
    assert counts["train"] + counts["held_out"] == 20
    assert (counts["duplicates"], counts["conflicting_answers"]) == (2, 1)


def test_jsonl_named_fields(tmp_path):
    rows = [{"ask": f"q{i}", "solution": f"long way #### {i}", "question": "x", "prompt": "y"} for i in range(9)]
    path = write(tmp_path / "f.jsonl", rows)
    environment = load_environment(f"{path}(question=ask, answer=solution, answer_after='####')", holdout=0)
    assert {(p.question, p.answer) for p in environment.draw(9)} == {(f"q{i}", str(i)) for i in range(9)}
    refused("both 'prompt' and 'question'", path)
    refused("Did you mean 'ask'", f"{path}(question=asks)")
    refused("Did you mean 'solution'", f"{path}(question=ask, answer=solutions)")
    refused("does not contain answer_after", f"{path}(question=ask, answer=solution, answer_after='####!')")
    refused("Did you mean 'question'", f"{path}(questions=ask)")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"question": "a", "answer": "b"}\n{"question": "a" "b"}\n', r"f\.jsonl, line 2, column 18: Expecting"),
        ('{"question": "a", "answer": "b"}\n\n[1]\n', "line 3, column 1: a list"),
        (
            '{"question": "a", "answer": "b"}\n{"qestion": "a", "answer": "b"}\n',
            "Line 2 of .*neither.*Its fields: answer, qestion",
        ),
        ('{"question": "a"}\n', "'answer' of line 1 .* is missing"),
        ('{"question": "a", "answer": ["b"]}\n', "'answer' of line 1 .* of type list"),
        ('{"question": " ", "answer": "b"}\n', "'question' of line 1 .* is empty"),
        ('{"question": 3, "answer": "b"}\n', "'question' of line 1 .* of type int"),
        ('{"prompt": [], "answer": "b"}\n', "'prompt' of line 1 .* of type list"),
        ('{"prompt": [{"role": "me", "content": "x"}], "answer": "b"}\n', "'role' out of system, user"),
        ('{"prompt": [{"role": "assistant", "content": "x"}], "answer": "b"}\n', "the last must be 'user'"),
        ("", "holds no problem"),
        ("\n \n", "holds no problem"),
        ('{"question": "a", "answer": "\ud800"}', "line 1, byte"),
    ],
)
def test_jsonl_faults(tmp_path, text, match):
    path = tmp_path / "f.jsonl"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    refused(match, str(path))


def test_jsonl_missing_files(tmp_path):
    write(tmp_path / "train.jsonl", questions(3))
    refused(r"Did you mean '.*train\.jsonl'", str(tmp_path / "trian.jsonl"))
    refused(r"holds: train\.jsonl", str(tmp_path / "zzzz.jsonl"))
    refused("The folder .*nowhere' does not exist either", str(tmp_path / "nowhere" / "train.jsonl"))
    (tmp_path / "d.jsonl").mkdir()
    refused("is a folder", str(tmp_path / "d.jsonl"))


def test_jsonl_answer_is_optional_for_a_function(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "lengths_reward.py").write_text("def score(problem, text):\n    return len(problem.entry['tags'])\n")
    path = write(tmp_path / "f.jsonl", [{"question": f"q{i}", "tags": ["a"] * i} for i in range(9)])
    environment = load_environment(path, reward="lengths_reward:score", holdout=0)
    problems = environment.draw(9)
    assert environment.score(problems, ["x"] * 9) == [len(p.entry["tags"]) for p in problems]
    with pytest.raises(EnvironmentFailure, match="cannot be demonstrated"):
        environment.demonstrations(1)
    environment.close()


# --- prompts


@pytest.mark.parametrize(
    ("prompt", "match"),
    [
        ("Answer this", "has no field"),
        ("{question} {answer}", "show the policy the answer"),
        ("{question", "is broken"),
        ("{question!r}", "only plain"),
        ("{question:>9}", "only plain"),
        ("{qestion}", r"does not have\. Known: a, b, question\. Did you mean 'question'"),
        ("{}", "does not have"),
    ],
)
def test_prompt_faults(prompt, match):
    with pytest.raises(EnvironmentFailure, match=match):
        load_environment("toy:sum", prompt=prompt).draw(1)


def test_prompt_does_not_change_what_is_asked():
    plain, framed = (load_environment("toy:sum", prompt=p) for p in (None, "Compute {question} now."))
    assert [p.key for p in plain.held_out()] == [p.key for p in framed.held_out()]
    assert framed.draw(1)[0].prompt.startswith("Compute ")


# --- datasets


@pytest.fixture
def table(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return datasets.Dataset.from_list([{"question": f"q{i % 18}", "answer": f"w = {i}", "level": i} for i in range(20)])


def test_datasets_saved_folder(table, tmp_path):
    table.save_to_disk(tmp_path / "saved")
    environment = load_environment(f"datasets:{tmp_path}/saved(answer_after='= ')", holdout=0)
    counts = environment.describe()
    assert (counts["train"], counts["duplicates"], counts["conflicting_answers"]) == (18, 2, 2)
    for problem in environment.draw(18):
        assert problem.answer == str(problem.entry["level"])
    refused("without splits", f"datasets:{tmp_path}/saved(split=test)")
    refused("only apply to a hub", f"datasets:{tmp_path}/saved(name=main)")
    refused("Did you mean 'question'", f"datasets:{tmp_path}/saved(question=qestion)")
    refused("Did you mean '.*saved'", f"datasets:{tmp_path}/svaed")


def test_datasets_splits_and_parquet(table, tmp_path):
    import datasets

    datasets.DatasetDict(train=table.select(range(12)), test=table.select(range(12, 15))).save_to_disk(
        tmp_path / "both"
    )
    assert load_environment(f"datasets:{tmp_path}/both", holdout=0).describe()["train"] == 12
    assert load_environment(f"datasets:{tmp_path}/both(split=test)", holdout=0).describe()["train"] == 3
    refused("Did you mean 'test'", f"datasets:{tmp_path}/both(split=tests)")
    (tmp_path / "files").mkdir()
    table.to_parquet(tmp_path / "files" / "part.parquet")
    assert load_environment(f"datasets:{tmp_path}/files", holdout=0).describe()["train"] == 18


def test_datasets_load_error_is_a_sentence(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def broken(*args, **kwargs):
        raise ConnectionError("no route\nto hub")

    monkeypatch.setattr(datasets, "load_dataset", broken)
    refused(r"could not load 'datasets:org/x' \(ConnectionError: no route to hub\)", "datasets:org/x")


# --- reasoning-gym


def test_gym_listed_pool_is_complete():
    pytest.importorskip("reasoning_gym")
    environment = load_environment(SUMS)
    counts = environment.describe()
    assert counts["pool"] == "listed"
    assert counts["train"] + counts["held_out"] == 200  # 10 x 10 numbers, + and -
    assert counts["held_out"] >= 50
    assert counts["not_made"] == 0


def test_gym_stream_never_ends_and_never_overlaps():
    pytest.importorskip("reasoning_gym")
    drawn, held = set(), []
    for seed in (0, 1):
        environment = load_environment("reasoning-gym:basic_arithmetic", seed=seed)
        assert environment.describe()["pool"] == "stream"
        held.append([p.key for p in environment.held_out(40)])
        keys = [p.key for p in environment.draw(150)]
        assert len(set(keys)) > 145
        drawn |= set(keys)
    assert held[0] == held[1]
    assert len(set(held[0])) == 40
    assert [p.key for p in load_environment("reasoning-gym:basic_arithmetic").held_out(9)] == held[0][:9]
    assert not drawn & set(held[0])
    assert len(drawn) > 280  # two seeds, two streams
    everything = load_environment("reasoning-gym:basic_arithmetic").held_out()
    assert 40 < len(everything) < 90  # those of the first 256 problems


def test_gym_own_parameters_and_fields():
    pytest.importorskip("reasoning_gym")
    environment = load_environment(
        "reasoning-gym:chain_sum(size=30, seed=7, max_terms=3)", prompt="{expression} = ?", holdout=0
    )
    assert environment.describe()["train"] == 30
    problem = environment.draw(1)[0]
    assert problem.prompt == f"{problem.entry['metadata']['expression']} = ?"
    assert isinstance(problem.entry["metadata"]["difficulty"]["num_terms"], tuple)
    parts = "[{'name': 'chain_sum', 'config': {'max_terms': 2}}, {'name': 'coin_flip', 'weight': 2.0}]"
    mixed = load_environment(f"reasoning-gym:composite(datasets={parts}, size=40)", holdout=0).draw(30)
    assert {p.entry["metadata"]["source_dataset"] for p in mixed} == {"chain_sum", "coin_flip"}


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("chain_sun", "Did you mean 'chain_sum'"),
        ("chain_sum(min_term=2)", r"Known: allow_negation.*Did you mean 'min_terms'"),
        ("chain_sum(min_terms=5,max_terms=2)", "max_terms must be >= min_terms"),
        ("chain_sum(min_terms=two)", "must be int, not str"),
        ("chain_sum(min_terms=2.5)", "must be int, not float"),
        ("chain_sum(allow_negation=1)", "must be bool"),
        ("chain_sum(seed=-1)", "must be an integer from 0"),
        ("chain_sum(size=0)", "must be an integer from 1"),
        ("chain_sum(size=2000000)", "Leave size out"),
        ("composite", "needs datasets="),
        ("composite(datasets=[{'name': 'chain_sun'}])", "Did you mean 'chain_sum'"),
    ],
)
def test_gym_faults(spec, match):
    pytest.importorskip("reasoning_gym")
    refused(match, f"reasoning-gym:{spec}")


def test_gym_without_reference_answers():
    pytest.importorskip("reasoning_gym")
    spec = "reasoning-gym:graph_color(size=12)"
    environment = load_environment(spec)
    assert environment.score(environment.draw(2), ["no idea", "what?"]) == [0.0, 0.0]
    with pytest.raises(EnvironmentFailure, match="cannot be demonstrated"):
        environment.demonstrations(1)
    with pytest.raises(EnvironmentFailure, match="own scorer"):
        load_environment(spec, reward="exact").draw(1)


def test_toys_pay_for_the_sum_the_first_or_the_larger_number() -> None:
    for name, right in (("sum", "9"), ("first", "2"), ("larger", "7")):
        environment = load_environment(f"toy:{name}(limit=9)", holdout=0.0)
        (problem,) = [p for p in environment.draw(100) if p.question == "2+7="]
        assert environment.score([problem] * 3, ["9", "2", "7"]) == [float(x == right) for x in ("9", "2", "7")]
