"""One run as a process of its own: environment, log, lock."""

from __future__ import annotations

import fcntl
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from megatron_occ.compare.runs import RunSpec

# of the process that started the study, as in a Slurm job: a run is a process group of its own
_RANK_NAMES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
_LAST_LINES = 6
_GRACE = 30.0  # seconds that a run gets to end


class BusyError(Exception):
    """Another process is doing this run."""


class RunProcess:
    """A run that was started; its output is appended to its log.

    Raises:
        BusyError: another study, here or on a machine with the same disk, is doing this run.
    """

    def __init__(self, run: RunSpec, environment: Mapping[str, str]) -> None:
        self.run = run
        self._lock = _lock(run.log.with_suffix(".lock"))
        words = run.words()
        self._file = run.log.open("ab")
        self._file.write(f"\n{time.strftime('%F %T')} {' '.join(words[1:])}\n".encode())
        self._file.flush()
        self._begin = self._file.tell()
        # the run holds the lock too: it stays taken if the study alone is killed
        self._process = subprocess.Popen(
            words,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=self._file,
            stderr=subprocess.STDOUT,
            pass_fds=(self._lock.fileno(),),
        )

    def poll(self) -> int | None:
        """Exit status, None while it runs."""
        code = self._process.poll()
        if code is not None:
            self._close()
        return code

    def stop(self) -> None:
        """End it now; its last checkpoint stays."""
        self._process.terminate()
        try:
            self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._close()

    def last_lines(self) -> list[str]:
        """The end of what it wrote in this attempt."""
        with self.run.log.open("rb") as file:
            file.seek(self._begin)
            text = file.read().decode("utf-8", "replace")
        return [line for line in text.splitlines() if line.strip()][-_LAST_LINES:]

    def _close(self) -> None:
        self._file.close()
        self._lock.close()


def run_environment(slot: int, threads: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Environment of a run.

    Args:
        slot: which of the runs at once it is, from 0: they take turns on the visible devices.
        threads: threads of the run on the CPU.
        environment: of the study.
    """
    own = {name: value for name, value in environment.items() if name not in _RANK_NAMES}
    own["OMP_NUM_THREADS"] = str(threads)
    devices = [name for name in own.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if devices:
        own["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    return own


def _lock(path: Path) -> IO[bytes]:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise BusyError from error
    return file
