"""What a server does, on the client's clock."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_occ.rollout.engine import ABORT
from megatron_occ.rollout.remote.server import Answer
from megatron_occ.rollout.statistics import ServerWork


class Workload:
    """Keeps the books of one server; thread-safe.

    Args:
        clock: in seconds.

    Attributes:
        queue: requests that it has now.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.queue = 0
        self._clock, self._lock = clock, threading.Lock()
        self._asked = self._since = clock()
        self._busy = self._waited = 0.0
        self._requests = self._tokens = 0

    @contextmanager
    def request(self) -> Iterator[Callable[[Answer], None]]:
        """While it has a request; takes the answer, if there is one."""
        start = self._change(1)
        try:
            yield lambda answer: self._answered(answer, self._clock() - start)
        finally:
            self._change(-1)

    def pop(self, url: str, version: int) -> ServerWork:
        """What it did since the last call."""
        with self._lock:
            now = self._count_time()
            work = ServerWork(url, version, now - self._asked, self._busy)
            work.requests, work.tokens, work.waited = self._requests, self._tokens, self._waited
            self._asked, self._busy, self._waited = now, 0.0, 0.0
            self._requests = self._tokens = 0
        return work

    def _answered(self, answer: Answer, seconds: float) -> None:
        with self._lock:
            self._tokens += len(answer.tokens)
            if answer.finish_reason != ABORT:
                self._requests += 1
                self._waited += seconds

    def _change(self, by: int) -> float:
        with self._lock:
            now = self._count_time()
            self.queue += by
        return now

    def _count_time(self) -> float:
        now = self._clock()
        if self.queue:
            self._busy += now - self._since
        self._since = now
        return now
