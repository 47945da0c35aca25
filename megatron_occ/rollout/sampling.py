"""Sampling whose randomness belongs to the sequence, not to the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_occ.rollout.engine import SamplingSettings


def uniforms(seeds: list[int], length: int) -> Tensor:
    """Uniform numbers in [0, 1), one row of ``length`` for each seed, [n, length] fp64 on the CPU.

    Double precision, so that rare tokens of a large vocabulary stay reachable. torch's generator
    looks at the low 32 bits of a seed alone.
    """
    rows = torch.empty(len(seeds), length, dtype=torch.float64)
    generator = torch.Generator()
    for row, seed in zip(rows, seeds, strict=True):
        row.uniform_(generator=generator.manual_seed(seed))
    return rows


def token_log_probs(logits: Tensor, temperature: float) -> Tensor:
    """Log-probs of all tokens under softmax(logits / temperature), temperature 0 as 1.

    Args:
        logits: [..., v] fp32.
    """
    return (logits / temperature if temperature not in (0, 1) else logits).log_softmax(-1)


def cut_log_probs(log_probs: Tensor, settings: SamplingSettings) -> Tensor:
    """The distribution that tokens are drawn from: cut by top-k, then by top-p, and normalised.

    A token stays under top-p if the tokens likelier than it hold less than ``top_p`` of the mass
    that top-k left (Holtzman et al. 2020, 1904.09751); the likeliest one always stays.

    Args:
        log_probs: [..., v] normalised; returned as they are where nothing is cut.
    """
    vocabulary = log_probs.size(-1)
    cuts_k = settings.top_k is not None and settings.top_k < vocabulary
    if not cuts_k and settings.top_p >= 1:
        return log_probs
    kept = settings.top_k if cuts_k else vocabulary
    likeliest, ids = log_probs.topk(kept, dim=-1)
    probabilities = likeliest.double().softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    before[..., 0] = 0.0
    likeliest = likeliest.masked_fill(before >= settings.top_p, -torch.inf).log_softmax(-1)
    return torch.full_like(log_probs, -torch.inf).scatter_(-1, ids, likeliest)


def sample_from_uniform(log_probs: Tensor, uniform: Tensor) -> Tensor:
    """Inverse-CDF sampling.

    Args:
        log_probs: [n, v] normalised log-probs.
        uniform: [n] in [0, 1).

    Returns:
        [n] ids; id i is drawn with probability exp(log_probs[i]).
    """
    return sample_from_weights(log_probs.double().exp(), uniform)


def sample_from_weights(weights: Tensor, uniform: Tensor) -> Tensor:
    """As :func:`sample_from_uniform`; id i is drawn in proportion to ``weights[i]`` >= 0, fp64."""
    cumulative = weights.cumsum(-1)
    # rounding may leave the last value below 1: scale, so that it is reachable and never passed
    threshold = uniform.to(cumulative) * cumulative[:, -1]
    ids = torch.searchsorted(cumulative, threshold.unsqueeze(1), right=True).squeeze(1)
    return ids.clamp_(max=weights.size(1) - 1)
