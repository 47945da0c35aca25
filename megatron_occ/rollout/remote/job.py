"""One call of ``submit``: every request is answered exactly once, or the call fails."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass

from megatron_occ.rollout.engine import ABORT, EngineError, Request, SamplingSettings
from megatron_occ.rollout.remote.fleet import Fleet, Member
from megatron_occ.rollout.remote.gate import Gate
from megatron_occ.rollout.remote.http import Cancelled, TransportError
from megatron_occ.rollout.remote.parts import Part, fresh, joined, rest_of
from megatron_occ.rollout.remote.server import Aborted, Answer, StaleWeights
from megatron_occ.rollout.remote.settings import RemoteSettings
from megatron_occ.rollout.remote.workers import Workers, is_over
from megatron_occ.rollout.text import StopText

Sent = Sequence[Future[None]]
# seconds between two attempts, at most
LONGEST_PAUSE = 30.0


class Ledger:
    """Answers by index of the request; the first one counts."""

    def __init__(self, size: int) -> None:
        self._answers: list[Sequence[Part] | None] = [None] * size
        self._closed = False
        self._lock = threading.Lock()

    def put(self, index: int, parts: Sequence[Part]) -> bool:
        """Enter an answer; False if it came too late: there is one, or the ledger is closed."""
        with self._lock:
            if self._closed or self._answers[index] is not None:
                return False
            self._answers[index] = parts
            return True

    def withdraw_stale(self) -> list[int]:
        """Take out answers of servers that turned out to have had other weights; what is open."""
        with self._lock:
            for index, parts in enumerate(self._answers):
                if parts is not None and any(part.is_stale for part in parts):
                    self._answers[index] = None
            return [index for index, parts in enumerate(self._answers) if parts is None]

    def close(
        self, stop: StopText | None = None, *, only_seen: bool = False
    ) -> list[Answer | None]:
        """All answers; None where there is none.

        Args:
            stop: finds the run's stop strings.
            only_seen: leave out those of servers whose weights have not been looked at since.
        """
        with self._lock:
            self._closed = True
            kept = [
                None if only_seen and parts and any(part.is_unseen for part in parts) else parts
                for parts in self._answers
            ]
            return [None if parts is None else joined(parts, stop) for parts in kept]


@dataclass(frozen=True)
class Company:
    """What the jobs of an engine share."""

    fleet: Fleet
    gate: Gate
    workers: Workers
    settings: RemoteSettings


class Job:
    """Sends requests to the servers, each with its own retries, in a thread of its own.

    Args:
        company: servers, threads and limits.
        requests: wanted responses.
        sampling: of all.
        rank: what waits with a lower one is sent first.
        stop: finds the stop strings of ``sampling``.

    Attributes:
        is_aborted: whoever asked does not want it any more; a failure is none then.
    """

    def __init__(
        self,
        company: Company,
        requests: Sequence[Request],
        sampling: SamplingSettings,
        *,
        rank: int = 0,
        stop: StopText | None = None,
    ) -> None:
        self._fleet, self._gate = company.fleet, company.gate
        self._workers, self._settings = company.workers, company.settings
        self._requests, self._sampling = requests, sampling
        self._rank, self._stop_text = rank, stop
        self._groups = prompt_groups(requests)
        self._ledger = Ledger(len(requests))
        self._done: Future[list[Answer | None]] = Future()
        self.stop, self.is_aborted = threading.Event(), False

    def start(self) -> None:
        """Begin, without waiting; the requests stand in line when this returns."""
        sent = self._send(range(len(self._requests)))
        threading.Thread(target=self._settle, args=(sent,), name="rollout job", daemon=True).start()

    def result(self) -> list[Answer | None]:
        """Answers in the requests' order; None for those that :meth:`abort` left unfinished.

        After an abort no server is waited for longer than ``workers.PATIENCE``: answers of one
        that has not been looked at by then are left out.

        Raises:
            EngineError: a request failed for good; the others are ended.
        """
        try:
            over = is_over(self._done, self.stop)
            if over and not (self.is_aborted and self._done.exception()):
                return self._done.result()
            return self._ledger.close(self._stop_text, only_seen=True)
        except BaseException:
            # an interrupt of the waiting ends the work too
            self.abort()
            raise

    def abort(self) -> None:
        """End the job, from any thread; servers end what they do for it."""
        self.stop.set()
        self._fleet.abort(self.stop)

    def _settle(self, sent: Sent) -> None:
        try:
            self._done.set_result(self._run(sent))
        except BaseException as error:
            self.stop.set()
            self._done.set_exception(error)

    def _run(self, sent: Sent) -> list[Answer | None]:
        """All answers, the requests having been sent.

        The servers' weights are looked at again at the end: answers of one that was restarted in
        between are asked for anew.
        """
        left: Sequence[int] = range(len(self._requests))
        for attempt in range(self._settings.retries + 1):
            if not left or self.stop.is_set():
                break
            if attempt:
                sent = self._send(left)
            self._await(sent)
            with self._gate.passing(self.stop) as version:
                # whoever closed the gate has looked at the weights
                if version is not None:
                    self._fleet.verify(self.stop)
            left = self._ledger.withdraw_stale()
        if left and not self.stop.is_set():
            raise EngineError(f"{len(left)} requests were answered with other weights each time")
        return self._ledger.close(self._stop_text)

    def _send(self, indices: Sequence[int]) -> Sent:
        return [
            self._workers.submit(self._rank, lambda index=index: self._answer(index))
            for index in indices
        ]

    def _await(self, sent: Sent) -> None:
        try:
            for future in as_completed(sent):
                future.result()
        except BaseException:
            self.abort()
            raise

    def _answer(self, index: int) -> None:
        parts: list[Part] = []
        failures, last = 0, None
        while failures <= self._settings.retries:
            if failures:
                self.stop.wait(pause_before(failures, self._settings.backoff))
            with self._gate.passing(self.stop) as version:
                if version is None or self.stop.is_set():
                    return
                parts = fresh(parts)
                try:
                    part = self._part(index, parts, failures, version)
                except Lost as error:
                    last, failures = error, failures + error.counts
                    continue
            parts.append(part)
            if part.answer.finish_reason != ABORT:
                self._ledger.put(index, parts)
                return
        if self.stop.is_set():
            return
        raise EngineError(f"request {index} failed {failures} times, the last time: {last}")

    def _part(self, index: int, parts: Sequence[Part], attempt: int, version: int) -> Part:
        """What a server adds to the parts; the end, or what there is where weights will change.

        Raises:
            Lost: the server was looked at, and another attempt may succeed.
            TransportError: none will.
        """
        request = rest_of(self._requests[index], parts, self._sampling)
        member = self._fleet.pick(self._groups[index], attempt)
        if member.down:  # all are: this one must be looked at before it is asked
            self._fleet.recover(member, member.epoch, self.stop)
            if member.down:
                raise Lost(f"{member.server.client.url} has not got the weights", counts=True)
        epoch = member.epoch
        try:
            with member.load.request() as answered:
                answer = self._sampled(member, request)
                answered(answer)
        except (Cancelled, TransportError) as error:
            if isinstance(error, TransportError) and not error.retry:
                raise
            raise self._lost(member, epoch, error) from error
        return Part(answer, version, (member, epoch))

    def _sampled(self, member: Member, request: Request) -> Answer:
        """The response of a server, or what there is of it where weights will change."""
        try:
            return member.server.sample(request, self._sampling, self.stop)
        except Aborted as error:
            if self._gate.is_closed:
                return error.answer
            raise

    def _lost(self, member: Member, epoch: int, error: EngineError) -> Lost:
        """The failure of an attempt, after a look at the server."""
        if not self.stop.is_set():
            self._fleet.recover(member, epoch, self.stop, isinstance(error, StaleWeights))
        return Lost(str(error), counts=not isinstance(error, Cancelled))


class Lost(EngineError):
    """A request was not answered, and may be sent again.

    Args:
        message: why.
        counts: as a failure; what the client itself has ended does not.
    """

    def __init__(self, message: str, *, counts: bool) -> None:
        super().__init__(message)
        self.counts = counts


def pause_before(failures: int, backoff: float) -> float:
    """Seconds before another attempt: twice as long after each failure, up to half a minute."""
    return min(backoff * 2.0 ** min(failures - 1, 64), LONGEST_PAUSE)


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
