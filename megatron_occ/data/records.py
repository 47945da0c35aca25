"""Records of a data file: JSON lines, JSON or Parquet, with errors that name file and place."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_occ.data.jsonl import parse_json, read_jsonl

_BATCH_ROWS = 1024
# where a JSON file holds its records in an object
_LISTS = ("data", "train", "test", "rows", "examples")


@dataclass(frozen=True)
class Record:
    """An object of a file.

    Args:
        values: by field.
        place: "file:12", the line, or "file, record 12", from 1.
    """

    values: dict[str, Any]
    place: str


def read_records(path: str | os.PathLike[str]) -> Iterator[Record]:
    """The objects of a file, in its order.

    ``*.parquet`` is a table, ``*.json`` a list of objects (alone, or under "data", "train", "test",
    "rows" or "examples") or JSON lines; anything else is JSON lines.

    Raises:
        ValueError: the file is not there, empty, or not what its name says; with the place.
    """
    name = os.fspath(path)
    if name.endswith(".parquet"):
        yield from _parquet(name)
    elif name.endswith(".json"):
        yield from _json(name)
    else:
        yield from _lines(name)


def _lines(name: str) -> Iterator[Record]:
    for number, values in read_jsonl(name):
        yield Record(values, f"{name}:{number}")


def _json(name: str) -> Iterator[Record]:
    _check_file(name)
    with open(name, "rb") as file:
        content = file.read()
    try:
        found = parse_json(content, name)
    except ValueError:
        # JSON lines are often named so; their errors name the line
        yield from _lines(name)
        return
    records = _list_in(found, name)
    if not records:
        raise ValueError(f"{name}: no record in it")
    for number, values in enumerate(records, start=1):
        place = f"{name}, record {number}"
        if not isinstance(values, dict):
            raise ValueError(f"{place}: expected an object, got {type(values).__name__}")
        yield Record(values, place)


def _list_in(found: Any, name: str) -> list[Any]:
    if isinstance(found, list):
        return found
    if not isinstance(found, dict):
        raise ValueError(f"{name}: expected a list of objects, got {type(found).__name__}")
    lists = [key for key in _LISTS if isinstance(found.get(key), list)]
    if len(lists) > 1:
        raise ValueError(f"{name}: has lists {' and '.join(lists)}. Give a file with one of them")
    return found[lists[0]] if lists else [found]


def _parquet(name: str) -> Iterator[Record]:
    _check_file(name)
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{name}: reading Parquet needs pyarrow: pip install pyarrow") from error
    try:
        file = pyarrow.parquet.ParquetFile(name)
        number = 0
        for batch in file.iter_batches(_BATCH_ROWS):
            for values in batch.to_pylist():
                number += 1
                yield Record(values, f"{name}, record {number}")
    except (pyarrow.ArrowException, OSError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{name}: not a Parquet file that can be read: {text:.200}") from error
    if number == 0:
        raise ValueError(f"{name}: no record in it")


def _check_file(name: str) -> None:
    if os.path.isdir(name):
        raise ValueError(f"{name}: is a folder, expected a file")
    if not os.path.isfile(name):
        raise ValueError(f"{name}: no such file")
