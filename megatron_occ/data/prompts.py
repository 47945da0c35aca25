"""RL prompts from files: read, brought to one form, repeated ones left out."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from megatron_occ.config.words import counted
from megatron_occ.data.chat import ChatFormat
from megatron_occ.data.fields import read_answer, read_prompt, read_task_name, recognise
from megatron_occ.data.records import Record, read_records

DEFAULT_TASK_NAME = "math"
_NO_FIELDS: Mapping[str, str | None] = {"prompt": None, "answer": None, "task_name": None}


@dataclass(frozen=True)
class PromptRecord:
    """A prompt, its reference answer, the verifier to use, and its place in the source.

    Args:
        prompt: text that the model continues.
        answer: text that the verifier compares with.
        task_name: name of the verifier.
        index: 0-based position among the prompts of the source, or in the generated split.
        place: "file:line", or what else says where it comes from; "" for a generated problem.
    """

    prompt: str
    answer: str
    task_name: str
    index: int
    place: str = ""


@dataclass(frozen=True)
class PromptOptions:
    """How records become prompts.

    Args:
        fields: names of fields by "prompt", "answer" and "task_name"; None: recognised.
        verifier: of records that name none.
        verifiers: known names; a published "data_source" counts where it is one of them.
        chat: text around a prompt.
    """

    fields: Mapping[str, str | None] = field(default_factory=lambda: dict(_NO_FIELDS))
    verifier: str = DEFAULT_TASK_NAME
    verifiers: Container[str] = ()
    chat: ChatFormat = field(default_factory=ChatFormat)


@dataclass(frozen=True)
class PromptFile:
    """The prompts of a file.

    Args:
        path: of it.
        records: in its order.
        fingerprint: SHA-256 of its bytes.
        shapes: fields that were recognised, each kind of record once.
        left_out: what was left out, in words.
        weight: share of the prompts of a run, relative to those of other files; None: by size.
    """

    path: str
    records: Sequence[PromptRecord]
    fingerprint: str
    shapes: Sequence[str] = ()
    left_out: Sequence[str] = ()
    weight: float | None = None

    @property
    def description(self) -> str:
        """What was read, in a line."""
        text = (
            f"{counted(len(self.records), 'prompt')} from {self.path} ({' or '.join(self.shapes)})"
        )
        return f"{text}; left out: {'; '.join(self.left_out)}" if self.left_out else text


def read_prompts(
    path: str | os.PathLike[str], options: PromptOptions | None = None
) -> list[PromptRecord]:
    """The prompts of a file, in its order.

    Raises:
        ValueError: see :func:`read_prompt_file`.
    """
    return list(read_prompt_file(path, options).records)


def read_prompt_file(
    path: str | os.PathLike[str],
    options: PromptOptions | None = None,
    *,
    seen: dict[str, str] | None = None,
) -> PromptFile:
    """Read prompts from JSON lines, JSON or Parquet in a published shape.

    Args:
        path: of the file.
        options: see there.
        seen: prompts read so far with their answers, which is added to: repeated ones are left
            out; None: they stay.

    Raises:
        ValueError: a file that can't be read, a record without prompt or answer, or values that
            are empty or of another kind; with file and place.
    """
    options = options or PromptOptions()
    records: list[PromptRecord] = []
    shapes: dict[str, None] = {}
    repeated = contradicting = 0
    for entry in read_records(path):
        fields, record = _read(entry, options, len(records))
        if seen is not None and record.prompt in seen:
            repeated += 1
            contradicting += seen[record.prompt] != record.answer
            continue
        if seen is not None:
            seen[record.prompt] = record.answer
        records.append(record)
        shapes[fields] = None
    name = os.fspath(path)
    left_out = _repeated(repeated, contradicting)
    return PromptFile(name, records, _digest(name), list(shapes), left_out)


def first_prompts(
    path: str | os.PathLike[str], count: int, options: PromptOptions
) -> list[PromptRecord]:
    """The first prompts of a file, to see whether it can be read.

    Raises:
        ValueError: as :func:`read_prompt_file`, for what stands in these.
    """
    return [
        _read(entry, options, index)[1]
        for index, entry in enumerate(islice(read_records(path), count))
    ]


def _read(entry: Record, options: PromptOptions, index: int) -> tuple[str, PromptRecord]:
    fields = recognise(entry, options.fields, options.verifiers)
    prompt = read_prompt(entry, fields)
    try:
        text = options.chat.text(prompt)
    except ValueError as error:
        raise ValueError(f"{entry.place}: {fields.prompt!r}: {error}") from error
    answer = read_answer(entry, fields)
    task_name = read_task_name(entry, fields, options.verifier)
    return str(fields), PromptRecord(text, answer, task_name, index, entry.place)


def _repeated(count: int, contradicting: int) -> list[str]:
    if count == 0:
        return []
    other = f", {contradicting:,} of them with another answer" if contradicting else ""
    return [f"{count:,} that repeat a prompt{other}"]


def _digest(name: str) -> str:
    digest = hashlib.sha256()
    with Path(name).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def renumbered(records: Iterable[PromptRecord]) -> list[PromptRecord]:
    """The same prompts, each with its position here as its index."""
    return [replace(record, index=index) for index, record in enumerate(records)]


def without(file: PromptFile, unwanted: Container[int], why: str) -> PromptFile:
    """A file without the prompts at some indices, and with a word about it."""
    records = renumbered(record for record in file.records if record.index not in unwanted)
    count = len(file.records) - len(records)
    if count == 0:
        return file
    return replace(file, records=records, left_out=[*file.left_out, f"{count:,} {why}"])
