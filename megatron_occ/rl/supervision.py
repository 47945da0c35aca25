"""What looks after a trainer: signals, skipped updates, time limits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from megatron_occ.rl.batch import MiniBatch
from megatron_occ.rl.non_finite import NonFiniteError, SkippedUpdates
from megatron_occ.rl.stopping import Ranks, StopRequested, StopSignal
from megatron_occ.rl.watchdog import Watchdog


class Supervision:
    """Called by a trainer between its pieces of work, on all ranks; by default nothing happens.

    Args:
        stop: tells that the run is asked to end.
        skips: takes in updates whose gradient was not finite.
        watchdog: has a time limit for each phase.
        before_step: called before each step; returns what is to be told, if anything.
    """

    def __init__(
        self,
        *,
        stop: StopSignal | None = None,
        skips: SkippedUpdates | None = None,
        watchdog: Watchdog | None = None,
        before_step: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.stop, self.skips, self.watchdog = stop or StopSignal(), skips, watchdog
        self._before_step = before_step

    @contextmanager
    def at_work(
        self, abort: Callable[[], None], save: Callable[[], None], tell: Callable[[str], None]
    ) -> Iterator[None]:
        """The whole of a trainer's loop; what ends it early is saved and told.

        Args:
            abort: ends what takes long, called in a thread of its own when a signal comes.
            save: writes a checkpoint of the finished steps, where there is none of them.
            tell: takes a sentence for the log of the run.

        Raises:
            StopRequested: the run was asked to end.
            NonFiniteError: too many updates in a row were skipped.
        """
        with self.stop.watched(abort):
            try:
                yield
            except StopRequested:
                save()
                tell(self.stop.sentence())
                raise
            except NonFiniteError:
                save()
                raise
            finally:
                if self.watchdog is not None:
                    self.watchdog.leave()

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Time that counts for a phase and its limit."""
        return nullcontext() if self.watchdog is None else self.watchdog.phase(name)

    def begin_step(self, step: int) -> list[str]:
        """A step is about to begin; returns what is to be told."""
        if self.watchdog is not None:
            self.watchdog.begin_step(step)
        text = self._before_step()
        return [] if text is None else [text]

    def after_update(self, skipped: bool, step: int, update: int, mine: MiniBatch) -> None:
        """See ``SkippedUpdates.note``."""
        if self.skips is not None:
            self.skips.note(skipped, step, update, mine)

    def end_if_spoilt(self, step: int) -> None:
        """See ``SkippedUpdates.check``."""
        if self.skips is not None:
            self.skips.check(step)

    def end_if_asked(self, ranks: Ranks) -> None:
        """Raise StopRequested on all ranks if one was asked to stop."""
        if self.stop.is_asked_of_any(ranks):
            raise StopRequested
