"""Rollouts as padded tensors, and the constants of the joint loss cut from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_occ.losses import align_mtp_targets, shift_to_source
from megatron_occ.losses.heads import JointTargets


@dataclass(frozen=True)
class RolloutBatch:
    """n sequences, prompt then response, right-padded to s tokens.

    Args:
        ids: [n, s] token ids.
        response_mask: [n, s] 1.0 on response tokens, aligned with the tokens.
        rollout_logprobs: [n, s] log-prob of each response token when it was sampled, 0 elsewhere.
        advantages: [n].
        old_logprobs: [n, s] of the policy at the start of the step, source frame: position t is
            about token t + 1; filled in by the trainer.
        ref_logprobs: [n, s] of the reference policy, source frame, or None.
        importance_weights: [n, s] of the tokens, source frame, or None, see ``rl.correction``.
        sampling_masks: [n, s, m] int32 on the host, token-aligned: 1 + the ids that a token was
            drawn from, then 0; 0 alone: from all. None: every token was.
        routes: [n, s, routers, k] on the host: 1 + the experts that a token goes to in each layer
            with experts on this rank, 0 where the router chooses; a byte or two each. None: routers
            choose.
    """

    ids: Tensor
    response_mask: Tensor
    rollout_logprobs: Tensor
    advantages: Tensor
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    importance_weights: Tensor | None = None
    sampling_masks: Tensor | None = None
    routes: Tensor | None = None

    def __len__(self) -> int:
        return self.ids.size(0)

    def rows(self, start: int, stop: int) -> RolloutBatch:
        """Sequences ``start .. stop - 1``."""
        return self.map(lambda values: values[start:stop])

    def trimmed(self, length: int) -> RolloutBatch:
        """The first ``length`` tokens of every sequence."""
        return self.map(lambda values: values[:, :length] if values.dim() > 1 else values)

    def map(self, change: Callable[[Tensor], Tensor]) -> RolloutBatch:
        """``change`` applied to every tensor that is there."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: change(v) for k, v in parts.items() if v is not None})

    def lengths(self) -> Tensor:
        """[n] tokens up to the last response token; what follows is padding."""
        return sequence_ends(self.response_mask).clamp(min=1)

    def with_logprobs(self, old: Tensor, reference: Tensor | None) -> RolloutBatch:
        """The same batch with the log-probs of the old and of the reference policy."""
        return replace(self, old_logprobs=old, ref_logprobs=reference)


@dataclass(frozen=True)
class MiniBatch:
    """One data-parallel rank's sequences of an update, cut into micro-batches.

    Args:
        rows: in the order of the micro-batches.
        sizes: sequences of each micro-batch.
        lengths: tokens of each sequence where micro-batches are packed; None: they are padded.
        parts: micro-batches of each part, where the mini-batch is cut into parts of whole prompts.
    """

    rows: RolloutBatch
    sizes: list[int]
    lengths: list[int] | None = None
    parts: tuple[int, ...] = ()

    @classmethod
    def padded(cls, rows: RolloutBatch, size: int) -> MiniBatch:
        """In padded micro-batches of ``size`` sequences (the last may be smaller)."""
        starts = range(0, len(rows), size)
        return cls(rows, [min(size, len(rows) - start) for start in starts])

    @classmethod
    def joined(cls, parts: Sequence[MiniBatch], rows: RolloutBatch) -> MiniBatch:
        """One mini-batch of several parts, whose rows lie one after the other in ``rows``."""
        packed = parts[0].lengths is not None
        return cls(
            rows,
            [size for part in parts for size in part.sizes],
            [n for part in parts for n in part.lengths or ()] if packed else None,
            tuple(len(part.sizes) for part in parts),
        )

    def micro_batches(self) -> list[tuple[RolloutBatch, list[int] | None]]:
        """Sequences and lengths of each; packed ones as wide as their longest sequence."""
        parts = []
        for part in consecutive(self.sizes):
            rows = self.rows.rows(part.start, part.stop)
            if self.lengths is None:
                parts.append((rows, None))
            else:
                lengths = self.lengths[part.start : part.stop]
                parts.append((rows.trimmed(max(lengths)), lengths))
        return parts

    def with_logprobs(self, old: Tensor, reference: Tensor | None) -> MiniBatch:
        """The same mini-batch with the log-probs of the old and of the reference policy."""
        return replace(self, rows=self.rows.with_logprobs(old, reference))

    def with_routes(self, routes: Tensor) -> MiniBatch:
        """The same mini-batch, whose tokens go to these experts, see :class:`RolloutBatch`."""
        return replace(self, rows=replace(self.rows, routes=routes))


def sequence_ends(mask: Tensor) -> Tensor:
    """[n] tokens of rows [n, s] up to the last one that counts; 0 where none does."""
    ends = torch.arange(1, mask.size(1) + 1, device=mask.device)
    return torch.where(mask > 0, ends, 0).amax(1)


def consecutive(sizes: Iterable[int]) -> list[range]:
    """Ranges of the given sizes, one after the other from 0."""
    ends = list(accumulate(sizes, initial=0))
    return [range(start, stop) for start, stop in pairwise(ends)]


def pad_sequences(
    prompts: list[list[int]],
    responses: list[list[int]],
    logprobs: list[list[float]],
    advantages: Tensor,
    pad_id: int,
    width: int,
    device: torch.device,
) -> RolloutBatch:
    """Build a batch from token lists; see :class:`RolloutBatch` for shapes.

    Args:
        prompts: token ids of n prompts.
        responses: token ids of their responses.
        logprobs: of each response token.
        advantages: [n].
        pad_id: fills the rest of a row.
        width: s, at least the tokens of the longest row.
        device: of the result.
    """
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    shape = (len(prompts), width)
    ids = torch.full(shape, pad_id, dtype=torch.long)
    mask, sampled = torch.zeros(shape), torch.zeros(shape)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        span = slice(len(prompt), lengths[row])
        ids[row, : lengths[row]] = torch.tensor(prompt + response)
        mask[row, span] = 1.0
        sampled[row, span] = torch.tensor(logprobs[row])
    return RolloutBatch(ids.to(device), mask.to(device), sampled.to(device), advantages.to(device))


def pad_masks(prompts: list[list[int]], masks: list[Tensor], shape: tuple[int, int]) -> Tensor:
    """Sampling masks [t, m] of the response tokens of n rows, see :class:`RolloutBatch`.

    Args:
        prompts: token ids of the rows' prompts.
        masks: of their responses.
        shape: s, at least the tokens of the longest row, and the largest m.
    """
    padded = torch.zeros(len(prompts), *shape, dtype=torch.int32)
    for row, (prompt, mask) in enumerate(zip(prompts, masks, strict=True)):
        # a response that was cut off before it began has none
        if mask.numel():
            padded[row, len(prompt) : len(prompt) + mask.size(0), : mask.size(1)] = mask
    return padded


def route_dtype(experts: int) -> torch.dtype:
    """A byte for each choice where 1 + the expert fits, or two."""
    return torch.uint8 if experts < 2**8 else torch.int16


def pad_routes(routes: list[Tensor], width: int, like: Tensor) -> Tensor:
    """Routes [t, routers, k] of n rows as one tensor, see :class:`RolloutBatch`.

    Args:
        routes: of the rows; of one that was cut off before it began, nothing.
        width: s, more than the tokens of any.
        like: routes of any row: there may be no rows.
    """
    padded = like.new_zeros(len(routes), width, *like.shape[1:])
    for row, each in enumerate(routes):
        if each.numel():
            padded[row, : each.size(0)] = each
    return padded


def masks_at_source(batch: RolloutBatch) -> Tensor | None:
    """The sampling masks [n, s, m] in the source frame: position t is about token t + 1."""
    masks = batch.sampling_masks
    return None if masks is None else F.pad(masks[:, 1:], (0, 0, 0, 1))


def head_targets(ids: Tensor, depths: int) -> Tensor:
    """Target ids of the main head and of ``depths`` MTP depths, source frame, [1+K, b, s]."""
    return torch.stack([align_mtp_targets(ids, depth)[0] for depth in range(depths + 1)])


def head_masks(token_mask: Tensor, depths: int) -> Tensor:
    """Token-aligned mask [b, s] in the source frame of every head, [1+K, b, s]."""
    return torch.stack([shift_to_source(token_mask, depth) for depth in range(depths + 1)])


def joint_targets(batch: RolloutBatch, depths: int) -> JointTargets:
    """Constants of the joint loss for one micro-batch.

    Args:
        batch: with ``old_logprobs``.
        depths: MTP depths K.
    """
    old = batch.old_logprobs
    assert old is not None, "old log-probs are computed before training"
    # `old` is already in the main head's frame: depth k is k tokens further
    frames = [old] + [shift_to_source(old, depth - 1) for depth in range(1, depths + 1)]
    return JointTargets(
        mask=head_masks(batch.response_mask, depths),
        old_logprobs=torch.stack(frames),
        advantages=batch.advantages,
        ref_logprobs=batch.ref_logprobs,
        importance_weights=batch.importance_weights,
    )
