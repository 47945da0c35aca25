"""Counts for the normalizer and truncated importance weights."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_occ.losses import response_counts, truncated_importance_weights


def test_response_counts() -> None:
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 0, 1]])
    for kind in (torch.bool, torch.int64, torch.float32):
        tokens, sequences = response_counts(mask.to(kind))
        assert (tokens.item(), sequences.item()) == (3, 2)


def test_truncated_importance_weights() -> None:
    train = torch.tensor([[math.log(0.3), math.log(0.8), math.nan, 0.0]], requires_grad=True)
    rollout = torch.tensor([[math.log(0.6), math.log(0.2), 1.0, -math.inf]])
    mask = torch.tensor([[1, 1, 0, 1]])
    weights = truncated_importance_weights(train, rollout, mask, cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([[0.5, 2.0, 1.0, 2.0]]))
    assert not weights.requires_grad
    low = truncated_importance_weights(train, rollout, mask, cap=0.25)
    assert low[0].tolist() == [0.25, 0.25, 1.0, 0.25]
    with pytest.raises(ValueError, match="cap is 0"):
        truncated_importance_weights(train, rollout, mask, cap=0)
