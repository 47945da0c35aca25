"""The servers of a run: who answers, who is down, and bringing one back."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from megatron_occ.rollout.engine import DraftStatistics, EngineError, SamplingSettings
from megatron_occ.rollout.remote.carriers import Weights
from megatron_occ.rollout.remote.http import Client, TransportError
from megatron_occ.rollout.remote.patience import patiently
from megatron_occ.rollout.remote.probe import Prober, ProbeReport
from megatron_occ.rollout.remote.server import Server, StaleWeights
from megatron_occ.rollout.remote.settings import RemoteSettings
from megatron_occ.rollout.remote.sglang import SglangServer
from megatron_occ.rollout.remote.vllm import VllmServer
from megatron_occ.rollout.remote.workers import at_once
from megatron_occ.rollout.remote.workload import Workload
from megatron_occ.rollout.statistics import ServerWork

POLL = 0.5
# requests at a server beyond which the others of its groups go elsewhere: so many times those at
# the server with the fewest, and some
UNEVEN, SLACK = 2, 16
# seconds for requests that were told to end, before they are told again
ENDING = 1.0

logger = logging.getLogger(__name__)


class Member:
    """A server and its state."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.down = False
        # grows with each recovery, so that many requests that fail together cause one
        self.epoch = 0
        # those at whose end the server was found with other weights: its answers do not count
        self.stale: set[int] = set()
        self.lock = threading.Lock()
        self.load = Workload()
        # of the weights that it has got, to their end; -1: nobody knows
        self.version = -1
        self.is_known = False  # what it can do has been read


class Fleet:
    """All servers; they start out with weights of nobody knows which version.

    A server that is lost is left out until it answers again; so is one that is not there at the
    start, if another is. One that comes back gets the present weights before it is asked.

    Raises:
        EngineError: no server comes up in ``update_timeout``, or one can't do the work.
    """

    def __init__(self, settings: RemoteSettings, prober: Prober | None) -> None:
        self._settings, self._prober = settings, prober
        self.weights: tuple[Weights, int] | None = None
        self.events: list[str] = []
        # of what has been asked for so far
        self._samplings: list[SamplingSettings] = []
        self.reports: dict[str, ProbeReport] = {}
        kinds = {"vllm": VllmServer, "sglang": SglangServer}
        self.members = [
            Member(kinds[settings.server](self._client(u), settings)) for u in settings.urls
        ]
        self._wait_for_all()
        for member in self.members:
            if not member.down:
                self._get_to_know(member)

    def check_sampling(self, sampling: SamplingSettings) -> None:
        """See ``Server.check_sampling``: of all that have come up so far, and of others later."""
        for member in self.members:
            if member.is_known:
                member.server.check_sampling(sampling)
        if sampling not in self._samplings:
            self._samplings.append(sampling)

    def _client(self, url: str) -> Client:
        s = self._settings
        return Client(url, s.timeout, s.max_answer_bytes, s.api_key)

    def pick(self, group: int, attempt: int) -> Member:
        """Server for an attempt.

        The requests of a group share a server's prefix cache, unless that one has far more to do
        than another.
        """
        up = [member for member in self.members if not member.down] or self.members
        home = up[(group + attempt) % len(up)]
        least = min(up, key=lambda member: member.load.queue)
        return least if home.load.queue > UNEVEN * least.load.queue + SLACK else home

    def begin_load(self, weights: Weights, version: int) -> None:
        """New weights are there; asks the trainer for its log-probs, in this thread."""
        self.weights = (weights, version)
        if self._prober is not None:
            self._prober.begin()

    def load(self) -> None:
        """Load them on all servers at once and probe each; those that are lost are left out.

        Raises:
            EngineError: a server that answers has not taken them, or none came up; none of them is
                to be used.
        """
        self._each(self._bring_up_to_date)
        if all(member.down for member in self.members):
            back = self._wait(self.members, threading.Event())
            assert back is not None, "only a stop ends the waiting"
            patiently(lambda: self._update(back), self._settings)
            self._mark(back, True)

    def drain(self, is_empty: Callable[[float], bool]) -> None:
        """Have servers end what they work on, with the tokens that there are.

        Args:
            is_empty: whether all answers are in, after a wait of so many seconds.
        """
        while not is_empty(0.0):
            # again for those that were still on their way to a server
            self._each(_interrupt)
            if is_empty(ENDING):
                return

    def verify(self, stop: threading.Event) -> None:
        """Find out which servers are up and whether they still serve the loaded weights."""
        self._each(lambda member: self.recover(member, member.epoch, stop))

    def recover(
        self, member: Member, epoch: int, stop: threading.Event, stale: bool = False
    ) -> None:
        """After a failed request: is the server up, and was it restarted with other weights?

        Args:
            epoch: of the member when the request was sent; nothing is done if it has grown since.
            stop: ends the waiting for a server to come back, not the look at one that is up.
            stale: the server said that it has other weights.

        Raises:
            EngineError: no server came back, or one does not take the present weights.
        """
        self._close_epoch(member, epoch, stale)
        if all(member.down for member in self.members):
            back = self._wait(self.members, stop)
            if back is not None:
                self._close_epoch(back, back.epoch, stale=False)

    def _close_epoch(self, member: Member, epoch: int, stale: bool) -> None:
        with member.lock:
            if member.epoch == epoch:
                fault = self._fault(member, stale)
                self._mark(member, not fault, fault)
                member.epoch += 1

    def drafts(self) -> list[DraftStatistics | None]:
        """Counts of each server; None where it does not answer."""
        return [_drafts(member, self._settings) for member in self.members]

    def pop_work(self) -> list[ServerWork]:
        """What each server did since the last call, without its drafts."""
        return [m.load.pop(m.server.client.url, m.version) for m in self.members]

    def pop_events(self) -> list[str]:
        """What became of servers since the last call, for people."""
        events, self.events = self.events, []
        return events

    def abort(self, stop: threading.Event) -> None:
        """End the requests that were sent with this ``stop``."""
        self._each(lambda member: member.server.abort(stop))

    def _fault(self, member: Member, stale: bool) -> str:
        """Why a server can't be used; empty: it has the present weights, loaded anew if need be."""
        if not member.server.healthy():
            if self._is_behind(member):
                member.stale.add(member.epoch)
            return "it does not answer"
        if self.weights is None:
            return ""
        try:
            if stale or self._is_behind(member) or not self._serves_present(member):
                member.stale.add(member.epoch)
                if not member.down:
                    self._tell(member, "had other weights than it was given: it gets them again")
                patiently(lambda: self._reload(member), self._settings)
        except EngineError as error:
            if not isinstance(error, TransportError) and not member.down:
                raise
            # nobody knows what its answers came from
            member.stale.add(member.epoch)
            return str(error)
        return ""

    def _is_behind(self, member: Member) -> bool:
        """Whether it may have missed an update, or have been started anew."""
        return member.down or (self.weights is not None and member.version != self.weights[1])

    def _get_to_know(self, member: Member) -> None:
        member.is_known = False
        patiently(member.server.inspect, self._settings)
        for sampling in self._samplings:
            member.server.check_sampling(sampling)
        known = {each.server.speculative_tokens for each in self.members if each.is_known}
        if known - {member.server.speculative_tokens}:
            raise EngineError("the servers differ in their number of speculative tokens")
        member.is_known = True

    def _load(self, member: Member) -> None:
        assert self.weights is not None, "there is something to load"
        weights, version = self.weights
        # one that comes back may have been started with other options
        if member.down or not member.is_known:
            self._get_to_know(member)
        # half of them are nobody's
        member.version = -1
        member.server.load_weights(weights, version)
        member.version = version

    def _reload(self, member: Member) -> None:
        self._load(member)
        if self._prober is not None:
            self._prober.check_logprobs(member.server)
            self._prober.check_head(member.server)

    def _serves_present(self, member: Member) -> bool:
        assert self.weights is not None, "there is something to hold"
        weights, _ = self.weights
        if patiently(lambda: member.server.holds(weights), self._settings) is False:
            return False
        prober = self._prober
        if prober is None:
            return True
        try:
            patiently(lambda: prober.check_logprobs(member.server), self._settings)
        except StaleWeights:
            return False
        except TransportError:
            raise
        except EngineError:
            return False
        return True

    def _bring_up_to_date(self, member: Member) -> None:
        """Load the present weights and probe; a server that is lost meanwhile is marked."""
        was_down = member.down
        try:
            if was_down and not member.server.healthy():
                return
            patiently(lambda: self._update(member), self._settings)
        except EngineError as error:
            if was_down:
                self._tell(member, f"stays left out: {error}")
                return
            is_lost = isinstance(error, TransportError) and error.retry
            if not is_lost or member.server.healthy():
                raise
            self._mark(member, False, f"lost in an update of its weights: {error}")
        else:
            self._mark(member, True)

    def _update(self, member: Member) -> None:
        self._load(member)
        if self._prober is not None:
            self.reports[member.server.client.url] = self._prober.check(member.server)

    def _mark(self, member: Member, is_up: bool, cause: str = "") -> None:
        if member.down and is_up:
            self._tell(member, "is back")
        if not member.down and not is_up:
            self._tell(member, f"is left out: {cause}")
        member.down = not is_up

    def _tell(self, member: Member, text: str) -> None:
        self.events.append(f"rollout server {member.server.client.url} {text}")
        logger.warning("%s", self.events[-1])

    def _wait_for_all(self) -> None:
        """Wait for every server to come up; those that do not are left out if another does."""
        deadline = time.monotonic() + self._settings.update_timeout
        missing = _not_up(self.members)
        if missing:
            logger.info("waiting for rollout servers: %s", _urls(missing))
        while missing and time.monotonic() <= deadline:
            time.sleep(POLL)
            missing = _not_up(missing)
        if len(missing) == len(self.members):
            raise self._nobody(missing)
        for member in missing:
            self._mark(member, False, "it is not up, and is taken in when it is")

    def _nobody(self, members: list[Member]) -> EngineError:
        seconds = self._settings.update_timeout
        return EngineError(f"no server is up after {seconds:g} s: {_urls(members)}")

    def _wait(self, members: list[Member], stop: threading.Event) -> Member | None:
        """First server that is healthy; None once ``stop`` is set."""
        deadline = time.monotonic() + self._settings.update_timeout
        while not stop.is_set():
            for member in members:
                if member.server.healthy():
                    return member
            if time.monotonic() > deadline:
                raise self._nobody(members)
            stop.wait(POLL)
        return None

    def _each(self, work: Callable[[Member], None]) -> None:
        """Do something on all servers at once; one error for all that failed."""
        futures = at_once(work, self.members)
        errors = [error for future in futures if (error := future.exception()) is not None]
        for error in errors:
            if not isinstance(error, EngineError):
                raise error
        if errors:
            raise EngineError("; ".join(str(error) for error in errors))


def _not_up(members: list[Member]) -> list[Member]:
    """Those that do not answer; all are asked at once."""
    found = at_once(lambda member: member.server.healthy(), members)
    return [member for member, up in zip(members, found, strict=True) if not up.result()]


def _urls(members: list[Member]) -> str:
    return ", ".join(member.server.client.url for member in members)


def _interrupt(member: Member) -> None:
    if member.down:
        # it does not answer: the requests are ended on this side
        member.server.client.cancel()
        return
    # what looks at its weights is waited for: its calls would be ended too
    if not member.lock.acquire(blocking=False):
        return
    try:
        # one that does not answer ends its requests by that
        with suppress(TransportError):
            member.server.interrupt()
    finally:
        member.lock.release()


def _drafts(member: Member, settings: RemoteSettings) -> DraftStatistics | None:
    """Counts of a server, None if it is down: that is no reason to throw responses away."""
    try:
        return None if member.down else patiently(member.server.drafts, settings)
    except TransportError as error:
        if not error.retry:
            raise
        return None
