"""A time limit for each phase of a step, and who is missing where one is over.

Ranks wait for each other in messages that have no limit of their own to speak of: rollouts may
take hours. A rank that hangs, or a node that is gone without a word, would hold the others until
the job's time is over. Each rank notes where it stands in the store that the ranks have met in; one
that has been in a phase for too long reads what all have noted, says it, and ends.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

# exit status of a rank that has waited too long, as that of timeout(1)
HUNG = 124
# where a rank is between phases: ranks wait for each other there too
OTHER = "other"
_POLL = 1.0  # seconds
_LATE = 3.0  # seconds between two looks at the clock that are not a stop
_ANSWER = 10.0  # seconds that the store gets to answer
_SHOWN = 8  # ranks of one place that a message names


class Store(Protocol):
    """Keys and values that all ranks share, such as torch's ``TCPStore``."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...


class Watchdog:
    """Notes where this rank stands, and ends it where it stands too long.

    Args:
        store: of all ranks; None: of this one alone.
        rank: this one.
        world_size: ranks.
        limits: seconds by name of the phase; a phase without one may take as long as it wants.
        end: the process, after the message.
    """

    def __init__(
        self,
        store: Store | None,
        rank: int,
        world_size: int,
        limits: Mapping[str, float | None],
        end: Callable[[], None] = lambda: os._exit(HUNG),
    ) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._limits, self._end = limits, end
        self._place: tuple[str, float] | None = None
        self._step = 0
        self._clock, self._looked, self._stopped = threading.Lock(), time.monotonic(), 0.0
        self._done = threading.Event()
        if any(limits.values()):
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def begin_step(self, step: int) -> None:
        """Tell which step the next phases belong to; what is outside of them counts from now on."""
        self._step = step
        self._note(OTHER)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """This rank is in a phase, inside of another one perhaps."""
        before = self._place
        self._note(name)
        try:
            yield
        finally:
            if before is not None and before[0] == OTHER:
                self._note(OTHER)
            else:
                self._place = before

    def leave(self) -> None:
        """The steps are over: what follows has no limit but that of its own phases."""
        self._place = None

    def close(self) -> None:
        """Watch no longer."""
        self._done.set()
        self._place = None

    def _note(self, name: str) -> None:
        self._place = (name, self._now())
        if self._store is not None and self._limits.get(name) is not None:
            note = {"phase": name, "step": self._step}
            self._store.set(_key(self._rank), json.dumps(note))

    def _watch(self) -> None:
        while not self._done.wait(_POLL):
            now, place = self._now(), self._place
            if place is None:
                continue
            name, since = place
            limit, seconds = self._limits.get(name), now - since
            if limit is not None and seconds > limit:
                self._tell(name, seconds, limit)
                self._end()
                return

    def _now(self) -> float:
        """Seconds of this process's own: its clock stands while it is stopped.

        The watching thread looks at it again and again; where much more time has gone by, somebody
        has stopped the process: Slurm's suspension, a debugger.
        """
        with self._clock:
            now = time.monotonic()
            self._stopped += max(0.0, now - self._looked - _LATE)
            self._looked = now
            return now - self._stopped

    def _tell(self, name: str, seconds: float, limit: float) -> None:
        places = self._places()
        text = describe(self._rank, name, self._step, seconds, limit, places)
        print(f"megatron-occ: error: {text}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.__stderr__)

    def _places(self) -> dict[int, str] | None:
        """What each rank has noted; None if the store does not answer."""
        found: dict[int, str] = {}
        store = self._store
        if store is None:
            return {self._rank: self._text_of_this()}

        def read() -> None:
            places = {}
            for rank in range(self._world_size):
                if store.check([_key(rank)]):
                    note = json.loads(store.get(_key(rank)))
                    places[rank] = f"{note['phase']} of step {note['step']}"
                else:
                    places[rank] = "start-up"
            found.update(places)

        reading = threading.Thread(target=read, daemon=True)
        reading.start()
        reading.join(_ANSWER)
        return found or None

    def _text_of_this(self) -> str:
        name = self._place[0] if self._place is not None else "no phase"
        return f"{name} of step {self._step}"


def describe(
    rank: int,
    name: str,
    step: int,
    seconds: float,
    limit: float,
    places: Mapping[int, str] | None,
) -> str:
    """The message of a rank that has waited too long.

    Args:
        rank: this one.
        name: of the phase it is in.
        step: of the trainer.
        seconds: that it has been there.
        limit: of the phase.
        places: of all ranks, as text; None: the store does not answer.
    """
    here = f"{name} of step {step}"
    text = f"rank {rank} has been in {here} for {seconds:.0f} s (phase_limits.{name}={limit:g})"
    if places is None:
        return f"{text}, and rank 0, which keeps the places of all ranks, does not answer"
    others: dict[str, list[int]] = {}
    for each, place in places.items():
        if place != here:
            others.setdefault(place, []).append(each)
    if not others:
        return f"{text}; all ranks are there"
    missing = "; ".join(f"{_ranks(ranks)} in {place}" for place, ranks in others.items())
    return f"{text}; not there: {missing}"


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:_SHOWN]))
    more = f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else ""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {shown}{more}"


def _key(rank: int) -> str:
    return f"place/{rank}"
