"""Threads that send requests: order, failures, and an end that nothing holds up."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megatron_occ.rollout.engine import EngineError
from megatron_occ.rollout.remote.workers import Workers, at_once, results_of

ROOT = Path(__file__).resolve().parents[2]


def test_workers_take_the_most_urgent_first():
    workers, order, first = Workers(1), [], threading.Event()
    workers.submit(5, lambda: first.wait(5))
    futures = [workers.submit(rank, lambda r=rank: order.append(r)) for rank in (3, 1, 2, 1)]
    first.set()
    for future in futures:
        future.result(5)
    assert order == [1, 1, 2, 3]
    failing = workers.submit(0, lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        failing.result(5)
    workers.close()


def test_threads_end_with_what_waits():
    workers, go = Workers(3), threading.Event()

    def work():
        assert go.wait(5)
        return threading.current_thread()

    futures = [workers.submit(1, work) for _ in range(7)]
    workers.close()
    with pytest.raises(EngineError, match="closed"):
        workers.submit(0, work)
    go.set()
    threads = {future.result(5) for future in futures}
    assert len(threads) == 3
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()


def test_all_are_done_at_once_and_each_failure_is_told():
    together = threading.Barrier(4)

    def work(item):
        together.wait(5)
        return 6 // item

    futures = at_once(work, [1, 2, 0, 3])
    assert [future.result() for future in futures if not future.exception()] == [6, 3, 2]
    assert isinstance(futures[2].exception(), ZeroDivisionError)


def test_a_failure_leaves_what_has_not_begun():
    seen = []

    def work(item):
        seen.append(item)
        if len(seen) > 1:
            # until the failure before was told
            assert told.wait(5)
        return 6 // item

    told = threading.Event()
    with pytest.raises(ZeroDivisionError):
        results_of(work, [0, 1, 2, 3], threads=1)
    told.set()
    assert 3 not in seen
    assert results_of(lambda item: item + 1, [3, 1, 2], threads=2) == [4, 2, 3]


def test_a_process_ends_though_a_thread_waits_for_ever():
    code = """if True:
        import threading
        from megatron_occ.rollout.remote.workers import Workers

        begun = threading.Event()
        Workers(2).submit(0, lambda: begun.set() or threading.Event().wait())
        assert begun.wait(10)
    """
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
