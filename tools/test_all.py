"""Every test, in two processes of pytest side by side: what ``make test`` runs.

Whole runs through the command line are in one, all others in the other; both take about as long.
Many of them wait for processes of their own, and a machine with two cores has one to spare then.

    python tools/test_all.py [arguments of pytest]

With arguments one process of pytest gets these.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence

PARTS = (("tests/unit", "tests/mcore"), ("tests/e2e",))


def main(arguments: Sequence[str]) -> int:
    """Run; returns the exit status, that of the part that fared worse."""
    if arguments:
        return subprocess.call(command(arguments))
    shown, other = PARTS
    with tempfile.TemporaryFile() as output:
        beside = subprocess.Popen(command(other), stdout=output, stderr=subprocess.STDOUT)
        try:
            status = subprocess.call(command(shown))
            print(f"{' '.join(other)}: shown when they are through", flush=True)
            status = max(status, beside.wait())
        finally:
            beside.terminate()
        output.seek(0)
        print(output.read().decode("utf-8", "replace"), flush=True)
    return status


def command(arguments: Sequence[str]) -> list[str]:
    """Of a process of pytest."""
    return [sys.executable, "-m", "pytest", *arguments]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
