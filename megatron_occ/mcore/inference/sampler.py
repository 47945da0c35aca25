"""From hidden states to tokens: logits of some rows at a time, draws, accepted drafts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from megatron_occ.mcore.inference.slots import Verified
from megatron_occ.mcore.inference.trunk import Trunk
from megatron_occ.rollout import (
    SamplingSettings,
    coupled_accept,
    sample_from_uniform,
    speculative_accept,
    uniforms,
)
from megatron_occ.rollout.sampling import Kept, cut, token_log_probs

# of a token's uniform numbers in speculative sampling: what its draft is tested with, what it is
# drawn with after a rejection, and what its draft is drawn with
TEST, DRAW, DRAFT = 0, 1, 2
STREAMS = 3
# logits that exist at the same time; about 32 bytes each
CHUNK_LOGITS = 2**24
# ids that top-p looks at, where no row needs more: a whole vocabulary takes ten times as long
LIKELIEST = 1024


class TokenSampler:
    """Draws on the last stage; its tensor-parallel ranks draw the same from the same logits.

    Args:
        trunk: of this rank, on the last stage.
        sampling: temperature and cuts.
        coupled: keep the drafts that plain sampling would draw; see ``rollout.speculative``.
    """

    def __init__(self, trunk: Trunk, sampling: SamplingSettings, *, coupled: bool) -> None:
        self.trunk, self.sampling = trunk, sampling
        self.greedy = sampling.temperature == 0
        self.coupled = coupled or self.greedy

    def draft(self, hidden: Tensor, keys: Tensor) -> tuple[Tensor, Tensor | None]:
        """Draft a token for each row.

        Args:
            hidden: [n, h] of an MTP depth.
            keys: [n] of the token's random numbers.

        Returns:
            Ids [n], and the log-probs [n, v] that they were drawn from, where they are needed.
        """
        tokens, kept = [], []
        for rows in self._chunks(len(hidden), 1):
            log_probs, cut_to = self._distribution(hidden[rows], LIKELIEST)
            if self.greedy:
                tokens.append(log_probs.argmax(-1))
                continue
            if self.coupled:
                tokens.append(cut_to.race(keys[rows]))
                continue
            numbers = uniforms(keys[rows], STREAMS)
            kept.append(cut_to.dense(self.trunk.vocabulary))
            tokens.append(sample_from_uniform(kept[-1], numbers[:, DRAFT]))
        return torch.cat(tokens), torch.cat(kept) if kept else None

    def verify(
        self, hidden: Tensor, drafts: Tensor, draft_logprobs: list[Tensor], keys: Tensor
    ) -> Verified:
        """Accept drafts, and draw the token behind the accepted ones.

        Where top-p needs more than the ids that it looks at the row says so, see ``Verified``.

        Args:
            hidden: [n, k + 1, h] of the trunk after the last token and after each draft.
            drafts: [n, k].
            draft_logprobs: k of [n, v]; empty with coupled drafts.
            keys: [n, k + 1] of the tokens' random numbers.
        """

        def parts(rows: Tensor | slice, at_most: int | None) -> Verified:
            given = [each[rows] for each in draft_logprobs]
            return self._verify(hidden[rows], drafts[rows], given, keys[rows], at_most)

        def again() -> Verified:
            rows = torch.nonzero(found.accepted < 0).flatten()
            exact = [parts(some, None) for some in rows.split(self._chunk(hidden.size(1)))]
            return found.with_rows(rows, joined(exact))

        if len(hidden) <= self._chunk(hidden.size(1)):
            found = self._verify(hidden, drafts, draft_logprobs, keys, LIKELIEST)
        else:
            found = joined([parts(rows, LIKELIEST) for rows in self._chunks(*hidden.shape[:2])])
        # it holds the drafts' distributions, for as long as a captured cycle lives
        may_look_again = self.sampling.top_p < 1 and not self.greedy
        return replace(found, again=again if may_look_again else None)

    def _verify(
        self,
        hidden: Tensor,
        drafts: Tensor,
        draft_logprobs: list[Tensor],
        keys: Tensor,
        at_most: int | None,
    ) -> Verified:
        rows, each, width = hidden.shape
        log_probs, cut_to = self._distribution(hidden.reshape(rows * each, width), at_most)
        if self.greedy:
            tokens = log_probs.argmax(-1).view(rows, each)
            accepted = coupled_accept(drafts, tokens)
        elif self.coupled or each == 1:
            tokens = cut_to.race(keys.flatten()).view(rows, each)
            accepted = coupled_accept(drafts, tokens)
        else:
            accepted, after = speculative_accept(
                drafts,
                torch.stack(draft_logprobs, dim=1),
                cut_to.dense(self.trunk.vocabulary).view(rows, each, -1),
                uniform=uniforms(keys, STREAMS)[:, :, TEST:DRAFT],
            )
            tokens = torch.cat((drafts, after.unsqueeze(1)), dim=1)
            tokens = tokens.scatter(1, accepted.unsqueeze(1), after.unsqueeze(1))
        if cut_to.complete is not None:
            accepted = accepted.where(cut_to.complete.view(rows, each).all(1), -1)
        if not self.sampling.keep_masks:
            logprobs = log_probs.gather(1, tokens.view(-1, 1)).view(rows, each)
            return Verified(tokens, logprobs, accepted)
        logprobs = cut_to.of(tokens.flatten()).view(rows, each)
        masks = cut_to.mask(self.sampling.top_k).view(rows, each, -1)
        return Verified(tokens, logprobs, accepted, masks)

    def _distribution(self, hidden: Tensor, at_most: int | None) -> tuple[Tensor, Kept]:
        """Log-probs [t, v] under the temperature, and what tokens are drawn from."""
        log_probs = token_log_probs(self.trunk.logits(hidden), self.sampling.temperature)
        kept = Kept(log_probs) if self.greedy else cut(log_probs, self.sampling, at_most=at_most)
        return log_probs, kept

    def _chunk(self, each: int) -> int:
        """Rows of ``each`` tokens that are looked at together."""
        return max(1, CHUNK_LOGITS // (each * self.trunk.vocabulary))

    def _chunks(self, rows: int, each: int) -> Iterator[slice]:
        size = self._chunk(each)
        return (slice(start, start + size) for start in range(0, rows, size))


def joined(parts: list[Verified]) -> Verified:
    """One of the rows of all parts."""
    if len(parts) == 1:
        return parts[0]
    return Verified(*map(_joined, zip(*(part.tensors() for part in parts), strict=True)))


def _joined(tensors: tuple[Tensor | None, ...]) -> Tensor | None:
    return None if tensors[0] is None else torch.cat(tensors)
