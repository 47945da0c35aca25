"""Rollouts by servers over HTTP."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_occ.rollout.engine import (
    ABORT,
    DraftStatistics,
    EngineError,
    Generation,
    Request,
    SamplingSettings,
)
from megatron_occ.rollout.remote.carriers import Carrier, FolderCarrier, described
from megatron_occ.rollout.remote.fleet import Fleet
from megatron_occ.rollout.remote.job import Job
from megatron_occ.rollout.remote.probe import Probe, Prober, ProbeReport, difference
from megatron_occ.rollout.remote.server import Answer
from megatron_occ.rollout.remote.settings import RemoteSettings
from megatron_occ.rollout.remote.stops import check_stops

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
        self._lock = threading.Lock()
        self._job: Job | None = None
        self._job_lock = threading.Lock()
        self._aborted = False  # before there was a job
        self._newest, self._loaded = -1, False

    @property
    def reports(self) -> dict[str, ProbeReport]:
        """What the last probe measured, by URL."""
        return dict(self._fleet.reports)

    def generate(self, requests: Sequence[Request], sampling: SamplingSettings) -> Generation:
        """See ``RolloutEngine.generate``.

        Unfinished responses of an aborted call are empty. Draft counts are those of the servers
        between start and end of the call, events those since the call before.

        Raises:
            EngineError: no weights were loaded, the settings can't be served, a request failed for
                good, or the servers have another tokenizer.
        """
        with self._lock:
            if not self._loaded:
                raise EngineError("the servers have no weights of this run: call update_weights")
            for member in self._fleet.members:
                member.server.check_sampling(sampling)
            job = Job(self._fleet, requests, sampling, self._settings)
            with self._job_lock:
                self._job = job
                if self._aborted:
                    job.stop.set()
            try:
                before = self._fleet.drafts()
                answers = job.run()
                drafts = between(before, self._fleet.drafts())
            finally:
                with self._job_lock:
                    self._job, self._aborted = None, False
            if self._decode is not None:
                self._fleet.events += check_stops(answers, sampling, self._decode)
            result = collect(answers, drafts)
            result.events, self._fleet.events = self._fleet.events, []
            return result

    def update_weights(self, version: int) -> None:
        """See ``RolloutEngine.update_weights``.

        Raises:
            EngineError: the version does not grow, the export failed, or a server did not take the
                weights; nothing is generated until a later update succeeds.
        """
        with self._lock:
            if version <= self._newest:
                raise EngineError(f"version {version} is not newer than version {self._newest}")
            self._loaded = False
            self._newest = version
            begin = time.perf_counter()
            weights = self._carrier.publish(version)
            ready = time.perf_counter()
            self._fleet.load(weights, version)
            self._loaded = True
            self._carrier.keep(weights)
            logger.info(
                "weights of version %d: %s; offered in %.2f s, on all servers and probed in %.2f s",
                *(version, described(weights), ready - begin, time.perf_counter() - ready),
            )

    def abort(self) -> None:
        """See ``RolloutEngine.abort``."""
        with self._job_lock:
            job, self._aborted = self._job, True
        if job is not None:
            job.abort()

    def close(self) -> None:
        """See ``RolloutEngine.close``: ends a running call; servers and folders stay."""
        self.abort()
        self._carrier.close()


def _carrier(export: Callable[[Path], None] | Carrier, settings: RemoteSettings) -> Carrier:
    if settings.transfer == "folder":
        assert callable(export), "writes a folder"
        return FolderCarrier(export, settings.weights_dir)
    assert not callable(export), "carries weights"
    return export


def between(
    before: Sequence[DraftStatistics | None], after: Sequence[DraftStatistics | None]
) -> DraftStatistics:
    """Counts of all servers in between; a server that was down at one end is left out."""
    total = DraftStatistics()
    for old, new in zip(before, after, strict=True):
        if old is not None and new is not None:
            total.add(difference(new, old))
    return total


def collect(answers: Sequence[Answer | None], drafts: DraftStatistics) -> Generation:
    """Answers as a ``Generation``; without speculative decoding a pass is a token."""
    result = Generation(drafts=drafts)
    for answer in answers:
        result.tokens.append(answer.tokens if answer else [])
        result.logprobs.append(answer.logprobs if answer else [])
        result.finish_reasons.append(answer.finish_reason if answer else ABORT)
    if not drafts.passes:
        # the prefill gives the first token
        drafts.passes = drafts.tokens = sum(max(len(tokens) - 1, 0) for tokens in result.tokens)
    return result
