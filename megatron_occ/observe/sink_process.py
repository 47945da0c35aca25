"""The process of one sink: takes lines from its standard input, and answers each.

What goes wrong with a sink, an exception, a hanging server, a hook that keeps the process from
ending, goes wrong here, and the run hears of it or not; see `outlet.py` for the other end.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

from megatron_occ.observe.jsonl import to_number
from megatron_occ.observe.sinks import Sink

# a sink that can't be opened is not tried with every line: that may take a minute each
RETRY_SECONDS = 60.0
# how often a process without lines looks whether the run is still there
WATCH_SECONDS = 1.0
ALARM_MARGIN = 5


def main() -> None:
    """Read the sink's description and then lines, until the input ends or says so."""
    # the run ends this process by closing its input, also where a signal ends the run
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    answers = _own_output()
    texts = lines_of(sys.stdin.fileno(), os.getppid)
    description = json.loads(next(texts))
    feeder = Feeder(lambda: _made(description["sink"], description["options"]))
    finished = False
    for text in texts:
        line = json.loads(text)
        if "finished" in line:
            finished = line["finished"]
            break
        _answer(answers, feeder.write(line))
    # nobody may be left who could end this process where it hangs; the run itself is quicker
    signal.alarm(round(description["patience"]) + ALARM_MARGIN)
    _answer(answers, feeder.close(finished=finished))


def lines_of(source: int, parent: Callable[[], int]) -> Iterator[bytes]:
    """Lines of a pipe until it ends, or until the process that writes to it is gone.

    A killed run may leave processes that it had forked, and they hold the pipe open.
    """
    writer, rest = parent(), b""
    while True:
        if not select.select([source], [], [], WATCH_SECONDS)[0]:
            if parent() != writer:
                return
            continue
        read = os.read(source, 65536)
        if not read:
            return
        *lines, rest = (rest + read).split(b"\n")
        yield from lines


def _made(sink: str, options: dict[str, Any]) -> Sink:
    """The sink `module:Class`."""
    module, _, name = sink.partition(":")
    return getattr(importlib.import_module(module), name)(**options)


def _own_output() -> IO[str]:
    """The pipe to the run, out of reach of what a package prints or starts."""
    # open to the very end: the run takes its closing for that of the process
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", closefd=False)
    os.dup2(2, 1)
    return answers


def _answer(answers: IO[str], fault: str) -> None:
    try:
        answers.write(json.dumps({"fault": fault}) + "\n")
        answers.flush()
    except BrokenPipeError:
        # the run is gone; what it wrote is handed over all the same
        return


class Feeder:
    """A sink that is opened with its first line, and whose exceptions are texts."""

    def __init__(
        self, make: Callable[[], Sink], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._make, self._clock = make, clock
        self._sink: Sink | None = None
        self._next_try = -float("inf")
        self._fault = ""

    def write(self, line: dict[str, Any]) -> str:
        """Hand a line on; returns what went wrong, "" if nothing did."""
        if self._sink is None and self._clock() < self._next_try:
            return self._fault
        try:
            if self._sink is None:
                self._sink = self._opened()
            values = {name: to_number(value) for name, value in line["values"].items()}
            self._sink.write(line["phase"], line["step"], line["time"], values)
        except Exception as error:
            return _in_words(error)
        return ""

    def _opened(self) -> Sink:
        try:
            sink = self._make()
            sink.open()
        except Exception as error:
            self._fault = _in_words(error)
            self._next_try = self._clock() + RETRY_SECONDS
            raise
        return sink

    def close(self, *, finished: bool) -> str:
        """Close the sink, if it was opened; returns what went wrong."""
        if self._sink is None:
            return ""
        try:
            self._sink.close(finished=finished)
        except Exception as error:
            return _in_words(error)
        return ""


def _in_words(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


if __name__ == "__main__":
    main()
