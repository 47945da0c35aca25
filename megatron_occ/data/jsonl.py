"""Reading JSON lines with errors that name the file and the line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any


def read_jsonl(path: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) for each line of a file that is not blank.

    Raises ValueError naming file and line for a line that is not UTF-8 text, not JSON or not a
    JSON object, and naming the file when it does not exist, is a folder or has no line that is
    not blank.
    """
    name = os.fspath(path)
    if os.path.isdir(name):
        raise ValueError(f"{name}: is a folder, expected a file with one JSON object a line")
    if not os.path.isfile(name):
        raise ValueError(f"{name}: no such file")
    empty = True
    # Bytes, because a text file stops at the first bad byte without telling in which line it is.
    with open(name, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                empty = False
                yield number, _parse_object(line, f"{name}:{number}")
    if empty:
        raise ValueError(f"{name}: the file is empty, expected one JSON object a line")


def text_field(record: dict[str, Any], key: str, where: str) -> str:
    """The non-empty text under ``key``; ValueError with ``where`` ("file:line") otherwise."""
    if key not in record:
        found = ", ".join(sorted(record)) or "nothing"
        raise ValueError(f"{where}: missing key {key!r}; the line has {found}")
    value = record[key]
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key!r} must be text, got {type(value).__name__} {value!r:.60}")
    if not value.strip():
        raise ValueError(f"{where}: {key!r} is empty")
    return value


def read_jsonl_texts(path: str | os.PathLike[str], key: str = "text") -> Iterator[str]:
    """Yield the text under ``key`` of each line, in file order, reading one line at a time.

    Raises ValueError as ``read_jsonl`` does, and for a missing, empty or non-text ``key``.
    """
    for number, record in read_jsonl(path):
        yield text_field(record, key, f"{os.fspath(path)}:{number}")


def parse_json(content: bytes, where: str) -> Any:
    """The value of JSON in UTF-8, with or without a byte order mark.

    Raises:
        ValueError: with ``where``, for anything else.
    """
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text: {error}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from error


def _parse_object(line: bytes, where: str) -> dict[str, Any]:
    record = parse_json(line, where)
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(record).__name__}")
    return record
