"""What is asked: problems, their identity, the held-out split, prompt templates, and the types of a failed score."""

from __future__ import annotations

import hashlib
import json
import math
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trimtab.core.errors import EnvironmentFailure, nearest

Prompt = str | list[dict[str, str]]

# Part of the hash behind the split: changing it moves every held-out set.
SALT = "trimtab/holdout/1"
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Problem:
    """One verifiable question.

    key: sha256 (hex) of SALT and the white-space-normalised question; it identifies the problem and decides the split.
    question: what is asked, before the prompt template. prompt: what the policy reads, text or chat messages.
    answer: the reference answer, None where the data set has none. entry: every other field of the data set.
    where: the place in the source ("line 3 of sums.jsonl"), for error sentences only.
    """

    key: str
    question: str
    prompt: Prompt
    answer: str | None
    entry: dict[str, Any]
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class Failure:
    """A response that could not be scored: the fault of the scorer, never of the response.

    kind: "raised", "timeout", "crashed", "not-a-number", "not-finite" or "no-answer". message: one sentence.
    """

    kind: str
    message: str


def normalise(text: str) -> str:
    """Strip the ends and turn each run of white space into one space; letters and signs are kept as they are."""
    return " ".join(text.split())


def key_of(question: Prompt) -> str:
    """Identity of a question: sha256 hex of SALT, a newline, and the normalised text (of messages: roles and texts)."""
    if not isinstance(question, str):
        question = json.dumps([[m["role"], normalise(m["content"])] for m in question], ensure_ascii=False)
    return hashlib.sha256(f"{SALT}\n{normalise(question)}".encode("utf-8", "surrogatepass")).hexdigest()


def is_held_out(key: str, holdout: float) -> bool:
    """Whether the problem is for evaluation: the first 64 bits of its key, as a share of 2^64, lie below holdout."""
    return int(key[:16], 16) < holdout * 2.0**64


class PromptTemplate:
    """The text around a question, such as "{question}" (default) or "Compute {expression}.".

    Fields are {question}, the scalar fields of the data set's entry, and those of its "metadata"; {{ and }} are braces.
    Raises EnvironmentFailure for a broken template, an unknown field, no field at all, or {answer} (the answer would
    leak).
    """

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise EnvironmentFailure(
                f"The prompt template {text!r} is broken ({error}). Write fields as {{question}}, a literal brace "
                f"as {{{{ or }}}}."
            ) from None
        self._parts = [(literal, name) for literal, name, _, _ in parts]
        if any(spec or conversion for _, _, spec, conversion in parts):
            raise EnvironmentFailure(
                f"The prompt template {text!r} uses a format after ':' or '!'; only plain {{fields}} are allowed."
            )
        names = {name for _, name in self._parts if name is not None}
        if not names:
            raise EnvironmentFailure(
                f"The prompt template {text!r} has no field, so every prompt would be the same. Put {{question}} "
                "where the question goes."
            )
        if "answer" in names:
            raise EnvironmentFailure(
                f"The prompt template {text!r} contains {{answer}}, which would show the policy the answer. Remove it."
            )

    def fill(self, question: str, entry: Mapping[str, Any], where: str) -> str:
        """The prompt text of one question."""
        if self.text == "{question}":
            return question
        fields = _scalars(entry.get("metadata"), entry) | {"question": question}
        fields.pop("answer", None)
        out = []
        for literal, name in self._parts:
            out.append(literal)
            if name is None:
                continue
            if name not in fields:
                raise EnvironmentFailure(
                    f"The prompt template uses {{{name}}}, which {where} does not have. {nearest(name, fields)}"
                )
            out.append(str(fields[name]))
        return "".join(out)


def _scalars(*sources: Any) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for source in sources:
        if isinstance(source, Mapping):
            out |= {k: v for k, v in source.items() if isinstance(k, str) and isinstance(v, (str, int, float))}
    return out


def sentence_start(where: str) -> str:
    """A place as the beginning of a sentence (str.capitalize would spoil the case of file names)."""
    return where[:1].upper() + where[1:]


def make_problem(
    asked: Prompt, answer: str | None, entry: dict[str, Any], template: PromptTemplate, where: str
) -> Problem:
    """Build a problem from a question text or chat messages; of messages, the template fills the last one."""
    if isinstance(asked, str):
        return Problem(key_of(asked), asked, template.fill(asked, entry, where), answer, entry, where)
    question = asked[-1]["content"]
    last = {**asked[-1], "content": template.fill(question, entry, where)}
    return Problem(key_of(asked), question, [*asked[:-1], last], answer, entry, where)


def check_asked(value: Any, name: str, where: str) -> Prompt:
    """A question as found in a file: non-empty text, or chat messages that end with the user's."""
    if isinstance(value, str):
        if not value.strip():
            raise EnvironmentFailure(f"The field {name!r} of {where} is empty; it must hold the question.")
        return value
    if not isinstance(value, list) or not value:
        raise EnvironmentFailure(
            f"The field {name!r} of {where} is {_kind(value)}; it must be text or a list of chat messages "
            '[{"role": "user", "content": "..."}].'
        )
    for message in value:
        good = isinstance(message, dict) and isinstance(message.get("content"), str) and message.get("role") in ROLES
        if not good:
            raise EnvironmentFailure(
                f"The field {name!r} of {where} holds the message {str(message)[:80]!r}; each needs a text 'content' "
                f"and a 'role' out of {', '.join(ROLES)}."
            )
    if value[-1]["role"] != "user":
        raise EnvironmentFailure(
            f"The messages in {name!r} of {where} end with role {value[-1]['role']!r}; the last must be 'user', "
            "which the policy answers."
        )
    return [dict(message) for message in value]


def check_answer(value: Any, name: str, where: str, required: bool) -> str | None:
    """A reference answer as found in a file: text or a number (written as Python writes it); None if absent."""
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise EnvironmentFailure(
                f"The field {name!r} of {where} is {value}, which is no number to compare with. Write the answer as "
                "text, or remove the line."
            )
        return str(value)
    if not required:
        return None
    if value is None:
        raise EnvironmentFailure(
            f"The field {name!r} of {where} is missing, and this reward compares with it. Add it, or give a reward "
            "'module:function'."
        )
    raise EnvironmentFailure(f"The field {name!r} of {where} is {_kind(value)}; an answer must be text or a number.")


def _kind(value: Any) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"


def plain_response(value: Any) -> Any:
    """The text of a response that is one message of the assistant; anything else as it is."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        return value[0].get("content") if value[0].get("role") == "assistant" else value
    return value


def response_of(problem: Problem, name: str) -> str:
    """The response in the field "chosen" or "rejected" of a problem's data."""
    value = plain_response(problem.entry.get(name))
    if not isinstance(value, str) or not value.strip():
        raise EnvironmentFailure(
            f"{sentence_start(problem.where or 'this problem')} has no response {name!r}. Preference pairs need the "
            f"fields 'prompt', 'chosen' and 'rejected', the last two as text or one message of the assistant."
        )
    return value
