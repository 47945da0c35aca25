"""Which fields of a record are prompt, answer and verifier: published shapes, or a mapping."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_occ.data.boxes import final_box
from megatron_occ.data.records import Record

# In the order in which they are looked for. DAPO-Math-17k, verl: prompt (messages) and
# reward_model.ground_truth; GSM8K: question, answer; MATH, NuminaMath: problem, answer or solution;
# AIME: problem or Problem, answer or Answer; OlympiadBench: question, final_answer.
PROMPT_FIELDS = ("prompt", "problem", "question", "Problem", "messages")
ANSWER_FIELDS = (
    *("answer", "reward_model.ground_truth", "final_answer", "ground_truth", "expected_answer"),
    *("Answer", "solution"),
)
# A published name of a set counts where a verifier has it.
_VERIFIER_FIELDS = ("task_name", "data_source")
_FINAL_ANSWER_MARK = "####"

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Fields:
    """Dotted names of fields.

    Args:
        prompt: text, or messages of a chat.
        answer: text, a number, or a list of them.
        task_name: name of the verifier; None: there is none.
    """

    prompt: str
    answer: str
    task_name: str | None = None

    def __str__(self) -> str:
        names = [self.prompt, self.answer, *([self.task_name] if self.task_name else [])]
        return ", ".join(names)


def recognise(record: Record, given: Mapping[str, str | None], verifiers: Container[str]) -> Fields:
    """The fields of a record.

    Args:
        record: of a file, whose records may differ.
        given: names by "prompt", "answer" and "task_name"; None: recognise it.
        verifiers: known names.

    Raises:
        ValueError: no field is known, or one that was given is not there.
    """
    prompt = _field(record, given["prompt"], PROMPT_FIELDS, "prompt")
    answer = _field(record, given["answer"], ANSWER_FIELDS, "answer")
    task_name = given["task_name"]
    if task_name is None:
        named = (name for name in _VERIFIER_FIELDS if _names_verifier(record, name, verifiers))
        task_name = next(named, None)
    return Fields(prompt, answer, task_name)


def _field(record: Record, given: str | None, known: Sequence[str], what: str) -> str:
    names = known if given is None else (given,)
    found = next((name for name in names if _look_up(record.values, name) is not None), None)
    if found is not None:
        return found
    has = ", ".join(sorted(record.values)) or "nothing"
    if given is not None:
        raise ValueError(f"{record.place}: no data.fields.{what}={given}; the record has {has}")
    raise ValueError(
        f"{record.place}: no field for the {what} among {', '.join(names)}; the record has {has}. "
        f"Give data.fields.{what}=NAME"
    )


def _names_verifier(record: Record, name: str, verifiers: Container[str]) -> bool:
    # null is no name, and told as such
    return name in record.values and (name == "task_name" or record.values[name] in verifiers)


def _look_up(values: Any, name: str) -> Any:
    """The value under a dotted name; None where there is none."""
    for part in name.split("."):
        if not isinstance(values, dict):
            return None
        values = values.get(part)
    return values


def read_prompt(record: Record, fields: Fields) -> str | Messages:
    """Text, or messages of a chat that ends in a user's.

    Raises:
        ValueError: neither, with place and field.
    """
    value = _look_up(record.values, fields.prompt)
    where = f"{record.place}: {fields.prompt!r}"
    if isinstance(value, list):
        return _messages(value, where)
    return _text(value, where)


def read_answer(record: Record, fields: Fields) -> str:
    """The reference answer as text.

    Of a worked solution what follows the last ``####``; of a field "solution" without that mark
    the last box. Numbers are written in decimals, 27.0 as 27; lists with commas.

    Raises:
        ValueError: none of these, or nothing in it, with place and field.
    """
    value = _look_up(record.values, fields.answer)
    where = f"{record.place}: {fields.answer!r}"
    if not isinstance(value, list):
        return _one_answer(value, where, fields.answer)
    if not value:
        raise ValueError(f"{where} is an empty list")
    return ", ".join(_one_answer(entry, where, fields.answer) for entry in value)


def read_task_name(record: Record, fields: Fields, default: str) -> str:
    """Name of the verifier: the record's, where it has one.

    Raises:
        ValueError: it is no text.
    """
    if fields.task_name is None:
        return default
    value = _look_up(record.values, fields.task_name)
    return _text(value, f"{record.place}: {fields.task_name!r}")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} must be text, got {type(value).__name__} {value!r:.60}")
    if not value.strip():
        raise ValueError(f"{where} is empty")
    return value


def _one_answer(value: Any, where: str, field: str) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return _number(value, where)
    text = _text(value, where)
    if _FINAL_ANSWER_MARK in text:
        text = extract_final_answer(text)
        if not text:
            raise ValueError(f"{where} has nothing after {_FINAL_ANSWER_MARK!r}")
    elif field.rpartition(".")[2] == "solution":
        boxed = final_box(text)
        if boxed is None:
            raise ValueError(
                f"{where} has neither {_FINAL_ANSWER_MARK!r} nor a box with the answer"
            )
        text = boxed
    return text.strip()


def extract_final_answer(text: str) -> str:
    """What follows the last ``####`` (the GSM8K convention), else the whole text; stripped."""
    return text.rpartition(_FINAL_ANSWER_MARK)[2].strip()


def _number(value: float, where: str) -> str:
    if not math.isfinite(value):
        raise ValueError(f"{where} must be a finite number, got {value}")
    return str(int(value)) if value == int(value) else repr(value)


def _messages(value: list[Any], where: str) -> Messages:
    messages = []
    for number, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"{where}[{number}] must be a message with role and content")
        content = _content(message.get("content"), f"{where}[{number}].content")
        messages.append({"role": message["role"], "content": content})
    if not messages or messages[-1]["role"] != "user":
        last = messages[-1]["role"] if messages else "nothing"
        raise ValueError(f"{where}: the last message must be the user's, got {last}")
    return messages


def _content(value: Any, where: str) -> str:
    """Text, or a list of parts of text as some servers write it."""
    if isinstance(value, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in value]
        if not all(isinstance(part, str) for part in parts):
            raise ValueError(f"{where}: parts that are no text can't be read")
        value = "".join(parts)
    if not isinstance(value, str):
        raise ValueError(f"{where} must be text, got {type(value).__name__} {value!r:.60}")
    return value
