"""This machine: its processors, and its disk."""

from __future__ import annotations

import os
from pathlib import Path


def processors() -> list[int]:
    """Numbers of the processors of this process's affinity; where there is none, of all."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def flush(path: Path) -> None:
    """Hand a file or folder to the disk, so that all of it outlives a crash."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
