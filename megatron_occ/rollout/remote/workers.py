"""Threads that send requests, the most urgent first.

They are daemons: a process that has to end does not wait for a server, nor for weights that a
failed update left it without. (Python joins those of ``concurrent.futures`` before it exits.)
"""

from __future__ import annotations

import itertools
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from functools import partial
from typing import Any, TypeVar

from megatron_occ.rollout.engine import EngineError

# seconds between two looks at a stop, and those that work has to end by itself after one
POLL, PATIENCE = 0.1, 10.0

Item = TypeVar("Item")
Result = TypeVar("Result")
Work = Callable[[], None]


class Workers:
    """A pool of threads whose waiting work is ordered.

    Args:
        count: of the threads, at most.
    """

    def __init__(self, count: int) -> None:
        self._count, self._started, self._closed = count, 0, False
        # work None: the thread that takes it ends
        self._waiting: queue.PriorityQueue[tuple[int, int, Work | None]] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    def submit(self, rank: int, work: Callable[[], Result]) -> Future[Result]:
        """Have work done after all waiting work of a lower rank, and of this one.

        Raises:
            EngineError: after :meth:`close`.
        """
        future: Future[Result] = Future()
        with self._lock:
            if self._closed:
                raise EngineError("the rollout engine is closed")
            self._put(rank, partial(_settle, future, work))
            if self._started < self._count:
                self._started += 1
                name = f"rollout {self._started}"
                threading.Thread(target=self._serve, name=name, daemon=True).start()
        return future

    def close(self) -> None:
        """Take no more work; threads end with what waits."""
        with self._lock:
            self._closed = True
            for _ in range(self._started):
                self._put(sys.maxsize, None)

    def _put(self, rank: int, work: Work | None) -> None:
        self._waiting.put((rank, next(self._numbers), work))

    def _serve(self) -> None:
        while (work := self._waiting.get()[2]) is not None:
            work()
            # nothing of it is held while the thread waits
            del work


def at_once(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Future[Result]]:
    """Do something for each of some items, all at the same time; returns when all are through.

    Args:
        work: done for each.
        items: in the order of the results.
    """
    futures = _all_begun(work, items, len(items))
    wait(futures)
    return futures


def results_of(work: Callable[[Item], Result], items: Sequence[Item], threads: int) -> list[Result]:
    """Do something for each of some items.

    Args:
        work: done for each; raises what this function raises. What has not begun by then is left.
        items: in the order of the results.
        threads: at most.
    """
    futures = _all_begun(work, items, threads)
    try:
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()


def begun(work: Callable[[], Result]) -> Future[Result]:
    """Some work, in a thread of its own."""
    workers = Workers(1)
    try:
        return workers.submit(0, work)
    finally:
        workers.close()


def is_over(future: Future[Any], stop: threading.Event) -> bool:
    """Wait for some work; once ``stop`` is set not for long. Returns whether it is through."""
    deadline = None
    while not wait([future], POLL).done:
        if stop.is_set():
            deadline = deadline or time.monotonic() + PATIENCE
            if time.monotonic() > deadline:
                return False
    return True


def _all_begun(
    work: Callable[[Item], Result], items: Sequence[Item], threads: int
) -> list[Future[Result]]:
    workers = Workers(threads)
    futures = [workers.submit(0, partial(work, item)) for item in items]
    workers.close()
    return futures


def _settle(future: Future[Any], work: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = work()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
