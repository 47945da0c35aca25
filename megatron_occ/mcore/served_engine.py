"""Rollouts by servers that one rank talks to for all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron_occ.mcore.layout import Layout
from megatron_occ.mcore.main_rank import MainRank
from megatron_occ.rollout import Generation, Request, RolloutEngine, SamplingSettings
from megatron_occ.rollout.engine import Done, PendingGeneration


class ServedEngine:
    """A :class:`megatron_occ.rollout.engine.RolloutEngine` on all ranks, over one on the main rank.

    Servers belong to a whole run: they load weights once for all data-parallel shares, and their
    counts of drafts can't be told apart. So one rank talks to them, with the requests of all.

    Every method but :meth:`abort` is called by all ranks.

    Args:
        layout: this rank's place.
        main: the rank that talks.
        prepare: what all ranks have to do for an update of the weights before the main one goes on.
        connect: makes the engine; called on the main rank.

    Raises:
        EngineError: on all ranks, where the main one failed; so do all methods.
    """

    def __init__(
        self,
        layout: Layout,
        main: MainRank,
        prepare: Callable[[], None],
        connect: Callable[[], RolloutEngine],
    ) -> None:
        self._layout, self._main, self._prepare = layout, main, prepare
        self._engine: RolloutEngine | None = None
        self._version: int | None = None
        main.run(lambda: self._open(connect))

    def submit(self, requests: Sequence[Request], sampling: SamplingSettings) -> ServedResponses:
        """See ``RolloutEngine.submit``.

        Args:
            requests: of this rank's share, the same on all ranks of it.
            sampling: the same on all ranks.
        """
        return self._ask(requests, sampling, waits=False)

    def generate(self, requests: Sequence[Request], sampling: SamplingSettings) -> Generation:
        """See ``RolloutEngine.generate``; with the arguments of :meth:`submit`."""
        return self._ask(requests, sampling, waits=True).result()

    def update_weights(self, version: int) -> None:
        """See ``RolloutEngine.update_weights``; a version that is served already is left alone."""
        if version == self._version:
            return
        self._prepare()
        self._main.run(lambda: self._talking.update_weights(version))
        self._version = version

    def abort(self) -> None:
        """See ``RolloutEngine.abort``; effective on the main rank alone."""
        if self._engine is not None:
            self._engine.abort()

    def close(self) -> None:
        """See ``RolloutEngine.close``; no other rank is waited for."""
        if self._engine is not None:
            self._engine.close()

    @property
    def _talking(self) -> RolloutEngine:
        assert self._engine is not None, "the main rank has one"
        return self._engine

    def _ask(
        self, requests: Sequence[Request], sampling: SamplingSettings, *, waits: bool
    ) -> ServedResponses:
        """Have the main rank ask for the responses of all shares, in their order."""
        share = self._layout.data_parallel_rank
        sent = list(requests) if self._layout.is_model_parallel_main else None
        pending = ServedResponses(self._main, self._main.gather((share, sent)))
        self._main.run(lambda: pending.begin(self._talking, sampling, waits=waits))
        return pending

    def _open(self, connect: Callable[[], RolloutEngine]) -> None:
        self._engine = connect()


class ServedResponses:
    """Responses for all ranks, see ``rollout.engine.PendingGeneration``.

    Args:
        main: the rank that talks.
        parts: there, share and requests by rank; requests once for each share.
    """

    def __init__(self, main: MainRank, parts: Sequence[tuple[int, list[Request] | None]]) -> None:
        self._main, self._parts = main, parts
        self._requests = {share: sent for share, sent in parts if sent is not None}
        self._pending: PendingGeneration | None = None

    def begin(self, engine: RolloutEngine, sampling: SamplingSettings, *, waits: bool) -> None:
        """Ask for the responses, and wait for them if ``waits``; called on the main rank."""
        requests = [r for share in sorted(self._requests) for r in self._requests[share]]
        if waits:
            self._pending = Done(engine.generate(requests, sampling))
        else:
            self._pending = engine.submit(requests, sampling)

    def result(self) -> Generation:
        """This rank's share of them; the first share gets all counts and events.

        Called by all ranks.
        """
        return self._main.run(self._shares)

    def _shares(self) -> list[Generation]:
        """Responses for each rank, those of its share."""
        assert self._pending is not None, "the main rank has asked"
        merged = self._pending.result()
        shares: dict[int, Generation] = {}
        start, order = 0, sorted(self._requests)
        for share in order:
            stop = start + len(self._requests[share])
            shares[share] = _part(merged, slice(start, stop))
            start = stop
        first = shares[order[0]]
        first.drafts, first.events, first.servers = merged.drafts, merged.events, merged.servers
        return [shares[share] for share, _ in self._parts]


def _part(whole: Generation, rows: slice) -> Generation:
    """Some responses, without the counts of drafts."""
    fields: tuple[Any, ...] = (whole.tokens, whole.logprobs, whole.finish_reasons)
    return Generation(*(field[rows] for field in fields), versions=whole.versions[rows])
