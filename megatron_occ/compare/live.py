"""What a person sees while a study is going on."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import TextIO

from megatron_occ.compare.queue import Tally
from megatron_occ.compare.runs import RunSpec
from megatron_occ.observe.jsonl import parse_line
from megatron_occ.observe.metrics import METRICS_FILE
from megatron_occ.observe.text import format_duration

_TAIL = 65536  # bytes of the log that hold its last line


class Live:
    """A line that is rewritten on a terminal; elsewhere a line for each run that ends.

    Args:
        total: runs to do now.
        steps: of each of them.
    """

    def __init__(self, total: int, steps: int, stream: TextIO | None = None) -> None:
        self._total, self._steps = total, steps
        self._stream = stream if stream is not None else sys.stderr
        self._start = time.monotonic()

    def __call__(self, tally: Tally, ended: RunSpec | None) -> None:
        """Show the state; ``ended`` has just come to its end."""
        if ended is not None:
            failed = any(failure.run is ended for failure in tally.failed)
            self._say(f"{self._count(tally)} {ended.title}: {'FAILED' if failed else 'finished'}")
        elif self._stream.isatty():
            self._draw(tally)

    def close(self) -> None:
        """Leave the cursor on a clean line."""
        if self._stream.isatty():
            print("\r\x1b[K", end="", file=self._stream, flush=True)

    def _say(self, text: str) -> None:
        self.close()
        print(text, file=self._stream, flush=True)

    def _draw(self, tally: Tally) -> None:
        steps = {run.title: last_step(run.folder) for run, _ in tally.running.values()}
        under_way = ", ".join(f"{title} {step}/{self._steps}" for title, step in steps.items())
        done = len(tally.finished) + len(tally.failed) + sum(steps.values()) / self._steps
        parts = [self._count(tally), under_way]
        if tally.failed:
            parts.append(f"{len(tally.failed)} failed")
        if done > 0:
            rate = (time.monotonic() - self._start) / done
            parts.append(f"{format_duration(rate * (self._total - done))} left")
        width = shutil.get_terminal_size().columns - 1
        print("\r\x1b[K" + "  ".join(parts)[:width], end="", file=self._stream, flush=True)

    def _count(self, tally: Tally) -> str:
        ended = len(tally.finished) + len(tally.failed) + len(tally.busy)
        return f"{ended}/{self._total}"


def last_step(folder: Path) -> int:
    """The last RL step that a run logged; 0 before there is one."""
    path = folder / METRICS_FILE
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL))
        lines = file.read().splitlines()
    records = [parse_line(line) for line in lines]
    steps = [r["step"] for r in records if r and r.get("phase") == "rl"]
    return max(steps, default=0)
