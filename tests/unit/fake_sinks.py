"""Sinks that go wrong in every way, and one that writes down what it got."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path


class Recording:
    """Writes each call to a file."""

    def __init__(self, path):
        self._path = Path(path)

    def _record(self, *call):
        with self._path.open("a") as file:
            file.write(json.dumps(call) + "\n")

    def open(self):
        print("a package that prints")
        self._record("open")

    def write(self, phase, step, now, values):
        self._record(phase, step, now, values)

    def close(self, *, finished):
        self._record("close", finished)


class RaisesAtTwo(Recording):
    def write(self, phase, step, now, values):
        if step == 2:
            raise ConnectionError("no route to host\nand a long story")
        super().write(phase, step, now, values)


class NeverOpens(Recording):
    def open(self):
        self._record("open")
        raise PermissionError("not logged in")


class Blocks(Recording):
    def write(self, phase, step, now, values):
        super().write(phase, step, now, values)
        time.sleep(10**6)


class BlocksAtTheEnd(Recording):
    def close(self, *, finished):
        super().close(finished=finished)
        time.sleep(10**6)


class Dies(Recording):
    def write(self, phase, step, now, values):
        os.kill(os.getpid(), signal.SIGKILL)
