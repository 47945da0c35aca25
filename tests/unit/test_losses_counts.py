"""Counts for the normalizer."""

from __future__ import annotations

import torch

from megatron_occ.losses import response_counts


def test_response_counts() -> None:
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 0, 1]])
    for kind in (torch.bool, torch.int64, torch.float32):
        tokens, sequences = response_counts(mask.to(kind))
        assert (tokens.item(), sequences.item()) == (3, 2)
