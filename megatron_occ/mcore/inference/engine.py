"""The embedded engine: continuous batching over slots, speculative decoding by the MTP depths."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron_occ.config.pipeline import drafts_on_last_stage
from megatron_occ.config.schema import Config
from megatron_occ.config.sizes import BEHIND_DRAFTS
from megatron_occ.mcore.inference.attend import Attention
from megatron_occ.mcore.inference.decoding import Decoding
from megatron_occ.mcore.inference.drafter import Drafter
from megatron_occ.mcore.inference.graphs import Capture
from megatron_occ.mcore.inference.kernels import choose_attention
from megatron_occ.mcore.inference.layers import Company
from megatron_occ.mcore.inference.passes import Passes
from megatron_occ.mcore.inference.room import PagedRoom, Room
from megatron_occ.mcore.inference.rounding import Rounding
from megatron_occ.mcore.inference.slots import Slots
from megatron_occ.mcore.inference.trunk import Trunk
from megatron_occ.mcore.layout import Layout
from megatron_occ.mcore.model import OCCGPTModel
from megatron_occ.rollout import Generation, Request, SamplingSettings
from megatron_occ.rollout.draft_length import DraftLength
from megatron_occ.rollout.engine import Done, check_finite, merge_shares
from megatron_occ.rollout.text import StopText


@dataclass(frozen=True)
class Speculation:
    """How drafts are used.

    Args:
        length: tokens of a draft at most, 0: none.
        adaptive: fewer or none where that is faster; see ``DraftLength``.
        coupled: keep the drafts that plain sampling would draw; False: speculative sampling, see
            ``rollout.speculative``.
    """

    length: int = 0
    adaptive: bool = False
    coupled: bool = True


NO_DRAFTS = Speculation()


def speculation_from(config: Config) -> Speculation:
    """From ``rl.rollout.speculative``; no drafts where no depth could make them."""
    settings = config.rl.rollout.speculative
    if settings.mode == "off" or not drafts_on_last_stage(config):
        return Speculation()
    return Speculation(
        settings.draft_length, settings.mode == "auto", settings.acceptance == "coupled"
    )


class MegatronEngine:
    """Rollouts by the training model itself, see ``rollout.RolloutEngine``.

    Args:
        chunks: gives this rank's model on the present weights, without sequence and context
            parallelism, in evaluation mode.
        layout: this rank's place.
        slots: sequences at once.
        cache_tokens: tokens of all sequences in the caches at most; None: room for the longest
            sequence in each slot.
        speculation: use of drafts.
        decode: text of token ids, for stop strings.
        capture: makes what captures the cycles of a call, where they can be; None: nothing does.
        rounding: of products, anew at each call; None: none.
    """

    def __init__(
        self,
        chunks: Callable[[], Sequence[OCCGPTModel]],
        layout: Layout,
        *,
        slots: int,
        cache_tokens: int | None = None,
        speculation: Speculation = NO_DRAFTS,
        decode: Callable[[Sequence[int]], str] | None = None,
        capture: Callable[[], Capture] | None = None,
        rounding: Rounding | None = None,
    ) -> None:
        self._chunks, self.layout = chunks, layout
        self.slots, self.cache_tokens = slots, cache_tokens
        self.speculation, self.decode, self.capture = speculation, decode, capture
        self.rounding, self.company = rounding, Company(layout)
        self.draft_length = DraftLength(speculation.length, adaptive=speculation.adaptive)
        self._aborted, self._version = threading.Event(), 0
        # chosen where the model is known
        self._attention: Attention | None = None

    def submit(self, requests: Sequence[Request], sampling: SamplingSettings) -> Done:
        """See ``RolloutEngine.submit``: sampled at once, by the processes that train."""
        return Done(self.generate(requests, sampling))

    def generate(self, requests: Sequence[Request], sampling: SamplingSettings) -> Generation:
        """See ``RolloutEngine.generate``; context-parallel ranks take a share of the requests each.

        Decoding has no sequence to split, so they work as further data-parallel ranks.

        Args:
            requests: the same on all ranks that share the model.
            sampling: of all requests.

        Raises:
            ValueError: stop strings, and the engine was made without ``decode``; the longest
                sequence does not fit in ``cache_tokens``.
            EngineError: the model's logits are not finite.
        """
        if sampling.stop_strings and self.decode is None:
            raise ValueError(
                f"stop_strings={sampling.stop_strings}: the engine needs the tokenizer's decode"
            )
        rank, size = self.layout.context_parallel_rank, self.layout.context_parallel_size
        try:
            mine = self._generate(requests[rank::size], sampling)
        finally:
            self._aborted.clear()
        found = merge_shares(gather_shares(self.layout, mine), len(requests))
        check_finite(found)
        found.versions = [[self._version] * len(tokens) for tokens in found.tokens]
        return found

    def update_weights(self, version: int) -> None:
        """Nothing is copied: the engine reads the trained weights at the next call."""
        self._version = version

    def abort(self) -> None:
        """See ``RolloutEngine.abort``; on one rank it counts for all that share the model with it.

        Context-parallel ranks go through their shares on their own: each ends where it is called.
        """
        self._aborted.set()

    def close(self) -> None:
        """Nothing is held between calls but references to the model."""

    @torch.no_grad()
    def _generate(self, requests: Sequence[Request], sampling: SamplingSettings) -> Generation:
        prompt, count = self.company.largest(
            [max((len(request.prompt) for request in requests), default=1), len(requests)]
        )
        if count == 0:
            return Generation()
        self.draft_length.begin()
        # the weights may have moved in memory since the last call
        trunk = Trunk(
            self._chunks(),
            self.company,
            keeps_experts=sampling.keep_routes,
            rounding=self.rounding,
        )
        drafter = None
        kept = min(sampling.top_k, trunk.vocabulary) if sampling.keep_masks else 0
        slots = self._new_slots(len(requests), prompt, sampling, kept)
        if (self.speculation.length > 0 or sampling.keep_states) and trunk.is_last:
            drafter = Drafter(trunk)
        if self._attention is None:
            self._attention = choose_attention(
                trunk.attended,
                dtype=trunk.dtype,
                device=self.layout.device,
                paged=self.cache_tokens is not None,
            )
        coupled = self.speculation.coupled
        passes = Passes(
            trunk,
            self._attention,
            drafter,
            slots,
            self._new_room(slots),
            sampling,
            coupled=coupled,
            capture=self.capture() if self.capture else None,
        )
        decoding = Decoding(requests, sampling, slots, passes, self.layout, self.draft_length)
        return decoding.run(self._aborted)

    def _new_slots(
        self, count: int, prompt: int, sampling: SamplingSettings, mask_width: int
    ) -> Slots:
        """For ``count`` requests with prompts of ``prompt`` tokens at most."""
        strings = tuple(sampling.stop_strings)
        return Slots(
            max(1, min(self.slots, count)),
            # behind the last token lie drafts that come to nothing
            prompt + sampling.max_response_length + self.speculation.length + BEHIND_DRAFTS,
            stop_ids=sampling.stop_ids,
            stop_text=StopText(self.decode, strings) if strings else None,
            mask_width=mask_width,
            device=self.layout.device,
        )

    def _new_room(self, slots: Slots) -> Room:
        if self.cache_tokens is None:
            return Room(slots.rows, slots.length, slots.device)
        if self.cache_tokens < slots.length:
            raise ValueError(
                f"cache_tokens={self.cache_tokens}: the longest sequence with what is drafted "
                f"behind it takes {slots.length}. Give at least as many, or None"
            )
        return PagedRoom(
            slots.rows,
            slots.length,
            slots.device,
            tokens=self.cache_tokens,
            ahead=self.speculation.length + 1,
        )


def gather_shares(layout: Layout, mine: Generation) -> list[Generation]:
    """Those of all context-parallel ranks, in rank order.

    States, masks and routes may be tens of gigabytes. They go one by one: with the rest, as Python
    objects, there would be several copies of all of them on the way.
    """
    large = {name: getattr(mine, name) for name in ("states", "masks", "routes")}
    mine.states, mine.masks, mine.routes = [], [], []
    shapes = {name: [(v.shape, v.dtype) for v in values] for name, values in large.items()}
    shares = []
    for rank, (share, theirs) in enumerate(layout.gather_context_parallel((mine, shapes))):
        is_own = rank == layout.context_parallel_rank
        for name, values in large.items():
            empty = [torch.empty(size, dtype=dtype) for size, dtype in theirs[name]]
            setattr(share, name, values if is_own else empty)
            for each in getattr(share, name):
                # as bytes: not every kind of number can be sent
                layout.broadcast_context_parallel(each.view(torch.uint8), rank)
        shares.append(share)
    return shares
