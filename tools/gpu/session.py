"""What a section's process has: its parts, its time, and a file of rows that grows."""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from tools.gpu.results import FAILED, SKIPPED, Row, line, write_rows

Measure = Callable[[], Iterable[Row]]


class Session:
    """A section under way.

    Args:
        section: its name.
        folder: of the whole command.
        limit: seconds that it has.
        rehearse: on the CPU, at toy size.
        parts: those that are wanted; none: all.
        told: takes the rows as lines.
    """

    def __init__(
        self,
        section: str,
        folder: Path,
        *,
        limit: float,
        rehearse: bool,
        parts: Sequence[str],
        told: TextIO,
    ) -> None:
        self.section, self.rehearse, self.parts = section, rehearse, parts
        self.folder = folder / section
        self._file, self._told = rows_file(folder, section), told
        self._rows: list[Row] = []
        self._begin = time.monotonic()
        self._end = self._begin + limit
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def remaining(self) -> float:
        """Seconds left."""
        return self._end - time.monotonic()

    def wants(self, part: str) -> bool:
        """Whether a part was asked for."""
        return not self.parts or part in self.parts

    def run(self, part: str, measure: Measure, *, needs: float = 0.0, always: bool = False) -> None:
        """Measure a part; whatever it raises is its own failure.

        Args:
            part: its name.
            measure: gives its rows, each kept as it comes.
            needs: seconds without which it is not begun.
            always: other parts stand on it.
        """
        if not (always or self.wants(part)):
            return
        if self.remaining < needs:
            self.add(Row(part, SKIPPED, f"{self.remaining:.0f} s left, it needs {needs:.0f}"))
            return
        try:
            for row in measure():
                self.add(row)
        except Exception as error:
            traceback.print_exc()
            reason = (str(error).strip().splitlines() or [""])[-1]
            self.add(Row(part, FAILED, f"{type(error).__name__}: {reason[:160]}"))
        free_memory()

    def add(self, row: Row) -> None:
        """Keep a row and print it."""
        row = replace(row, at=round(time.monotonic() - self._begin, 1))
        self._rows.append(row)
        write_rows(self._file, self._rows)
        print(line(self.section, row), file=self._told, flush=True)

    def numbers_of(self, section: str) -> dict[str, dict[str, Any]]:
        """Numbers that another section found, by part; empty if it did not run."""
        file = rows_file(self.folder.parent, section)
        entries = json.loads(file.read_text()) if file.is_file() else []
        found: dict[str, dict[str, Any]] = {}
        for entry in entries:
            found.setdefault(entry["part"], {}).update(entry["numbers"])
        return found


def rows_file(folder: Path, section: str) -> Path:
    """Where a section's rows are."""
    return folder / "sections" / f"{section}.json"


def free_memory() -> None:
    """Models refer to each other in circles: give the memory of the last one back."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
