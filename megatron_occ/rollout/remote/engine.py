"""Rollouts by servers over HTTP."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_occ.rollout.engine import (
    ABORT,
    EngineError,
    Generation,
    Request,
    SamplingSettings,
)
from megatron_occ.rollout.remote.carriers import Carrier, FolderCarrier, described
from megatron_occ.rollout.remote.draft_counter import DraftCounter
from megatron_occ.rollout.remote.fleet import Fleet
from megatron_occ.rollout.remote.gate import Gate
from megatron_occ.rollout.remote.job import Company, Job
from megatron_occ.rollout.remote.probe import Probe, Prober, ProbeReport
from megatron_occ.rollout.remote.server import Answer
from megatron_occ.rollout.remote.settings import RemoteSettings
from megatron_occ.rollout.remote.stops import check_stops
from megatron_occ.rollout.remote.workers import Workers, begun, is_over
from megatron_occ.rollout.statistics import ServerWork
from megatron_occ.rollout.text import StopText

logger = logging.getLogger(__name__)


class RemoteEngine:
    """A :class:`megatron_occ.rollout.engine.RolloutEngine` over vLLM or SGLang servers.

    One process of a run owns it; ``export`` and the probe's ``reference`` are called in that
    process, from the thread that calls :meth:`update_weights`.

    Args:
        settings: servers, limits, tolerances.
        export: writes the policy's present weights, trunk and head, as a Hugging Face folder; or
            a carrier of them, which ``settings.transfer`` other than ``folder`` takes.
        probe: material to check the servers with; without one, old weights go unnoticed.
        decode: the trainer's text of token ids; without it, nobody sees that a server has another
            tokenizer, which is what ends responses at stop strings.

    Raises:
        EngineError: a server does not come up or can't do the work.
    """

    def __init__(
        self,
        settings: RemoteSettings,
        export: Callable[[Path], None] | Carrier,
        probe: Probe | None = None,
        decode: Callable[[Sequence[int]], str] | None = None,
    ) -> None:
        self._settings, self._decode = settings, decode
        self._carrier = _carrier(export, settings)
        self._fleet = Fleet(settings, Prober(probe, settings) if probe is not None else None)
        self._gate, self._workers = Gate(), Workers(settings.concurrency)
        self._company = Company(self._fleet, self._gate, self._workers, settings)
        self._counter = DraftCounter(self._fleet)
        # one change of the weights at a time
        self._lock = threading.Lock()
        self._jobs: set[Job] = set()
        self._jobs_lock = threading.Lock()
        self._asked = 0
        self._newest, self._loaded = -1, False
        # somebody asked for an end, and whether an update has been left in the middle by that
        self._ended, self._is_cut = threading.Event(), False

    @property
    def reports(self) -> dict[str, ProbeReport]:
        """What the last probe measured, by URL."""
        return dict(self._fleet.reports)

    def submit(self, requests: Sequence[Request], sampling: SamplingSettings) -> PendingResponses:
        """See ``RolloutEngine.submit``; what was asked for first is sent first.

        Raises:
            EngineError: no weights were loaded, or the settings can't be served.
        """
        self._asked += 1
        return PendingResponses(self, self._begin(requests, sampling, rank=self._asked), sampling)

    def generate(self, requests: Sequence[Request], sampling: SamplingSettings) -> Generation:
        """See ``RolloutEngine.generate``; sent before what :meth:`submit` was asked for.

        Raises:
            EngineError: see :meth:`submit` and :meth:`PendingResponses.result`.
        """
        return PendingResponses(self, self._begin(requests, sampling, rank=0), sampling).result()

    def _begin(self, requests: Sequence[Request], sampling: SamplingSettings, rank: int) -> Job:
        self._check_loaded()
        self._fleet.check_sampling(sampling)
        stop = None
        if self._decode is not None and sampling.stop_strings:
            stop = StopText(self._decode, tuple(sampling.stop_strings))
        job = Job(self._company, requests, sampling, rank=rank, stop=stop)
        with self._jobs_lock:
            self._jobs.add(job)
            if self._ended.is_set() or self._is_cut:
                job.is_aborted = True
                job.stop.set()
        job.start()
        return job

    def _check_loaded(self) -> None:
        if not self._loaded and not self._is_cut:
            raise EngineError("the servers have no weights of this run: call update_weights")

    def collect(self, job: Job, sampling: SamplingSettings) -> Generation:
        """The responses of a job; see :meth:`PendingResponses.result`."""
        try:
            self._check_loaded()
            answers = job.result()
        except BaseException:
            # nobody would end it later
            job.stop.set()
            raise
        finally:
            with self._jobs_lock:
                self._jobs.discard(job)
        events = self._fleet.pop_events()
        if job.is_aborted:
            # what is asked for from now on is wanted; a server that hangs is not waited for
            self._ended.clear()
            return as_generation(answers, [], events)
        if self._decode is not None:
            events += check_stops(answers, sampling, self._decode)
        return as_generation(answers, self._work(), events)

    def _work(self) -> list[ServerWork]:
        """What each server did since the last call."""
        found = self._fleet.pop_work()
        for work, drafts in zip(found, self._counter.pop(), strict=True):
            work.drafts = drafts
        return found

    def update_weights(self, version: int) -> None:
        """See ``RolloutEngine.update_weights``.

        What servers are working on is interrupted, and goes on under the new weights. After
        :meth:`abort` no server is waited for longer than ``workers.PATIENCE``; all that is asked
        for is aborted then, until a later update succeeds.

        Raises:
            EngineError: the version does not grow, the export failed, or a server did not take the
                weights; nothing is generated until a later update succeeds.
        """
        with self._lock:
            self._is_cut = False
            if version <= self._newest:
                raise EngineError(f"version {version} is not newer than version {self._newest}")
            was_loaded, self._loaded = self._loaded, False
            self._newest = version
            begin = time.perf_counter()
            weights = self._carrier.publish(version)
            ready = time.perf_counter()
            self._is_cut = not self._done(lambda: self._end_parts(was_loaded))
            if self._is_cut:
                return
            self._fleet.begin_load(weights, version)
            self._is_cut = not self._done(self._load)
            if self._is_cut:
                return
            self._loaded = True
            self._gate.open(version)
            self._carrier.keep(weights)
            logger.info(
                "weights of version %d: %s; offered in %.2f s, on all servers and probed in %.2f s",
                *(version, described(weights), ready - begin, time.perf_counter() - ready),
            )

    def _done(self, work: Callable[[], None]) -> bool:
        """Do some of an update; False: :meth:`abort` was called, and it fails or takes too long."""
        future = begun(work)
        if not is_over(future, self._ended):
            return False
        error = future.exception()
        if error is not None and self._ended.is_set():
            logger.warning("an update of the weights was given up: %s", error)
            return False
        future.result()
        return True

    def _load(self) -> None:
        self._fleet.load()
        self._counter.skip()

    def _end_parts(self, was_loaded: bool) -> None:
        """Before servers get other weights: end what is under way.

        Did it come from the present ones?
        """
        self._gate.close()
        self._fleet.drain(self._gate.is_empty)
        if not was_loaded:
            return
        self._counter.keep()
        with self._jobs_lock:
            is_any = bool(self._jobs)
        if is_any:
            self._fleet.verify(threading.Event())

    def abort(self) -> None:
        """See ``RolloutEngine.abort``."""
        self._ended.set()
        with self._jobs_lock:
            jobs = list(self._jobs)
            for job in jobs:
                job.is_aborted = True
                job.stop.set()
        for job in jobs:
            job.abort()

    def close(self) -> None:
        """See ``RolloutEngine.close``: ends calls under way; servers and folders stay."""
        self.abort()
        self._workers.close()
        self._carrier.close()


def _carrier(export: Callable[[Path], None] | Carrier, settings: RemoteSettings) -> Carrier:
    if settings.transfer == "folder":
        assert callable(export), "writes a folder"
        return FolderCarrier(export, settings.weights_dir)
    assert not callable(export), "carries weights"
    return export


class PendingResponses:
    """Responses that servers work on, see ``rollout.engine.PendingGeneration``."""

    def __init__(self, engine: RemoteEngine, job: Job, sampling: SamplingSettings) -> None:
        self._engine, self._job, self._sampling = engine, job, sampling

    def result(self) -> Generation:
        """See ``PendingGeneration.result``.

        Unfinished responses of an aborted call are empty. Draft counts are those of the servers
        since the result before, other calls' included, and so are events.

        Raises:
            EngineError: a request failed for good, the weights were lost, or the servers have
                another tokenizer.
        """
        return self._engine.collect(self._job, self._sampling)


def as_generation(
    answers: Sequence[Answer | None], work: list[ServerWork], events: list[str]
) -> Generation:
    """Answers as a ``Generation``; without speculative decoding a pass is a token."""
    result = Generation(events=events, servers=work)
    drafts = result.drafts
    for each in work:
        drafts.add(each.drafts)
    for answer in answers:
        result.tokens.append(answer.tokens if answer else [])
        result.logprobs.append(answer.logprobs if answer else [])
        result.finish_reasons.append(answer.finish_reason if answer else ABORT)
        result.versions.append(answer.versions if answer else [])
    if not drafts.passes:
        # the prefill gives the first token
        drafts.passes = drafts.tokens = sum(max(len(tokens) - 1, 0) for tokens in result.tokens)
    return result
