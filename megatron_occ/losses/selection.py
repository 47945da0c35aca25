"""Which tokens a policy learns from: those where it was least sure."""

from __future__ import annotations

import math

from torch import Tensor


def entropy_threshold(entropies: Tensor, share: float) -> Tensor:
    """The entropy that a share of the tokens reaches, the quantile of arXiv 2506.01939, eq. 5.

    Args:
        entropies: [n] nats of all response tokens of a mini-batch, over all ranks.
        share: in (0, 1]; `ceil(share * n)` tokens or more (where several have the same) reach it.

    Returns:
        Scalar; infinity without a token.

    Raises:
        ValueError: `share` is outside of its range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}: use a number above 0 and at most 1")
    count = entropies.numel()
    if count == 0:
        return entropies.new_full((), math.inf)
    # a product such as 0.2 * 15 is 3.0000000000000004 before it is rounded up
    wanted = min(count, math.ceil(share * count * (1 - 1e-12)))
    return entropies.kthvalue(count - wanted + 1).values


def entropy_weights(entropies: Tensor, threshold: Tensor) -> Tensor:
    """1 for tokens whose entropy reaches the threshold, 0 for others; fp32, any shape.

    To be multiplied with a token's loss: the indicator of arXiv 2506.01939, eq. 6. Its denominator
    counts all tokens, as that of other losses here.
    """
    return (entropies >= threshold).float()
