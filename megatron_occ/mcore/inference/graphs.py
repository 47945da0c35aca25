"""Cycles of a call as CUDA graphs: a cycle's kernels are started with one call from the host.

A cycle of so many rows and drafts reads and writes tensors that stay where they are for the whole
call (slots, caches), so what was captured once runs again as it is. Captured cycles live as long as
a call: the next one has other caches, and weights may have moved.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Protocol

import torch

from megatron_occ.mcore.inference.slots import Verified

logger = logging.getLogger(__name__)

Cycle = Callable[[], Verified]


class Capture(Protocol):
    """Takes down what a cycle does on the device, without doing it."""

    def __call__(self, cycle: Cycle) -> tuple[Callable[[], None], Verified]:
        """A function that does it, and where its findings lie afterwards."""
        ...


class CUDACapture:
    """By ``torch.cuda.graph``; graphs of one object take turns, and share memory."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, cycle: Cycle) -> tuple[Callable[[], None], Verified]:
        """See :class:`Capture`."""
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        # other threads, as of verifiers, may go on with what they do
        try:
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                found = cycle()
        except BaseException:
            # torch leaves a failed capture on its own stream, with the allocator still in its pool
            torch.cuda.set_stream(before)
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(before.device_index, self.pool)
            raise
        return graph.replay, found


class Graphs:
    """Captured cycles of one call.

    Args:
        capture: how.
        rows: of the slots.
    """

    def __init__(self, capture: Capture, rows: int) -> None:
        self.capture: Capture | None = capture
        self.rows = rows
        self.seen: set[tuple[int, int]] = set()
        self.kept: dict[tuple[int, int], tuple[Callable[[], None], Verified]] = {}

    def padded(self, rows: int) -> int:
        """The next of 1, 2, 3, 4, 6, 8, 12, 16 ... rows, half as many again at most."""
        power = 1 << (rows - 1).bit_length()
        less = power * 3 // 4
        return min(less if rows <= less and power > 2 else power, self.rows)

    def run(self, rows: int, length: int, cycle: Cycle) -> Verified:
        """Do a cycle; what it finds holds until the next one.

        The first time as it is, which warms up what must not be captured, the second time captured.

        Args:
            rows: of :meth:`padded`.
            length: drafts.
            cycle: of them, whose inputs lie where they lay the last time.
        """
        key = rows, length
        if key in self.seen and key not in self.kept:
            self._keep(key, cycle)
        self.seen.add(key)
        if key not in self.kept:
            return cycle()
        replay, found = self.kept[key]
        replay()
        return found

    def _keep(self, key: tuple[int, int], cycle: Cycle) -> None:
        """Capture a cycle; nothing has been done where that fails, and it can be run as it is."""
        if self.capture is None:
            return
        try:
            self.kept[key] = self.capture(cycle)
        except RuntimeError as error:
            reason = str(error).split("\n", maxsplit=1)[0]
            logger.warning("rollouts: no CUDA graphs in this call: %s", reason)
            self.capture = None
