"""Rows of a mini-batch, laid out as the model takes them: padded or packed, shared by ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_occ.config.schema import Config
from megatron_occ.config.sizes import sequence_multiple
from megatron_occ.mcore.balance import BalanceTerm
from megatron_occ.mcore.capabilities import token_dispatcher
from megatron_occ.mcore.head_request import HeadRequest
from megatron_occ.mcore.layout import Layout, expert_sharing_group
from megatron_occ.mcore.placement import (
    ContextRanks,
    Placement,
    packed_length,
    place_packed,
    place_padded,
)
from megatron_occ.mcore.training import MicroBatch


@dataclass(frozen=True)
class Sequences:
    """Rows of one micro-batch, to be laid out when the whole mini-batch is known.

    Args:
        ids: [b, s] token ids.
        lengths: tokens of each row: packed; None: padded.
        request: without placement.
        payload: for the loss function.
        ends: [b] tokens of each row, what follows is padding; None where nothing asks for them.
    """

    ids: Tensor
    lengths: Sequence[int] | None
    request: HeadRequest
    payload: Any
    ends: Tensor | None = None


class MiniBatchPlacer:
    """Lays out mini-batches on this rank.

    Args:
        config: the run's configuration.
        layout: this rank's place.
    """

    def __init__(self, config: Config, layout: Layout) -> None:
        self._layout, self._multiple = layout, sequence_multiple(config)
        self._context = ContextRanks()
        if layout.context_parallel_size > 1:
            self._context = ContextRanks(
                layout.context_parallel_rank,
                layout.context_parallel_size,
                parallel_state.get_context_parallel_group(),
            )
        # this dispatcher of Megatron's gathers all tokens of these ranks, equally many of each
        gathers = token_dispatcher(config) == "allgather"
        self._gathers_tokens = gathers and expert_sharing_group() is not None

    def place(self, batches: Sequence[Sequences]) -> list[MicroBatch]:
        """Lay out a mini-batch.

        Packed micro-batches get one length where ranks exchange tensors of one shape: the stages of
        a pipeline, and the ranks that share experts where their tokens are gathered.
        """
        total, layout = None, self._layout
        if batches[0].lengths is not None and (layout.pipeline_size > 1 or self._gathers_tokens):
            lengths = [batch.lengths for batch in batches]
            total = max(packed_length(part, self._multiple) for part in lengths if part)
            if self._gathers_tokens:
                (total,) = layout.largest_among_expert_ranks([total])
        placed = []
        for batch in batches:
            placement = self._place(batch, total)
            ids = placement.as_input(placement.take(batch.ids))
            request = replace(batch.request, placement=placement)
            placed.append(MicroBatch(ids, request, batch.payload))
        return placed

    def _place(self, batch: Sequences, total: int | None) -> Placement:
        size = (batch.ids.size(0), batch.ids.size(1))
        device = batch.ids.device
        common = dict(multiple=self._multiple, ranks=self._context)
        if batch.lengths is None:
            return place_padded(size, device, **common)
        return place_packed(size, batch.lengths, device, total=total, **common)


def with_balance(
    batches: Sequence[Sequences], coefficient: float, depths: int, layout: Layout
) -> list[Sequences]:
    """The micro-batches of an update, with the balance loss of their routers.

    Args:
        batches: of this rank, with ``ends``.
        coefficient: of the loss.
        depths: MTP depths K.
        layout: this rank's place.
    """
    counts = torch.stack([_balanced_tokens(batch, depths) for batch in batches]).sum(0)
    tokens = layout.all_reduce_data_parallel(counts)
    weights = (coefficient / tokens.clamp(min=1)).float()
    return [
        replace(batch, request=replace(batch.request, balance=BalanceTerm(batch.ends, weights)))
        for batch in batches
    ]


def _balanced_tokens(batch: Sequences, depths: int) -> Tensor:
    """[1+K] tokens in whose loss the trunk's routers, and those of each depth, have a part.

    A token that passes an MTP layer twice counts twice.
    """
    assert batch.ends is not None, "padding has no part in the load of experts"
    request = batch.request
    head = sum(to_head for _, to_head in request.passes)
    passes = [int(request.states is None)] + [head] * depths
    counts = [times * (batch.ends - depth).clamp(min=0).sum() for depth, times in enumerate(passes)]
    return torch.stack(counts).double()
