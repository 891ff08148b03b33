"""Problems from files: JSON lines, and the library `datasets` (hub names, saved folders, parquet folders)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trimtab.core.errors import EnvironmentFailure, nearest
from trimtab.environments.pools import ListedPool
from trimtab.environments.problem import (
    Problem,
    Prompt,
    PromptTemplate,
    check_answer,
    check_asked,
    key_of,
    make_problem,
    plain_response,
    sentence_start,
)
from trimtab.environments.spec import Spec, check_options, nearest_path

COLUMNS: dict[str, type | tuple[type, ...]] = {"question": str, "answer": str, "answer_after": str}


class Columns:
    """Which fields hold question and answer: those the spec names, else "prompt" or "question", and "answer".

    `answer_after="####"` keeps what follows the last such mark of the answer, its ends stripped.
    others: fields that stand for "answer", best first, where the spec names none. first: they go before "answer".
    """

    def __init__(
        self, spec: Spec, need_answer: bool, others: tuple[str, ...] = ("chosen",), first: bool = False
    ) -> None:
        self._others = (*others, "answer") if first else ("answer", *others)
        self._question: str | None = spec.options.get("question")
        self._named_answer: str | None = spec.options.get("answer")
        self._after: str | None = spec.options.get("answer_after")
        self._need = need_answer
        self.source = spec.name

    def question(self, fields: Mapping[str, Any], where: str) -> str:
        """Name of the field that holds the question."""
        if self._question is not None:
            if self._question not in fields:
                raise EnvironmentFailure(
                    f"The question field {self._question!r} is not in {where}. {nearest(self._question, fields)}"
                )
            return self._question
        found = [name for name in ("prompt", "question") if name in fields]
        if len(found) == 1:
            return found[0]
        if found:
            raise EnvironmentFailure(
                f"{sentence_start(where)} has both 'prompt' and 'question'. Say which one is asked: (question=prompt) "
                "or (question=question)."
            )
        raise EnvironmentFailure(
            f"{sentence_start(where)} has neither 'prompt' nor 'question'. Its fields: "
            f"{', '.join(sorted(fields)) or 'none'}. "
            "Rename one, or name it: (question=FIELD)."
        )

    def answer_name(self, fields: Mapping[str, Any], where: str) -> str:
        """Name of the field that holds the answer (it may be absent unless named or needed)."""
        if self._named_answer is not None and self._named_answer not in fields:
            raise EnvironmentFailure(
                f"The answer field {self._named_answer!r} is not in {where}. {nearest(self._named_answer, fields)}"
            )
        # Of preference pairs what was chosen is the reference.
        return self._named_answer or next((name for name in self._others if name in fields), "answer")

    def read(self, fields: Mapping[str, Any], where: str) -> tuple[Prompt, str | None]:
        """Question and answer of one row, checked."""
        name = self.question(fields, where)
        asked = check_asked(fields[name], name, where)
        answer_name = self.answer_name(fields, where)
        answer = check_answer(plain_response(fields.get(answer_name)), answer_name, where, self._need)
        if self._after is not None and answer is not None:
            _, mark, rest = answer.rpartition(self._after)
            if not mark:
                raise EnvironmentFailure(
                    f"The answer of {where} does not contain answer_after={self._after!r}: {answer[-60:]!r}."
                )
            answer = rest.strip()
        return asked, answer


class Distinct:
    """Keeps the first of equal questions; counts the others, and those among them whose answer differs."""

    def __init__(self) -> None:
        self._answers: dict[str, str | None] = {}
        self.duplicates = self.conflicting = 0

    def add(self, key: str, answer: str | None) -> bool:
        """Whether this question is new."""
        if key not in self._answers:
            self._answers[key] = answer
            return True
        self.duplicates += 1
        self.conflicting += self._answers[key] != answer
        return False

    def counts(self) -> dict[str, int]:
        return {"duplicates": self.duplicates, "conflicting_answers": self.conflicting}


def columns_of(spec: Spec, need_answer: bool, shown: bool) -> Columns:
    """The fields of a data set of problems, or of demonstrations (`shown`), whose answer is the whole response."""
    return Columns(spec, need_answer, ("response", "chosen"), first=True) if shown else Columns(spec, need_answer)


def identity(asked: Prompt, answer: str | None, shown: bool) -> str:
    """What makes an entry distinct: its question; of demonstrations the response too, as one question may have several.

    Its first 16 digits are those of the question's key, which decide the split.
    """
    key = key_of(asked)
    return key if not shown else key[:16] + hashlib.sha256(f"{key}\n{answer}".encode()).hexdigest()[:48]


def jsonl_pool(
    spec: Spec, template: PromptTemplate, holdout: float, need_answer: bool, shown: bool = False
) -> ListedPool:
    """`FILE.jsonl`: one object a line with `prompt` (text or chat messages) or `question`, and `answer`.

    Other fields are kept in the entry. Options in brackets: question=, answer= (names of fields), answer_after= (the
    mark before the final answer). shown: demonstrations, see `columns_of`. Raises EnvironmentFailure with file, line
    and column for a broken line, a missing or unusable field, an empty or missing file.
    """
    check_options(spec, COLUMNS)
    path = Path(spec.name).expanduser()
    columns, distinct = columns_of(spec, need_answer, shown), Distinct()
    problems: list[Problem] = []
    keys: list[str] = []
    for number, fields in _lines(path):
        where = f"line {number} of {path}"
        asked, answer = columns.read(fields, where)
        key = identity(asked, answer, shown)
        if distinct.add(key, answer):
            keys.append(key)
            problems.append(make_problem(asked, answer, fields, template, where))
    if not problems:
        raise EnvironmentFailure(
            f"The file {str(path)!r} holds no problem. Write one JSON object a line with 'question' and 'answer'."
        )
    return ListedPool(keys, problems.__getitem__, holdout, spec.text, **distinct.counts())


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if path.is_dir():
        raise EnvironmentFailure(
            f"{str(path)!r} is a folder, not a file. For a saved data set write 'datasets:{path}'."
        )
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise EnvironmentFailure(f"The file {str(path)!r} does not exist. {nearest_path(path)}") from None
    except OSError as error:
        raise EnvironmentFailure(f"The file {str(path)!r} cannot be read: {error.strerror}.") from None
    for number, raw in enumerate(lines, 1):
        place = f"{path}, line {number}"
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise EnvironmentFailure(
                f"{place}, byte {error.start + 1}: not UTF-8 text. Save the file as UTF-8."
            ) from None
        if not text.strip():
            continue
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise EnvironmentFailure(
                f"{place}, column {error.colno}: {error.msg}. Each line must be one complete JSON object."
            ) from None
        except (RecursionError, ValueError) as error:
            raise EnvironmentFailure(f"{place}: cannot be read ({error}).") from None
        if not isinstance(fields, dict):
            raise EnvironmentFailure(
                f"{place}, column 1: a {type(fields).__name__}, not an object. "
                'Each line must look like {"question": ..., "answer": ...}.'
            )
        yield number, fields


def datasets_pool(
    spec: Spec, template: PromptTemplate, holdout: float, need_answer: bool, shown: bool = False
) -> ListedPool:
    """`datasets:NAME(split=train, name=CONFIG, revision=..., question=..., answer=..., answer_after=...)`.

    NAME is a hub id, a folder written by save_to_disk, or a folder of parquet, JSON or CSV files. Rows stay where
    the library keeps them (mapped files); only the hashes of the questions are held in memory.
    """
    check_options(spec, COLUMNS | {"split": str, "name": str, "revision": str})
    data = _load(spec)
    columns, distinct = columns_of(spec, need_answer, shown), Distinct()
    fields = dict.fromkeys(data.column_names)
    label = f"data set {spec.name!r}"
    wanted = {columns.question(fields, label), columns.answer_name(fields, label)} & set(fields)
    light = data.select_columns(sorted(wanted))
    keys: list[str] = []
    rows: list[int] = []
    for row, values in enumerate(light):
        asked, answer = columns.read(values, f"row {row} of {spec.name}")
        key = identity(asked, answer, shown)
        if distinct.add(key, answer):
            keys.append(key)
            rows.append(row)
    if not keys:
        raise EnvironmentFailure(f"The data set {spec.text!r} has no rows. Choose another split.")

    def fetch(index: int) -> Problem:
        where = f"row {rows[index]} of {spec.name}"
        entry = data[rows[index]]
        asked, answer = columns.read({k: entry[k] for k in wanted}, where)
        return make_problem(asked, answer, entry, template, where)

    # The template meets the fields now rather than in the middle of a run.
    fetch(0)
    return ListedPool(keys, fetch, holdout, spec.text, **distinct.counts())


def _load(spec: Spec) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise EnvironmentFailure(
            f"The package 'datasets' is needed for {spec.text!r} ({error}). pip install datasets"
        ) from None
    path = Path(spec.name).expanduser()
    local = path.exists() or spec.name.startswith((".", "/", "~"))
    if local and not path.exists():
        raise EnvironmentFailure(f"The folder {str(path)!r} does not exist. {nearest_path(path)}")
    split = spec.options.get("split")
    options = {key: spec.options[key] for key in ("name", "revision") if key in spec.options}
    saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    if saved and options:
        raise EnvironmentFailure(
            f"{spec.text!r} is a saved folder; {', '.join(options)} only apply to a hub data set. Remove them."
        )
    try:
        data = datasets.load_from_disk(str(path)) if saved else None
        if not saved:
            source = str(path) if local else spec.name
            data = datasets.load_dataset(source, split=split or "train", **options)
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise EnvironmentFailure(
            f"The library datasets could not load {spec.text!r} ({type(error).__name__}: {reason}). "
            "Give a hub id that is reachable or cached, a folder written by save_to_disk, or a folder of parquet files."
        ) from None
    if isinstance(data, datasets.DatasetDict):
        if (split or "train") not in data:
            raise EnvironmentFailure(
                f"{spec.name!r} has no split {split or 'train'!r}. {nearest(split or 'train', data)}"
            )
        return data[split or "train"]
    if saved and split is not None:
        raise EnvironmentFailure(f"{spec.name!r} was saved as one data set without splits; remove split={split!r}.")
    return data
