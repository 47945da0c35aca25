"""Append-only JSON-lines files that survive a killed process and a resumed run."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

log = logging.getLogger(__name__)


def json_safe(value: Any) -> Any:
    """Return `value` with non-finite floats as the strings "nan", "inf" and "-inf".

    Python would write them as bare `NaN`, which is not JSON and stops `jq` and most other readers.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(item) for item in value]
    return value


def to_number(value: Any) -> float | None:
    """Return a logged value as a float, or None if it is not a number. Inverse of `json_safe`."""
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return float(value)
    return float(value) if value in ("nan", "inf", "-inf") else None


def parse_line(line: str | bytes) -> dict[str, Any] | None:
    """Return the JSON object in `line`, or None if there is none (a line cut off by a kill)."""
    try:
        record = json.loads(line)
    except ValueError:  # covers a bad encoding as well
        return None
    return record if isinstance(record, dict) else None


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON-lines file; a missing file has none, bad lines are skipped."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            record = parse_line(line)
            if record is not None:
                yield record
            elif line.strip():
                log.warning("%s, line %d: not a JSON object, skipped", path, number)


class JsonlFile:
    """One JSON-lines file, opened for appending at the first write and flushed after each line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] | None = None

    def append(self, record: dict[str, Any]) -> None:
        """Write one line. Raises TypeError for a value that JSON cannot hold.

        A file that was deleted meanwhile is begun anew; where its folder is gone as well, or the
        disk is full, OSError names it.
        """
        line = json.dumps(json_safe(record), allow_nan=False) + "\n"
        if self._file is not None and os.fstat(self._file.fileno()).st_nlink == 0:
            self.close()
            if not self.path.parent.is_dir():
                gone = "the folder was deleted while the run wrote to it"
                raise OSError(errno.ENOENT, gone, str(self.path.parent))
            log.warning("%s was deleted while the run wrote to it: begun anew", self.path)
        if self._file is None:
            self._file = self._open()
        try:
            self._file.write(line.encode("ascii"))
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def filter(self, keep: Callable[[dict[str, Any]], bool]) -> int:
        """Keep only the records for which `keep` is true; return how many lines went.

        The new file replaces the old one in one step, so a kill leaves either of them whole.
        Lines that are not JSON objects go too.
        """
        self.close()
        if not self.path.is_file():
            return 0
        dropped = 0
        temporary = self.path.with_name(self.path.name + ".tmp")
        with self.path.open("rb") as old, temporary.open("wb") as new:
            for line in old:
                record = parse_line(line)
                if record is not None and keep(record):
                    new.write(line.rstrip(b"\r\n") + b"\n")
                else:
                    dropped += 1
            new.flush()
            os.fsync(new.fileno())
        os.replace(temporary, self.path)
        return dropped

    def close(self) -> None:
        """Close the file; a later `append` opens it again."""
        if self._file is not None:
            # what is left in its buffer did not fit on the disk, and was told
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def _open(self) -> IO[bytes]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self.path.open("a+b")
        _drop_unfinished_line(file)
        return file


def _drop_unfinished_line(file: IO[bytes]) -> None:
    """Cut the file after its last newline, so that the next line does not join a broken one."""
    size = end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 65536)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        file.truncate(end)
