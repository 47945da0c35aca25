"""Between work on the servers and changes of their weights: never both at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

POLL = 0.2


class Gate:
    """Work passes while it is open; who closes it waits until the work is through.

    Attributes:
        version: of the weights that what passes is done under.
    """

    def __init__(self) -> None:
        self.version = -1
        self._changed = threading.Condition()
        self._closed, self._inside = True, 0

    @property
    def is_closed(self) -> bool:
        """Whether weights are about to change: what is under way should come to an end."""
        return self._closed

    @contextmanager
    def passing(self, stop: threading.Event) -> Iterator[int | None]:
        """The version during some work, after a wait for the gate to open.

        Args:
            stop: ends the waiting. The version is then None, and the work must not begin.
        """
        with self._changed:
            while self._closed and not stop.is_set():
                self._changed.wait(POLL)
            self._inside += 1
            version = None if self._closed else self.version
        try:
            yield version
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Let nothing more pass."""
        with self._changed:
            self._closed = True

    def is_empty(self, seconds: float) -> bool:
        """Whether nothing is inside, after a wait of so many seconds at most."""
        with self._changed:
            return self._changed.wait_for(lambda: self._inside == 0, seconds)

    def open(self, version: int) -> None:
        """Let work pass, under weights of this version."""
        with self._changed:
            self.version, self._closed = version, False
            self._changed.notify_all()
