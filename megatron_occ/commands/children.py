"""Processes that Python starts anew for a run end with it, also where it is killed.

Megatron-Core's checkpoint writer keeps one, by ``multiprocessing``'s "spawn", which would outlive a
killed run and hold its output open: a pipe such as ``| tee log`` would never end. Such a process
imports the program's main module, and with it the command line, before it does anything.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PARENT = "MEGATRON_OCC_PARENT"
_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


def mark_parent() -> None:
    """Called by a run: what it starts from now on ends with it."""
    os.environ[_PARENT] = str(os.getpid())


def end_with_parent() -> None:
    """Called by every process that starts: end when the run that started it does (Linux)."""
    parent = os.environ.get(_PARENT)
    if not sys.platform.startswith("linux") or parent != str(os.getppid()):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it ended in between
        os._exit(1)
