"""The run's end of a sink: lines go to a process, and nothing that happens there comes back.

Writing never waits. What the pipe does not take is kept up to a limit, and lost beyond it. A sink
that raises loses the line and is tried again with the next; one whose process died is not.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_occ.observe.jsonl import json_safe, parse_line

ROOM_BYTES = 4 * 2**20
# an interrupted run waits no longer: Slurm kills what is left after half a minute
_HURRY_SECONDS = 5.0
_REAP_SECONDS = 1.0


class Outlet:
    """A sink in a process of its own.

    Args:
        name: of the sink, for people.
        sink: its class, `module:Class`, and `options`, which the class is called with.
        log: file of what the process prints.
        patience: seconds without an answer after which the sink is said to hang, and which its end
            may take.
        room: bytes of lines that are kept while the process takes none.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        name: str,
        sink: str,
        options: dict[str, Any],
        *,
        log: Path,
        patience: float = 60.0,
        room: int = ROOM_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.lines = self.lost = 0
        self._log, self._patience, self._room, self._clock = log, patience, room, clock
        self._pending, self._answers = b"", b""
        self._unanswered, self._answered_at = 0, clock()
        self._fault, self._is_told = "", False
        self._limit = self._deadline = 0.0
        self._process = self._start()
        self._send({"sink": sink, "options": options, "patience": patience})

    def put(self, phase: str, step: int, now: float, values: dict[str, float]) -> str:
        """Hand on a line; returns what a person should be told, once for each sink."""
        self.lines += 1
        if self._unanswered == 0:
            self._answered_at = self._clock()
        line = {"phase": phase, "step": step, "time": now, "values": values}
        if self._process is None or len(self._pending) > self._room:
            self.lost += 1
            self._push()
        else:
            self._unanswered += 1
            self._send(line)
        self._pull()
        if self._unanswered and self._clock() - self._answered_at > self._patience:
            self._note(f"has not taken a line for {self._patience:g} s")
        return self._complaint()

    def begin_end(self, *, finished: bool) -> None:
        """Ask the process to hand over its lines and end; `close` waits for it."""
        self._limit = self._patience if finished else min(self._patience, _HURRY_SECONDS)
        self._deadline = time.monotonic() + self._limit
        if self._process is not None:
            self._send({"finished": finished})

    def close(self) -> str:
        """Wait for the end that was begun, as long as it may take; returns what was lost."""
        self._drain()
        self._end()
        complaint = self._complaint()
        if self.lost:
            lost = f"{self.name} lost {self.lost} of {self.lines} lines"
            return f"{complaint}; {lost}" if complaint else lost
        return complaint

    def _start(self) -> subprocess.Popen | None:
        # the package is found as this process found it
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        try:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open("ab") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "megatron_occ.observe.sink_process"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    bufsize=0,
                    env={**os.environ, "PYTHONPATH": path},
                    # Ctrl-C is for the run, which then ends its sinks
                    start_new_session=True,
                )
        except OSError as error:
            self._note(f"could not be started: {error}")
            return None
        for pipe in (process.stdin, process.stdout):
            os.set_blocking(pipe.fileno(), False)
        return process

    def _send(self, record: dict[str, Any]) -> None:
        self._pending += json.dumps(json_safe(record), allow_nan=False).encode() + b"\n"
        self._push()

    def _push(self) -> None:
        """Write what the pipe takes now."""
        while self._pending and self._process is not None:
            try:
                taken = os.write(self._process.stdin.fileno(), self._pending)
            except BlockingIOError:
                return
            except OSError:
                self._died()
                return
            self._pending = self._pending[taken:]

    def _pull(self) -> None:
        """Read the answers that are there."""
        while self._process is not None:
            try:
                read = os.read(self._process.stdout.fileno(), 65536)
            except BlockingIOError:
                return
            if not read:
                self._died()
                return
            *lines, self._answers = (self._answers + read).split(b"\n")
            for line in lines:
                self._take_answer((parse_line(line) or {}).get("fault", ""))

    def _take_answer(self, fault: str) -> None:
        self._answered_at = self._clock()
        # the last answer is to the end, with which no line is lost
        is_line = self._unanswered > 0
        self._unanswered -= is_line
        if fault:
            self.lost += is_line
            self._note(fault)

    def _died(self) -> None:
        """The process ended by itself: as it was asked to, or not."""
        process, self._process = self._process, None
        code = _reaped(process)
        self.lost += self._unanswered
        if self._unanswered or code:
            self._note(f"its process ended with {_ending(code)}; {self._log} has what it printed")
        self._unanswered = 0

    def _drain(self) -> None:
        """Wait until all lines are answered and the process has ended."""
        while self._process is not None and (left := self._deadline - time.monotonic()) > 0:
            pipes = self._process.stdin, self._process.stdout
            # not select(): a run of many ranks has more than its 1,024 open files
            with selectors.DefaultSelector() as waiting:
                waiting.register(pipes[1], selectors.EVENT_READ)
                if self._pending:
                    waiting.register(pipes[0], selectors.EVENT_WRITE)
                waiting.select(left)
            self._push()
            self._pull()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            self._forget_empty_log()
            return
        self.lost += self._unanswered
        self._note(f"was not done {self._limit:g} s after the run's end, and was stopped")
        _kill(process)
        _reaped(process)

    def _forget_empty_log(self) -> None:
        with contextlib.suppress(OSError):
            if self._log.stat().st_size == 0:
                self._log.unlink()

    def _note(self, fault: str) -> None:
        self._fault = self._fault or fault

    def _complaint(self) -> str:
        if not self._fault or self._is_told:
            return ""
        self._is_told = True
        return f"{self.name}: {self._fault}. Nothing is missing in metrics.jsonl"


def _reaped(process: subprocess.Popen) -> int:
    """Exit code of a process that has closed its output, and so is at its end."""
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            pipe.close()
    try:
        return process.wait(_REAP_SECONDS)
    except subprocess.TimeoutExpired:
        _kill(process)
        return process.wait()


def _kill(process: subprocess.Popen) -> None:
    """With what it started, as far as that stayed in its group."""
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"code {code}"
