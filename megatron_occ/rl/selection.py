"""The tokens of a mini-batch that the policy learns from, over all data-parallel ranks."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from megatron_occ.losses import entropy_threshold, entropy_weights, shift_to_source
from megatron_occ.rl.batch import MiniBatch
from megatron_occ.rl.interfaces import Collectives


def with_top_entropy(
    mini_batch: MiniBatch, entropies: Tensor, share: float, layout: Collectives
) -> MiniBatch:
    """The mini-batch with the weight 0 on tokens of low entropy; called by all ranks.

    Args:
        mini_batch: this rank's part.
        entropies: [n, s] nats, source frame, of its rows.
        share: of the response tokens, that keep the weight 1.
        layout: this rank's place.
    """
    is_response = shift_to_source(mini_batch.rows.response_mask, 0) > 0
    threshold = entropy_threshold(_of_all_ranks(entropies[is_response], layout), share)
    weights = entropy_weights(entropies, threshold)
    return replace(mini_batch, rows=replace(mini_batch.rows, importance_weights=weights))


def _of_all_ranks(values: Tensor, layout: Collectives) -> Tensor:
    """[n] of this rank to those of all, which have different numbers of them."""
    largest = layout.all_reduce_data_parallel(
        torch.tensor(float(len(values)), dtype=torch.float64, device=values.device), maximum=True
    )
    padded = values.new_full((int(largest),), -math.inf)
    padded[: len(values)] = values
    gathered = layout.gather_data_parallel(padded)
    return gathered[gathered > -math.inf]
