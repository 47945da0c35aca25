"""How many of this machine's processors are free: what other processes keep busy, on Linux."""

from __future__ import annotations

import contextlib
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_occ.config.machine import processors

# fields of a line "cpuN user nice system idle iowait irq softirq steal ..." of /proc/stat
_IDLE = slice(3, 5)
_COUNTED = slice(0, 8)  # what follows, guest time, is part of user time
# processes of this one: utime and stime in /proc/PID/stat, after the name in brackets
_TIMES = slice(11, 13)


def cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Processors that this process may use, at least 1: its affinity, and a container's quota."""
    allowed = len(processors())
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
        allowed = min(allowed, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # no such file, or "max" for no quota
        pass
    return max(1, allowed)


@dataclass(frozen=True)
class Sample:
    """Seconds of processor time since the machine, or the process, began."""

    time: float
    busy: float
    own: float

    @classmethod
    def now(cls, proc: Path = Path("/proc")) -> Sample | None:
        """Of this moment; None where the system does not tell."""
        tick = _ticks_per_second()
        try:
            busy = sum(_busy_ticks(proc / "stat", processors()))
            children = sum(_ticks_of(each) for each in _children(proc))
        except (OSError, ValueError, IndexError):
            return None
        times = os.times()
        own = times.user + times.system + times.children_user + times.children_system
        return cls(time.monotonic(), busy / tick, own + children / tick)


def others_cores(before: Sample, now: Sample) -> float:
    """Processors that other processes kept busy between two samples, on average."""
    seconds = now.time - before.time
    return max(0.0, (now.busy - before.busy) - (now.own - before.own)) / seconds


def _ticks_per_second() -> int:
    return os.sysconf("SC_CLK_TCK")


def _busy_ticks(file: Path, wanted: list[int]) -> list[int]:
    names = {f"cpu{number}" for number in wanted}
    lines = [line.split() for line in file.read_text().splitlines() if line.startswith("cpu")]
    found = [[int(word) for word in words] for name, *words in lines if name in names]
    return [sum(ticks[_COUNTED]) - sum(ticks[_IDLE]) for ticks in found]


def _children(proc: Path) -> list[Path]:
    words: list[str] = []
    for file in (proc / "self" / "task").glob("*/children"):
        with contextlib.suppress(OSError):  # of a thread that has ended meanwhile
            words += file.read_text().split()
    return [proc / word for word in words]


def _ticks_of(process: Path) -> int:
    try:
        fields = (process / "stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has ended meanwhile, and counts as a child that is done
        return 0
    return sum(int(word) for word in fields[_TIMES])
