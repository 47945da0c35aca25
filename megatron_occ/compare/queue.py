"""Several runs at once, one after the other, until all were tried."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from megatron_occ.compare.process import BusyError
from megatron_occ.compare.runs import RunSpec

# runs that may fail before any succeeds: more of them would fail as well
_FAILURES_AT_FIRST = 3


class Started(Protocol):
    """A run that was started."""

    def poll(self) -> int | None:
        """Exit status, None while it runs."""

    def stop(self) -> None:
        """End it."""

    def last_lines(self) -> list[str]:
        """The end of what it wrote."""


@dataclass
class Failure:
    """A run that ended with an error."""

    run: RunSpec
    code: int
    last_lines: list[str]


@dataclass
class Tally:
    """What has become of the runs so far."""

    waiting: deque[RunSpec]
    running: dict[int, tuple[RunSpec, Started]] = field(default_factory=dict)
    finished: list[RunSpec] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)
    busy: list[RunSpec] = field(default_factory=list)
    not_tried: list[RunSpec] = field(default_factory=list)

    @property
    def all_well(self) -> bool:
        """Whether every run was done, here or by another process."""
        return not self.failed and not self.not_tried


def work_off(
    runs: Sequence[RunSpec],
    jobs: int,
    start: Callable[[RunSpec, int], Started],
    on_change: Callable[[Tally, RunSpec | None], None],
    *,
    pause: float = 0.5,
) -> Tally:
    """Do all runs, ``jobs`` at once; a run that fails does not stop the others.

    Three failures before any success do: what is not started then is in ``not_tried``.

    Args:
        runs: in order.
        jobs: how many at once.
        start: starts a run in a slot (0 to ``jobs`` - 1), or raises ``BusyError``.
        on_change: called with the run that has just ended, and with None every ``pause`` seconds.
        pause: seconds between looks at the runs.
    """
    tally = Tally(waiting=deque(runs))
    try:
        while tally.waiting or tally.running:
            _fill(tally, jobs, start)
            for slot in sorted(tally.running):
                ended = _take(tally, slot)
                if ended is not None:
                    on_change(tally, ended)
            if len(tally.failed) >= _FAILURES_AT_FIRST and not tally.finished:
                tally.not_tried += tally.waiting
                tally.waiting.clear()
            if tally.running:
                on_change(tally, None)
                time.sleep(pause)
    finally:
        for _, process in tally.running.values():
            process.stop()
    return tally


def _fill(tally: Tally, jobs: int, start: Callable[[RunSpec, int], Started]) -> None:
    """Start runs in the free slots."""
    while tally.waiting and len(tally.running) < jobs:
        run = tally.waiting.popleft()
        slot = next(slot for slot in range(jobs) if slot not in tally.running)
        try:
            tally.running[slot] = run, start(run, slot)
        except BusyError:
            tally.busy.append(run)


def _take(tally: Tally, slot: int) -> RunSpec | None:
    """Take a run that has ended out of its slot."""
    run, process = tally.running[slot]
    code = process.poll()
    if code is None:
        return None
    del tally.running[slot]
    if code == 0:
        tally.finished.append(run)
    else:
        tally.failed.append(Failure(run, code, process.last_lines()))
    return run
