"""One call of ``generate``: every request is answered exactly once, or the call fails."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from megatron_occ.rollout.engine import EngineError, Request, SamplingSettings
from megatron_occ.rollout.remote.fleet import Fleet, Member
from megatron_occ.rollout.remote.http import Cancelled, TransportError
from megatron_occ.rollout.remote.server import Answer, StaleWeights
from megatron_occ.rollout.remote.settings import RemoteSettings

# who answered: a server between two looks at its weights
Source = tuple[Member, int]


class Ledger:
    """Answers by index of the request; the first one counts."""

    def __init__(self, size: int) -> None:
        self._answers: list[tuple[Answer, Source] | None] = [None] * size
        self._closed = False
        self._lock = threading.Lock()

    def put(self, index: int, answer: Answer, source: Source) -> bool:
        """Enter an answer; False if it came too late: there is one, or the ledger is closed."""
        with self._lock:
            if self._closed or self._answers[index] is not None:
                return False
            self._answers[index] = (answer, source)
            return True

    def withdraw_stale(self) -> list[int]:
        """Take out answers of servers that turned out to have had other weights; what is open."""
        with self._lock:
            for index, entry in enumerate(self._answers):
                if entry is not None and entry[1][1] in entry[1][0].stale:
                    self._answers[index] = None
            return [index for index, entry in enumerate(self._answers) if entry is None]

    def close(self) -> list[Answer | None]:
        """All answers; None where there is none."""
        with self._lock:
            self._closed = True
            return [entry[0] if entry is not None else None for entry in self._answers]


class Job:
    """Sends requests to the servers, each with its own retries."""

    def __init__(
        self,
        fleet: Fleet,
        requests: Sequence[Request],
        sampling: SamplingSettings,
        settings: RemoteSettings,
    ) -> None:
        self._fleet, self._requests, self._sampling = fleet, requests, sampling
        self._settings = settings
        self._groups = prompt_groups(requests)
        self._ledger = Ledger(len(requests))
        self.stop = threading.Event()

    def run(self) -> list[Answer | None]:
        """Answers in the requests' order; None for those that :meth:`abort` left unfinished.

        The servers' weights are looked at again at the end: answers of one that was restarted in
        between are asked for anew.

        Raises:
            EngineError: a request failed for good; the others are ended.
        """
        left = list(range(len(self._requests)))
        try:
            for _ in range(self._settings.retries + 1):
                if not left or self.stop.is_set():
                    break
                self._send(left)
                self._fleet.verify(self.stop)
                left = self._ledger.withdraw_stale()
        except BaseException:
            self.abort()
            raise
        if left and not self.stop.is_set():
            raise EngineError(f"{len(left)} requests were answered with other weights each time")
        return self._ledger.close()

    def _send(self, indices: Sequence[int]) -> None:
        workers = min(self._settings.concurrency, len(indices))
        with ThreadPoolExecutor(workers, thread_name_prefix="rollout") as pool:
            futures = [pool.submit(self._answer, index) for index in indices]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                self.abort()
                raise

    def abort(self) -> None:
        """End the job, from any thread."""
        self.stop.set()
        self._fleet.abort()

    def _answer(self, index: int) -> None:
        last: EngineError | None = None
        for attempt in range(self._settings.retries + 1):
            if attempt:
                self.stop.wait(self._settings.backoff * 2 ** (attempt - 1))
            if self.stop.is_set():
                return
            member = self._fleet.pick(self._groups[index], attempt)
            if member.down:  # all are: this one must be looked at before it is asked
                self._fleet.recover(member, member.epoch, self.stop)
            epoch = member.epoch
            try:
                answer = member.server.sample(self._requests[index], self._sampling, self.stop)
                self._ledger.put(index, answer, (member, epoch))
                return
            except Cancelled as error:
                last = error
            except TransportError as error:
                if not error.retry:
                    raise
                last = error
            if self.stop.is_set():
                return
            self._fleet.recover(member, epoch, self.stop, isinstance(last, StaleWeights))
        tries = self._settings.retries + 1
        raise EngineError(f"request {index} failed {tries} times, the last time: {last}")


def prompt_groups(requests: Sequence[Request]) -> list[int]:
    """Number of each request's run of neighbours with equal prompts."""
    groups: list[int] = []
    for index, request in enumerate(requests):
        if not index:
            groups.append(0)
        else:
            same = list(request.prompt) == list(requests[index - 1].prompt)
            groups.append(groups[-1] + (not same))
    return groups
