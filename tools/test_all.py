"""Every test, in two processes of pytest side by side: what ``make test`` runs.

Whole runs through the command line are in one, all others in the other; both take about as long.
Many of them wait for processes of their own, and a machine with two cores has one to spare then.
What they print is shown line by line as it comes, so that a job that is cut shows how far it was.

    python tools/test_all.py [arguments of pytest]

With arguments one process of pytest gets these.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from subprocess import Popen

PARTS = (("tests/unit", "tests/mcore"), ("tests/e2e",))


def main(arguments: Sequence[str]) -> int:
    """Run; returns the exit status, that of the part that fared worse."""
    if arguments:
        return subprocess.call(command(arguments))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    parts = [Popen(command(part), errors="replace", **pipes) for part in PARTS]
    names = [" ".join(name.removeprefix("tests/") for name in part) for part in PARTS]
    width = max(map(len, names))
    shown = [
        threading.Thread(target=show, args=(name.ljust(width), part.stdout), daemon=True)
        for name, part in zip(names, parts, strict=True)
    ]
    try:
        for thread in shown:
            thread.start()
        # the status of what a signal has ended is negative
        status = max(code if code >= 0 else 128 - code for code in map(Popen.wait, parts))
        # a process that a test has left behind keeps the pipe open: not for ever
        for thread in shown:
            thread.join(timeout=10)
        return status
    finally:
        for part in parts:
            part.terminate()


def show(name: str, lines: Iterable[str]) -> None:
    """Print the lines of a part, each with its name before it."""
    for line in lines:
        print(f"{name} | {line}", end="", flush=True)


def command(arguments: Sequence[str]) -> list[str]:
    """Of a process of pytest."""
    return [sys.executable, "-m", "pytest", *arguments]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
