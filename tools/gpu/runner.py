"""Sections in processes of their own: one that hangs or dies costs itself alone."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.gpu.results import FAILED, Row, SectionResult, read_rows


@dataclass(frozen=True)
class Ended:
    """How a process ended: exit code (None: it was cut), seconds, last line that it wrote."""

    code: int | None
    seconds: float
    last_line: str


def run_limited(
    command: Sequence[str], limit: float, log: Path, environment: Mapping[str, str] | None = None
) -> Ended:
    """Run a command, with all that it starts, for ``limit`` seconds at most.

    Args:
        command: its output goes where ours goes.
        limit: seconds.
        log: takes its errors and warnings.
        environment: beside ours.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with log.open("w") as target:
        process = subprocess.Popen(
            command,
            stderr=target,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # what it started may have outlived it
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = log.read_text(errors="replace").strip().splitlines()
    return Ended(code, time.monotonic() - start, lines[-1].strip() if lines else "")


def run_section(
    name: str,
    command: Sequence[str],
    limit: float,
    log: Path,
    rows: Path,
    environment: Mapping[str, str] | None = None,
) -> SectionResult:
    """Run a section; rows that it wrote before it was cut or died are kept.

    Args:
        name: of the section.
        command: its process.
        limit: seconds.
        log: for its errors and warnings.
        rows: the file of rows that it writes.
        environment: beside ours.
    """
    rows.unlink(missing_ok=True)
    ended = run_limited(command, limit, log, environment)
    found = read_rows(rows)
    if ended.code is None:
        found.append(Row("process", FAILED, f"cut after {limit:.0f} s: {ended.last_line[:120]}"))
    elif ended.code != 0:
        found.append(Row("process", FAILED, f"exit {ended.code}: {ended.last_line[:120]}"))
    return SectionResult(name, found, ended.seconds)
