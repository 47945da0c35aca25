"""Policy loss of an MTP depth with weights that are bounded: truncated ratio, or no ratio."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_occ.losses._inputs import as_bool_mask, bounded, neutralised, require_same_shape
from megatron_occ.losses.policy import AGGREGATIONS

WEIGHTINGS = ("ppo", "truncated", "unit")


def weighted_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    ratio_cap: float | None,
    aggregation: str = "token",
    importance_weights: Tensor | None = None,
    normalizer: float | Tensor,
) -> Tensor:
    """Log-likelihood weighted by the advantage and a constant, `- A w m`.

    With a cap `w = min(exp(m - o), cap)`, truncated importance sampling with the gradient through m
    alone (the form of CISPO, arXiv 2506.13585, eq. 4, with the MTP head in the policy's place); the
    clipped loss of an MTP depth instead has a ratio that nothing bounds for a negative advantage. A
    token that the main head gave little and the MTP head much then is the whole gradient. Without a
    cap w is 1.

    "sequence" and "gspo" average over each sequence's tokens first, then over sequences.

    Args:
        logprobs: [b, s] m; the gradient flows into these.
        old_logprobs: [b, s] o, of the main head under the old policy.
        advantages: [b].
        mask: [b, s] response mask. Other positions may hold anything.
        ratio_cap: largest weight, positive; None: all weights are 1.
        aggregation: as in `policy_loss`.
        importance_weights: [b, s] constants that multiply each token's loss.
        normalizer: global count, see `policy_loss`.

    Raises:
        ValueError: a cap that is not positive, an unknown aggregation, shapes that do not match.
    """
    if ratio_cap is not None and not ratio_cap > 0:
        raise ValueError(f"ratio_cap is {ratio_cap}: use a positive number (1 is usual) or None")
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation is {aggregation!r}: use one of {', '.join(AGGREGATIONS)}")
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, mask=mask)
    keep = as_bool_mask(mask)
    weights = token_weights(logprobs, old_logprobs, keep, ratio_cap)
    if importance_weights is not None:
        weights = weights * neutralised(importance_weights.detach(), keep)
    losses = -advantages.detach().unsqueeze(1) * weights * neutralised(logprobs, keep)
    if aggregation in ("token", "sum", "constant"):
        return losses.sum() / normalizer
    return (losses.sum(dim=1) / keep.sum(dim=1).clamp(min=1)).sum() / normalizer


def token_weights(
    logprobs: Tensor, old_logprobs: Tensor, keep: Tensor, ratio_cap: float | None
) -> Tensor:
    """Constants w [b, s]: `min(exp(m - o), ratio_cap)`, without a cap 1; 0 where masked.

    Args:
        logprobs: [b, s] m.
        old_logprobs: [b, s] o.
        keep: [b, s] bool.
        ratio_cap: see `weighted_policy_loss`.
    """
    if ratio_cap is None:
        return keep.to(neutralised(logprobs, keep))
    log_ratio = neutralised(logprobs.detach(), keep) - neutralised(old_logprobs.detach(), keep)
    ratio = bounded(log_ratio).exp().clamp(max=ratio_cap)
    return torch.where(keep, ratio, 0.0)
