"""Passes through the model over the rows of a call: prompts, drafts, verification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_occ.mcore.inference.attend import Attention
from megatron_occ.mcore.inference.cache import write
from megatron_occ.mcore.inference.drafter import Drafter, Known
from megatron_occ.mcore.inference.graphs import Capture, Graphs
from megatron_occ.mcore.inference.prefill import Prefix, prefill
from megatron_occ.mcore.inference.room import Room
from megatron_occ.mcore.inference.routes import routes_of
from megatron_occ.mcore.inference.sampler import TokenSampler
from megatron_occ.mcore.inference.slots import Slots, Verified
from megatron_occ.mcore.inference.trunk import Placer, Trunk
from megatron_occ.rollout import SamplingSettings


class Passes:
    """The model over rows and their caches.

    Tokens are sampled on the last stage, by each of its tensor-parallel ranks from the same
    logits, and shared with the other stages.

    Args:
        trunk: of this rank.
        attention: of tokens behind prompts.
        drafter: where drafts are made, on the last stage.
        slots: the rows.
        room: where their tokens lie in caches.
        sampling: temperature and cuts.
        coupled: which drafts stay, see ``rollout.speculative``.
        capture: of cycles, see ``graphs``; None: each is run as it is.
    """

    def __init__(
        self,
        trunk: Trunk,
        attention: Attention,
        drafter: Drafter | None,
        slots: Slots,
        room: Room,
        sampling: SamplingSettings,
        *,
        coupled: bool,
        capture: Capture | None = None,
    ) -> None:
        self.trunk, self.drafter, self.slots, self.room = trunk, drafter, slots, room
        self.sampler = TokenSampler(trunk, sampling, coupled=coupled)
        self.placer = Placer(trunk, attention, slots.length, slots.device)
        self.cache = trunk.new_cache(room)
        self.state = drafter.new_state(room) if drafter else None
        # long rows come first then, to be looked at on their own
        self.attends_by_spans = attention.needs_host
        is_static = trunk.is_static and not attention.needs_host
        self.graphs = Graphs(capture, slots.rows) if capture and is_static else None

    def prefill(self, prompts: Sequence[tuple[int, ...]], longest: int, *, reads: bool) -> Prefix:
        """Read prompts; see ``prefill.prefill``."""
        return prefill(self.trunk, self.drafter, self.placer, prompts, longest=longest, reads=reads)

    def first_tokens(self, prefix: Prefix, sources: Sequence[int], rows: Sequence[int]) -> Verified:
        """Give rows the caches of prompts; returns the tokens drawn after the prompts.

        Args:
            prefix: holds the prompts.
            sources: rows of the prompts in it.
            rows: as many rows, admitted.
        """
        self.room.send()
        self.cache.copy_rows(prefix.cache, sources, rows, prefix.longest)
        if self.state is not None:
            self.state.copy_rows(prefix.state, sources, rows, prefix.longest)
        verified = None
        if prefix.last is not None:
            none = torch.zeros(len(rows), 0, dtype=torch.long, device=self.slots.device)
            keys = self.slots.token_keys(rows, 1)
            verified = self.sampler.verify(prefix.last[sources].unsqueeze(1), none, [], keys)
        return self._share(verified, len(rows), 1)

    def draft_and_verify(self, rows: int, length: int) -> Verified:
        """One cycle of the first ``rows`` rows.

        Args:
            rows: at least one.
            length: tokens to draft.
        """
        self.slots.send()
        self.room.send()
        known, limits, needed = self.slots.known[:rows], None, []
        drafter = self.drafter if length else None
        if drafter is not None:
            limits = drafter.limits(length) if self.graphs else None
            ids = self.slots.ids
            needed = drafter.catch_up(self.placer, self.state, ids, known, limits)
        if self.graphs is None:
            verified = self._cycle(rows, length, needed)
        else:
            padded = self.graphs.padded(rows)
            verified = self.graphs.run(
                padded, length, lambda: self._cycle(padded, length, limits)
            ).first(rows)
        if drafter is not None:
            self.state.drafted(known, length)
        return verified

    def _cycle(self, rows: int, length: int, needed: Sequence[int] | None) -> Verified:
        """Everything between known tokens and verified ones, on the device alone.

        It reads and writes tensors of the slots and caches. What the host knows of the rows is read
        by an ``Attention`` that ``needs_host``, and by no other.

        Args:
            rows, length: see :meth:`draft_and_verify`.
            needed: see ``Drafter.draft``.
        """
        used = slice(0, rows)
        keys = self.slots.token_keys(used, length + 1)
        behind = self.slots.known_on_device(used).unsqueeze(1)
        places = behind + torch.arange(-1, length, device=self.slots.device)
        draft_logprobs = self._draft(places[:, 1:], keys, needed) if length else []
        ids = self.slots.ids[used].gather(1, places)
        last = self.slots.known[used] - 1 + length
        tokens = self.placer.at(self.cache, places, last)
        self.trunk.company.meet(places.numel())
        states = self.trunk.forward(ids, tokens, self.cache)
        verified = None
        if states is not None:
            if self.state is not None:
                write(self.state.hidden[0], tokens.places, states.read)
            by_row = states.main.view(rows, length + 1, -1)
            verified = self.sampler.verify(by_row, ids[:, 1:], draft_logprobs, keys)
        return self._share(verified, rows, length + 1)

    def move(self, rows: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Copy rows of up to ``length`` tokens to other places, all at the same time."""
        self.slots.move(rows, targets)
        self.cache.move(rows, targets, length)
        if self.state is not None:
            self.state.move(rows, targets, length)
        self.room.renamed(rows, targets)

    def states(self, rows: Sequence[int]) -> list[Tensor]:
        """Trunk states of rows at all tokens but the last, [tokens - 1, h] each, on the CPU.

        Where drafts are made; the depths read them from there.
        """
        if self.state is None:
            return []
        kept, ends = self.state.hidden[0], self.slots.known - 1
        found = (self.room.of_row(kept, row, int(ends[row])) for row in rows)
        return [states.to("cpu", copy=True) for states in found]

    def routes(self, rows: Sequence[int]) -> list[Tensor]:
        """See ``Generation.routes``, of prompts and responses in these rows so far."""
        return routes_of(self.trunk, self.cache, self.state, self.slots, rows)

    def _draft(self, places: Tensor, keys: Tensor, needed: Sequence[int] | None) -> list[Tensor]:
        """Put drafts at ``places`` [n, k] of the rows; returns what they were drawn from."""
        distributions: list[Tensor] = []

        def pick(hidden: Tensor, step: int) -> Tensor:
            tokens, log_probs = self.sampler.draft(hidden, keys[:, step])
            if log_probs is not None:
                distributions.append(log_probs)
            return tokens

        rows, length = places.shape
        ids = self.slots.ids
        if self.drafter is not None:
            known = Known(self.slots.known[:rows], self.slots.known_on_device(slice(0, rows)))
            self.drafter.draft(self.placer, self.state, ids, known, needed, length, pick)
        if self.trunk.pipeline.size() > 1:
            drafts = self.trunk.share(ids[:rows].gather(1, places))
            ids[:rows].scatter_(1, places, drafts)
        return distributions

    def _share(self, verified: Verified | None, rows: int, each: int) -> Verified:
        """The last stage's findings on all stages; a later look at some rows is shared too."""
        if self.trunk.pipeline.size() == 1:
            assert verified is not None, "the only stage has logits"
            return verified
        # one message; a double holds every token id
        kept = 0 if self.slots.masks is None else self.slots.masks.size(-1)
        widths = [each, each, 1, each * kept]
        packed = torch.zeros(rows, sum(widths), dtype=torch.float64, device=self.slots.device)
        if verified is not None:
            parts = [part for part in verified.tensors() if part is not None]
            packed = torch.cat([part.reshape(rows, -1).double() for part in parts], dim=1)
        tokens, logprobs, accepted, masks = self.trunk.share(packed).split(widths, dim=1)
        look = verified.again if verified is not None else None
        return Verified(
            tokens.long(),
            logprobs.float(),
            accepted.squeeze(1).long(),
            masks.int().view(rows, each, kept) if kept else None,
            lambda: self._share(look() if look else None, rows, each),
        )
