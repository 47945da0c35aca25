"""From log-probs to tokens: cuts, and two ways to draw."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_occ.rollout.engine import SamplingSettings
from megatron_occ.rollout.noise import uniforms


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


def sample_by_race(log_probs: Tensor, keys: Tensor) -> Tensor:
    """Sampling by an exponential race: id i arrives after a time Exp(p_i), and the first one wins.

    This is the Gumbel-max trick (Maddison, Tarlow and Minka 2014, 1411.0030) without logarithms of
    the times. Two distributions whose races have the same random numbers draw the same token with a
    probability of at least (1 - TV) / (1 + TV), whatever the vocabulary (Daliri et al. 2024,
    2408.07978), and rounding changes a draw only where two ids arrive together.

    Args:
        log_probs: [n, v] normalised; -inf never arrives.
        keys: [n] of the tokens, see ``noise.token_keys``.

    Returns:
        [n] ids; id i is drawn with probability exp(log_probs[i]).
    """
    times = uniforms(keys, log_probs.size(-1)).neg_().log1p_().neg_()
    return times.div_(log_probs.double().exp()).argmin(-1)


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
