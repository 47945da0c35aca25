"""How evenly a sequence's scores ask for experts: DeepSeek-V3's balance loss (arXiv 2412.19437).

For a sequence s of T tokens, N experts and K of them for each token (equations 17 to 20):

    f_i = N / (K T) * tokens of s with expert i among their K highest scores        no gradient
    P_i = mean over the tokens of s of the score of expert i, scores of a token adding up to 1
    L_s = sum_i f_i P_i

Scores are those without a bias of the choice. So f is about what the scores ask for: a bias, groups
of experts or a replayed choice may send a token elsewhere. L_s is 1 where all scores are equal, and
N / K at most. The loss of a router is the mean of L_s over the tokens of an update,
``sum_s T_s / T L_s``. With f a constant it is a sum over tokens, so that each rank computes its own
tokens' part of value and gradient once the counts of a sequence are known.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

SCORE_FUNCTIONS = ("softmax", "sigmoid")


def normalized_scores(logits: Tensor, score_function: str) -> Tensor:
    """Scores of all experts, without a bias of their choice, which add up to 1; [n, N] float32.

    Args:
        logits: [n, N] of the router.
        score_function: ``softmax`` or ``sigmoid``.
    """
    assert score_function in SCORE_FUNCTIONS, score_function
    if score_function == "softmax":
        return logits.float().softmax(dim=-1)
    scores = logits.float().sigmoid()
    return scores / scores.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def highest(logits: Tensor, top_k: int, score_function: str) -> Tensor:
    """True at the K experts of highest score of each token (equation 18), [n, N].

    Args:
        logits: [n, N] of the router.
        top_k: K.
        score_function: see :func:`normalized_scores`.
    """
    scores = normalized_scores(logits.detach(), score_function)
    found = torch.zeros_like(scores, dtype=torch.bool)
    return found.scatter_(1, scores.topk(top_k, dim=1).indices, True)


def sequence_loads(chosen: Tensor, sequences: Tensor, count: int) -> Tensor:
    """Tokens of each sequence that count for each expert, [count, N] float32.

    Args:
        chosen: [n, N] from :func:`highest`.
        sequences: [n] number of each token's sequence; ``count``: of none, it is padding.
        count: sequences.
    """
    loads = chosen.new_zeros(count + 1, chosen.size(1), dtype=torch.float32)
    return loads.index_add_(0, sequences, chosen.float())[:count]


def balance_sum(
    logits: Tensor,
    loads: Tensor,
    sequences: Tensor,
    lengths: Tensor,
    *,
    top_k: int,
    score_function: str,
) -> Tensor:
    """``sum_s T_s L_s``, or the part of it that comes from the tokens given.

    Args:
        logits: [n, N] of the router.
        loads: [b, N] from :func:`sequence_loads`, of all tokens of each sequence.
        sequences: [n] as there.
        lengths: [b] tokens of each sequence, those elsewhere included.
        top_k: K.
        score_function: see :func:`normalized_scores`.
    """
    experts = logits.size(1)
    load = loads.detach() * (experts / (top_k * lengths.clamp(min=1).float())).unsqueeze(1)
    # padding has a row of zeros
    load = functional.pad(load, (0, 0, 0, 1))
    return (normalized_scores(logits, score_function) * load.index_select(0, sequences)).sum()
