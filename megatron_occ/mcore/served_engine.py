"""Rollouts by servers that one rank talks to for all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron_occ.mcore.layout import Layout
from megatron_occ.mcore.main_rank import MainRank
from megatron_occ.rollout import Generation, Request, RolloutEngine, SamplingSettings


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

    def generate(self, requests: Sequence[Request], sampling: SamplingSettings) -> Generation:
        """See ``RolloutEngine.generate``; the first share gets all counts of drafts and events.

        Args:
            requests: of this rank's share, the same on all ranks of it.
            sampling: the same on all ranks.
        """
        share = self._layout.data_parallel_rank
        sent = list(requests) if self._layout.is_model_parallel_main else None
        parts = self._main.gather((share, sent))
        return self._main.run(lambda: self._serve(parts, sampling))

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

    def _open(self, connect: Callable[[], RolloutEngine]) -> None:
        self._engine = connect()

    def _serve(
        self, parts: Sequence[tuple[int, list[Request] | None]], sampling: SamplingSettings
    ) -> list[Generation]:
        """Responses for each rank, those of its share; ``parts``: share and requests by rank."""
        requests = {share: sent for share, sent in parts if sent is not None}
        order = sorted(requests)
        merged = self._talking.generate([r for share in order for r in requests[share]], sampling)
        shares: dict[int, Generation] = {}
        start = 0
        for share in order:
            shares[share] = _part(merged, slice(start, start + len(requests[share])))
            start += len(requests[share])
        shares[order[0]].drafts, shares[order[0]].events = merged.drafts, merged.events
        return [shares[share] for share, _ in parts]


def _part(whole: Generation, rows: slice) -> Generation:
    """Some responses, without the counts of drafts."""
    fields: tuple[Any, ...] = (whole.tokens, whole.logprobs, whole.finish_reasons)
    return Generation(*(field[rows] for field in fields))
