"""Passes through the model over the rows of a call: prompts, drafts, verification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_occ.mcore.inference.cache import write
from megatron_occ.mcore.inference.drafter import Drafter
from megatron_occ.mcore.inference.prefill import Prefix, prefill
from megatron_occ.mcore.inference.slots import Slots, Verified
from megatron_occ.mcore.inference.trunk import Placer, Trunk
from megatron_occ.rollout import (
    SamplingSettings,
    coupled_accept,
    sample_from_uniform,
    speculative_accept,
)
from megatron_occ.rollout.sampling import cut_log_probs, token_log_probs

# of the uniform numbers of a token: what it is drawn with, and for speculative sampling what its
# draft is drawn and tested with
DRAW, DRAFT, TEST = 0, 1, 2


class Passes:
    """The model over rows and their caches.

    Tokens are sampled on the last stage, by each of its tensor-parallel ranks from the same
    logits, and shared with the other stages.

    Args:
        trunk: of this rank.
        drafter: where drafts are made, on the last stage.
        slots: the rows.
        sampling: temperature and cuts.
    """

    def __init__(
        self, trunk: Trunk, drafter: Drafter | None, slots: Slots, sampling: SamplingSettings
    ) -> None:
        self.trunk, self.drafter, self.slots = trunk, drafter, slots
        self.sampling = sampling
        self.greedy = sampling.temperature == 0
        self.coupled = slots.streams == 1
        self.placer = Placer(trunk, slots.length, slots.device)
        self.cache = trunk.new_cache(slots.rows, slots.length)
        self.state = drafter.new_state(slots.rows, slots.length) if drafter else None

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
        self.cache.copy_rows(prefix.cache, sources, rows, prefix.longest)
        if self.state is not None:
            self.state.copy_rows(prefix.state, sources, rows, prefix.longest)
        none = torch.zeros(len(rows), 0, dtype=torch.long, device=self.slots.device)
        logits = prefix.logits[sources].unsqueeze(1) if prefix.logits is not None else None
        numbers = self.slots.numbers(rows, 1)
        return self._share(self._judge(logits, none, [], numbers), len(rows), 1)

    def draft_and_verify(self, rows: int, length: int) -> Verified:
        """One cycle of the first ``rows`` rows.

        Args:
            rows: at least one.
            length: tokens to draft.
        """
        used = slice(0, rows)
        numbers = self.slots.numbers(used, length + 1)
        behind = self.slots.known_on_device(used).unsqueeze(1)
        places = behind + torch.arange(-1, length, device=self.slots.device)
        draft_logprobs = self._draft(places[:, 1:], numbers) if length else []
        ids = self.slots.ids[used].gather(1, places)
        last = self.slots.known[used] - 1 + length
        tokens = self.placer.at(self.cache, places, last)
        self.trunk.company.meet(places.numel())
        hidden = self.trunk.forward(ids, tokens, self.cache)
        logits = None
        if hidden is not None:
            if self.state is not None:
                write(self.state.hidden[0], tokens.places, hidden)
            logits = self.trunk.logits(hidden).view(rows, length + 1, -1)
        return self._share(
            self._judge(logits, ids[:, 1:], draft_logprobs, numbers), rows, length + 1
        )

    def move(self, rows: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Copy rows of up to ``length`` tokens to other places, all at the same time."""
        self.slots.move(rows, targets)
        self.cache.copy_rows(self.cache, rows, targets, length)
        if self.state is not None:
            self.state.copy_rows(self.state, rows, targets, length)

    def _draft(self, places: Tensor, numbers: Tensor) -> list[Tensor]:
        """Put drafts at ``places`` [n, k] of the rows; returns what they were drawn from."""
        distributions: list[Tensor] = []

        def pick(hidden: Tensor, step: int) -> Tensor:
            log_probs = self._distribution(self.trunk.logits(hidden))[1]
            if self.greedy:
                return log_probs.argmax(-1)
            if not self.coupled:
                distributions.append(log_probs)
            return sample_from_uniform(log_probs, numbers[:, step, DRAW if self.coupled else DRAFT])

        rows, length = places.shape
        ids = self.slots.ids
        if self.drafter is not None:
            known = self.slots.known[:rows]
            self.drafter.draft(self.placer, self.state, ids, known, length, pick)
        if self.trunk.pipeline.size() > 1:
            drafts = self.trunk.share(ids[:rows].gather(1, places))
            ids[:rows].scatter_(1, places, drafts)
        return distributions

    def _distribution(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs [..., v] under the temperature, and of what tokens are drawn from."""
        log_probs = token_log_probs(logits, self.sampling.temperature)
        return log_probs, log_probs if self.greedy else cut_log_probs(log_probs, self.sampling)

    def _judge(
        self,
        logits: Tensor | None,
        drafts: Tensor,
        draft_logprobs: list[Tensor],
        numbers: Tensor,
    ) -> Verified | None:
        """Accept drafts and draw; None on a stage without logits.

        Args:
            logits: [n, k + 1, v] after the last token and after each draft.
            drafts: [n, k].
            draft_logprobs: k of [n, v]; empty with coupled drafts.
            numbers: [n, k + 1, streams] uniform numbers.
        """
        if logits is None:
            return None
        log_probs, cut = self._distribution(logits)
        count = drafts.size(1)
        if self.greedy:
            tokens = cut.argmax(-1)
            accepted = coupled_accept(drafts, tokens)
        elif self.coupled or count == 0:
            draws = numbers[:, :, DRAW].flatten()
            tokens = sample_from_uniform(cut.flatten(0, 1), draws).view(-1, count + 1)
            accepted = coupled_accept(drafts, tokens)
        else:
            accepted, after = speculative_accept(
                drafts,
                torch.stack(draft_logprobs, dim=1),
                cut,
                uniform=numbers[:, :, [TEST, DRAW]],
            )
            tokens = torch.cat((drafts, after.unsqueeze(1)), dim=1)
            tokens = tokens.scatter(1, accepted.unsqueeze(1), after.unsqueeze(1))
        logprobs = log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        return Verified(tokens, logprobs, accepted)

    def _share(self, verified: Verified | None, rows: int, each: int) -> Verified:
        """The last stage's findings on all stages."""
        if self.trunk.pipeline.size() == 1:
            assert verified is not None, "the only stage has logits"
            return verified
        # one message; a double holds every token id
        packed = torch.zeros(rows, 2 * each + 1, dtype=torch.float64, device=self.slots.device)
        if verified is not None:
            parts = (verified.tokens, verified.logprobs, verified.accepted.unsqueeze(1))
            packed = torch.cat([part.double() for part in parts], dim=1)
        tokens, logprobs, accepted = self.trunk.share(packed).split([each, each, 1], dim=1)
        return Verified(tokens.long(), logprobs.float(), accepted.squeeze(1).long())
