"""A trace of chosen steps by torch's profiler, and a short table of where their time went."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from megatron_occ.config.schema import Config
from megatron_occ.observe.progress import Timers
from megatron_occ.rl.interfaces import Collectives

PROFILE_FOLDER = "profile"
_ROWS = 20
_LONGEST_NAME = 60

log = logging.getLogger(__name__)


class StepProfiler:
    """Profiles the steps of a window on chosen ranks; elsewhere it does nothing.

    A run that is resumed inside the window traces the rest of it. Where the profiler itself fails,
    that is logged, and the run goes on.

    Args:
        config: its section ``profile`` and its run folder.
        phase: "pretrain" or "rl", whose steps are counted.
        layout: this rank.
    """

    def __init__(self, config: Config, phase: str, layout: Collectives) -> None:
        profile = config.profile
        is_on = bool(profile.steps) and profile.phase == phase and layout.rank in profile.ranks
        self._first, self._last = profile.steps if is_on else (0, 0)
        self._folder = Path(config.run_dir) / PROFILE_FOLDER
        self._phase, self._rank = phase, layout.rank
        self._profile: Any = None
        self._began = 0

    @contextmanager
    def step(self, number: int, timers: Timers | None = None) -> Iterator[None]:
        """Around a step, counted from 1; ``timers`` name the parts of it in the trace."""
        if not self._first <= number <= self._last:
            yield
            return
        if self._began == 0:
            self._start(number)
        if timers is not None:
            timers.mark = torch.profiler.record_function
        try:
            with torch.profiler.record_function(f"{self._phase} step {number}"):
                yield
        finally:
            if timers is not None:
                timers.mark = nullcontext
        if number == self._last:
            self._write(number)

    def close(self, last: int) -> None:
        """After the last step of the phase: a window that was not over ends here."""
        if self._profile is not None:
            self._write(last)
        elif last < self._first:
            log.warning(
                "profile.steps=[%d, %d]: no trace, %s ended at step %d",
                self._first,
                self._last,
                self._phase,
                last,
            )

    def _start(self, number: int) -> None:
        self._began = number
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        try:
            self._profile = torch.profiler.profile(activities=activities)
            self._profile.start()
        except Exception as error:
            self._profile = None
            log.error("profile.steps: the profiler does not start: %s", error)

    def _write(self, number: int) -> None:
        profile, self._profile = self._profile, None
        if profile is None:
            return
        name = f"{self._phase}_steps_{self._began}_to_{number}_rank_{self._rank}"
        try:
            profile.stop()
            self._folder.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(self._folder / f"{name}.json.gz"))
            table = operator_table(profile.key_averages())
            (self._folder / f"{name}.txt").write_text(table, encoding="utf-8")
        except Exception as error:
            log.error("profile.steps: the trace can't be written: %s", error)
            return
        log.info("profile of steps %d to %d: %s", self._began, number, self._folder / name)


def operator_table(events: Any) -> str:
    """The operators that took longest by themselves, on the device if there is any.

    Args:
        events: averages by operator, with times in microseconds.
    """
    # parts of a step hold operators, and are none themselves
    kept = [event for event in events if not event.is_user_annotation]
    columns = {"device ms": "self_device_time_total", "host ms": "self_cpu_time_total"}
    if not any(event.self_device_time_total for event in kept):
        del columns["device ms"]
    main = next(iter(columns.values()))
    kept.sort(key=lambda event: -getattr(event, main))
    total = sum(getattr(event, main) for event in kept) or 1.0
    heads = "".join(f"{head:>12}" for head in columns)
    lines = [f"{heads} {'share':>7} {'calls':>8}  operator"]
    for event in kept[:_ROWS]:
        times = "".join(f"{getattr(event, name) / 1e3:>12.2f}" for name in columns.values())
        share = getattr(event, main) / total
        lines.append(f"{times} {share:>7.1%} {event.count:>8}  {event.key[:_LONGEST_NAME]}")
    lines.append(f"{total / 1e3:>12.2f} in all, by {len(kept)} operators")
    return "\n".join(lines) + "\n"
