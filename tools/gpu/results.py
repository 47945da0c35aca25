"""Rows of the table, and the file that they are kept in."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

OK, INFO, SKIPPED, BELOW, FAILED = "ok", "-", "skipped", "below aim", "FAILED"


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Args:
        part: of the section.
        status: ``OK``, ``FAILED``: a number is wrong; ``BELOW``: right and slower or larger than
            aimed for; ``SKIPPED``: not possible here; ``INFO``: nothing to judge.
        text: what was found, in words.
        numbers: the same, to be read by programs.
        at: seconds after the section's begin.
    """

    part: str
    status: str
    text: str
    numbers: dict[str, Any] = field(default_factory=dict)
    at: float = 0.0


@dataclass
class SectionResult:
    """What a section found.

    Args:
        name: of the section.
        rows: in the order in which they were found.
        seconds: that it ran.
    """

    name: str
    rows: list[Row]
    seconds: float

    @property
    def has_failed(self) -> bool:
        """Whether any number is wrong, or a part did not come to its end."""
        return any(row.status == FAILED for row in self.rows)


def write_json(path: Path, content: Any) -> None:
    """Replace a file at once: a reader finds the old content or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(beside, path)


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """The rows of a section so far."""
    write_json(path, [asdict(row) for row in rows])


def read_rows(path: Path) -> list[Row]:
    """What :func:`write_rows` left; none without the file."""
    if not path.is_file():
        return []
    return [Row(**entry) for entry in json.loads(path.read_text())]


def write_results(path: Path, results: Iterable[SectionResult], about: dict[str, Any]) -> None:
    """All sections so far, and how the command was called."""
    write_json(path, {**about, "sections": [asdict(result) for result in results]})


def line(section: str, row: Row) -> str:
    """A row as it is printed."""
    return f"{section:<12}{row.part:<34}{row.status:<11}{row.text}"


def table(results: Sequence[SectionResult]) -> str:
    """All rows, and how many there are of each status."""
    lines = [line("section", Row("part", "", "found"))]
    for result in results:
        lines += [line(result.name, row) for row in result.rows]
    counts = Counter(row.status for result in results for row in result.rows)
    summary = ", ".join(f"{counts[s]} {s}" for s in (OK, FAILED, BELOW, SKIPPED) if counts[s])
    seconds = sum(result.seconds for result in results)
    return "\n".join([*lines, f"{summary or 'nothing was checked'}; {seconds:.0f} s"])
