"""Sampling whose randomness belongs to the sequence, not to the batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingSettings:
    """How responses are drawn.

    Args:
        temperature: divides the logits.
        max_response_length: tokens of a response at most, stop token included.
        stop_ids: token ids that end a response.
        batch_size: sequences generated at once.
    """

    temperature: float
    max_response_length: int
    stop_ids: tuple[int, ...]
    batch_size: int


def uniforms(seeds: list[int], length: int) -> Tensor:
    """Uniform numbers in [0, 1), one row of ``length`` for each seed, [n, length] fp64 on the CPU.

    Double precision, so that rare tokens of a large vocabulary stay reachable.
    """
    rows = torch.empty(len(seeds), length, dtype=torch.float64)
    generator = torch.Generator()
    for row, seed in zip(rows, seeds, strict=True):
        row.uniform_(generator=generator.manual_seed(seed))
    return rows


def sample_from_uniform(log_probs: Tensor, uniform: Tensor) -> Tensor:
    """Inverse-CDF sampling.

    Args:
        log_probs: [n, v] normalised log-probs.
        uniform: [n] in [0, 1).

    Returns:
        [n] ids; id i is drawn with probability exp(log_probs[i]).
    """
    cumulative = log_probs.double().exp().cumsum(-1)
    # rounding may leave the last value below 1: scale, so that it is reachable and never passed
    threshold = uniform.to(cumulative.device).double() * cumulative[:, -1]
    ids = torch.searchsorted(cumulative, threshold.unsqueeze(1), right=True).squeeze(1)
    return ids.clamp_(max=log_probs.size(1) - 1)
