"""What a person sees while a run is going on, and how long each phase of a step takes."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, TextIO

from megatron_occ.observe.text import format_duration, format_number

if TYPE_CHECKING:
    from tqdm import tqdm

PLAIN_LINES = 20  # at most so many progress lines for a whole run without a terminal, and the last
PATIENCE = 3.0  # seconds that pass without one: work that ends within them prints none


class Progress:
    """A progress bar on stderr with the few numbers that matter.

    Without a terminal (a Slurm log, a file) it prints one plain line every 5% instead, so that the
    log is not one long line of carriage returns, and none in the first seconds: short work has
    nothing to report. Create it with `enabled=False` on other ranks.
    """

    def __init__(
        self,
        total: int,
        description: str,
        initial: int = 0,
        *,
        enabled: bool = True,
        stream: TextIO | None = None,
    ) -> None:
        self.total = total
        self.done = initial
        self._description = description
        self._initial = initial
        self._enabled = enabled
        self._stream = stream if stream is not None else sys.stderr
        self._every = max(1, -(-total // PLAIN_LINES))
        self._start = time.monotonic()
        self._bar = self._open_bar() if enabled and self._stream.isatty() else None

    def update(self, step: int, numbers: dict[str, float] | None = None) -> None:
        """Show that `step` steps of `total` are done, with `numbers` beside it."""
        if not self._enabled:
            return
        advanced = step - self.done
        self.done = step
        shown = {name: format_number(value) for name, value in (numbers or {}).items()}
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(advanced)
        elif step % self._every == 0 or step >= self.total:
            elapsed = time.monotonic() - self._start
            if elapsed >= PATIENCE:
                print(self._plain_line(shown, elapsed), file=self._stream, flush=True)

    def close(self) -> None:
        """End the bar and leave the cursor on a new line."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _open_bar(self) -> tqdm:
        from tqdm import tqdm

        return tqdm(
            total=self.total,
            desc=self._description,
            initial=self._initial,
            file=self._stream,
            dynamic_ncols=True,
        )

    def _plain_line(self, shown: dict[str, str], elapsed: float) -> str:
        per_step = elapsed / max(1, self.done - self._initial)
        left = format_duration(per_step * max(0, self.total - self.done))
        numbers = "".join(f"  {name} {value}" for name, value in shown.items())
        percent = 100 * self.done // max(1, self.total)
        return f"{self._description} {self.done}/{self.total} ({percent}%){numbers}  {left} left"


class Timers:
    """Adds up wall-clock seconds per phase: `with timers("rollout"): ...`, then `pop()`.

    It reads the clock of the host. Work that an accelerator still has in its queue when the block
    ends counts for the block that waits for it. Each block runs inside `mark(name)`, which a
    profiler sets to name it in a trace.

    Args:
        around: a context for the time of each block, by its name.
    """

    def __init__(
        self, around: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext()
    ) -> None:
        self._around = around
        self._seconds: dict[str, float] = defaultdict(float)
        self.mark: Callable[[str], AbstractContextManager] = nullcontext

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the duration of the block to phase `name`, also if the block raises."""
        start = time.perf_counter()
        try:
            with self._around(name), self.mark(name):
                yield
        finally:
            self._seconds[name] += time.perf_counter() - start

    def pop(self) -> dict[str, float]:
        """Return `{"time/<phase>": seconds}` since the last call, and start again from zero."""
        seconds = {f"time/{name}": value for name, value in self._seconds.items()}
        self._seconds.clear()
        return seconds
