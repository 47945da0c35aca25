"""Data-parallel ranks without processes: one on its own, or several as threads."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch


@dataclass
class FakeLayout:
    """One data-parallel rank on its own: reductions leave its values as they are."""

    data_parallel_rank: int = 0
    data_parallel_size: int = 1

    is_model_parallel_main = True
    device = torch.device("cpu")

    @property
    def is_main(self):
        return self.data_parallel_rank == 0

    def any_rank(self, flag):
        return flag

    @property
    def rank(self):
        return self.data_parallel_rank

    @property
    def world_size(self):
        return self.data_parallel_size

    def all_reduce_data_parallel(self, values, *, maximum=False):
        return values

    def gather_data_parallel(self, values):
        return values

    def gather_ranks(self, values):
        return self.gather_data_parallel(values)

    def broadcast_model_parallel(self, values):
        return values


class ThreadedLayout(FakeLayout):
    """Data-parallel ranks as threads of this process, with real reductions between them."""

    def __init__(self, rank, size, barrier, slots):
        super().__init__(rank, size)
        self._barrier, self._slots, self.gathered = barrier, slots, 0

    def any_rank(self, flag):
        return any(bool(each) for each in self._exchange(torch.tensor(flag)))

    def all_reduce_data_parallel(self, values, *, maximum=False):
        stacked = torch.stack(self._exchange(values))
        return values.copy_(stacked.amax(0) if maximum else stacked.sum(0))

    def gather_data_parallel(self, values):
        self.gathered += 1
        parts = self._exchange(values)
        assert len({part.shape for part in parts}) == 1, "ranks give different shapes"
        return torch.cat(parts)

    def _exchange(self, values):
        self._slots[self.data_parallel_rank] = values.clone()
        self._barrier.wait(timeout=20)
        parts = list(self._slots)
        self._barrier.wait(timeout=20)
        return parts


def run_ranks(size, work):
    """``work(layout)`` on each of ``size`` data-parallel ranks; returns the results by rank."""
    barrier, slots = threading.Barrier(size), [None] * size
    results, errors = [None] * size, []

    def run(rank):
        try:
            results[rank] = work(ThreadedLayout(rank, size, barrier, slots))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next(
            (e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0]
        )
    return results
