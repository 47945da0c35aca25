"""How a run ends when it is asked to, with a checkpoint, and how what it started ends with it.

Megatron-Core's checkpoint writer keeps a process by ``multiprocessing``'s "spawn" that would
outlive a killed run and hold its output open: a pipe such as ``| tee log`` would never end. Such a
process imports the program's main module, and with it the command line, before it does anything.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

# by whom: a person or Slurm's preemption, and Slurm's warning before a time limit
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_PARENT = "MEGATRON_OCC_PARENT"
_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
_FIRST = (
    "megatron-occ: {name}: the run ends after the update under way, with a checkpoint; "
    "a second signal ends it at once\n"
)


@contextmanager
def handled(handle: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Call a function at SIGTERM and SIGUSR1 for the time of the block, in the main thread."""

    def call(number: int, _frame: object) -> None:
        handle(signal.Signals(number))

    before = {each: signal.signal(each, call) for each in SIGNALS}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


class StopRequested(Exception):  # no error: somebody asked for it
    """The run was asked to stop; what a trainer has done is in a checkpoint."""


class Ranks(Protocol):
    """All ranks of a run."""

    def any_rank(self, flag: bool) -> bool:
        """Whether any rank has the flag; called by all."""
        ...


class StopSignal:
    """SIGTERM and SIGUSR1 of this process.

    Within :meth:`noted` the first one is noted, and a trainer asks for it between two pieces of
    work; elsewhere it raises :class:`StopRequested` where the process is. The second one ends the
    process and its children at once.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._is_noted = False
        self._arrived = threading.Event()

    @contextmanager
    def installed(self, *, tells: bool) -> Iterator[None]:
        """Take the signals for the time of the block, in the main thread.

        Args:
            tells: say on stderr what the signal does.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        with handled(lambda number: self._handle(number, tells)):
            yield

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Nothing in the block is interrupted: it may be at work together with other ranks."""
        before, self._is_noted = self._is_noted, True
        try:
            yield
        finally:
            self._is_noted = before

    @contextmanager
    def watched(self, on_signal: Callable[[], None]) -> Iterator[None]:
        """A trainer at work, which asks :meth:`is_asked_of_any` itself.

        Args:
            on_signal: called when a signal has come, in a thread of its own.
        """

        def wait() -> None:
            self._arrived.wait()
            if self.received is not None:
                on_signal()

        waiting = threading.Thread(target=wait, name="stop signal", daemon=True)
        waiting.start()
        with self.noted():
            if self.received is not None:
                self._arrived.set()
            try:
                yield
            finally:
                self._arrived.set()
                waiting.join()
                self._arrived.clear()

    def is_asked_of_any(self, ranks: Ranks) -> bool:
        """Whether any rank was asked to stop; called by all of them, and the same on all."""
        return ranks.any_rank(self.received is not None)

    def sentence(self) -> str:
        """For the log of the run."""
        by = f" by {self.received.name}" if self.received is not None else ""
        return f"asked to stop{by}: ended after this step"

    def _handle(self, number: signal.Signals, tells: bool) -> None:
        if self.received is not None:
            end_children()
            os._exit(128 + number)
        self.received = number
        if tells:
            # no print: the signal may come in the midst of one
            os.write(2, _FIRST.format(name=number.name).encode())
        if not self._is_noted:
            raise StopRequested
        self._arrived.set()


def end_children() -> None:
    """Kill the processes that multiprocessing started from here."""
    for child in multiprocessing.active_children():
        child.kill()


@contextmanager
def as_parent() -> Iterator[None]:
    """Of a run: processes that it starts within the block end when it does, and no sooner."""
    os.environ[_PARENT] = str(os.getpid())
    try:
        yield
    finally:
        del os.environ[_PARENT]


def belong_to_parent(parent: int | None = None) -> None:
    """Called by a process that starts: end when the one that started it does, and no sooner.

    The former on Linux. A signal to the whole job, as Slurm sends it, is for the run to act on.

    Args:
        parent: its number; None: that of the run, and where another process has started this one,
            nothing is done.
    """
    if parent is None:
        parent = int(os.environ.get(_PARENT, "0"))
        if parent != os.getppid():
            return
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended in between
        os._exit(1)
