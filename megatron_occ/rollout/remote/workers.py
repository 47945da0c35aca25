"""Threads that send requests, the most urgent first."""

from __future__ import annotations

import itertools
import queue
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Workers:
    """A pool of threads whose waiting work is ordered.

    Args:
        count: of the threads.
    """

    def __init__(self, count: int) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="rollout")
        self._waiting: queue.PriorityQueue[tuple[int, int, Callable[[], None], Future[None]]]
        self._waiting = queue.PriorityQueue()
        self._numbers = itertools.count()

    def submit(self, rank: int, work: Callable[[], None]) -> Future[None]:
        """Have work done after all waiting work of a lower rank, and of this one."""
        future: Future[None] = Future()
        self._waiting.put((rank, next(self._numbers), work, future))
        self._pool.submit(self._next)
        return future

    def close(self) -> None:
        """Take no more work; threads end with what waits."""
        self._pool.shutdown(wait=False)

    def _next(self) -> None:
        _, _, work, future = self._waiting.get()
        try:
            work()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(None)
