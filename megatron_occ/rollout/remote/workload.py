"""What a server did, on the client's clock."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from megatron_occ.rollout.engine import ABORT, DraftStatistics
from megatron_occ.rollout.remote.server import Answer


@dataclass
class ServerWork:
    """What a server did since it was asked last.

    Args:
        url: of the server.
        version: of its weights.
        span: seconds since then.
        busy: seconds of them in which it had a request.
        requests: that it answered to their end.
        tokens: in its answers, those included that were interrupted.
        waited: seconds of these requests together, from sending to the answer.
        drafts: how they fared.
    """

    url: str
    version: int
    span: float = 0.0
    busy: float = 0.0
    requests: int = 0
    tokens: int = 0
    waited: float = 0.0
    drafts: DraftStatistics = field(default_factory=DraftStatistics)

    def add(self, later: ServerWork) -> None:
        """Add what it did after that."""
        self.version = later.version
        for name in ("span", "busy", "requests", "tokens", "waited"):
            setattr(self, name, getattr(self, name) + getattr(later, name))
        self.drafts.add(later.drafts)

    def metrics(self) -> dict[str, float]:
        """Version, tokens a second of its work, share of the time without any, seconds a request
        takes, and tokens a pass where it drafts."""
        found = {
            "version": float(self.version),
            "tokens_per_second": self.tokens / self.busy if self.busy else 0.0,
            "idle": 1 - self.busy / self.span if self.span else 0.0,
            "requests": float(self.requests),
            "request_seconds": self.waited / max(self.requests, 1),
        }
        if self.drafts.passes:
            found["acceptance_length"] = self.drafts.acceptance_length
        return found


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


def server_metrics(works: Sequence[ServerWork]) -> dict[str, float]:
    """``server/<number>/<name>`` of each server, counted from 1 in the order of their URLs.

    Args:
        works: of any number of calls, in each of them every server once, in the same order.
    """
    total: dict[str, ServerWork] = {}
    for work in works:
        total.setdefault(work.url, ServerWork(work.url, work.version)).add(work)
    return {
        f"server/{number}/{name}": value
        for number, work in enumerate(total.values(), start=1)
        for name, value in work.metrics().items()
    }
