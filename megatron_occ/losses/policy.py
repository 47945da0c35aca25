"""The clipped policy-gradient loss, its global normalisation and rollout-mismatch weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_occ.losses._inputs import (
    as_bool_mask,
    neutralised,
    require_same_shape,
)

AGGREGATIONS = ("token", "sequence", "gspo")

# exp(20) is 5e8: far outside of any clip range, and small enough not to overflow when multiplied
# by advantages and summed in float32.
MAX_LOG_RATIO = 20.0


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
    aggregation: str = "token",
    importance_weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate loss `max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))`.

    PPO (arXiv 1707.06347, eq. 7) with DAPO's two clip ranges (2503.14476, eq. 8). What r is and how
    the terms are added up is the `aggregation`:

    - "token": `r = exp(l - o)` per token; sum over all tokens / normalizer (DAPO).
    - "sequence": the same ratio; mean over each sequence's tokens, sum over sequences / normalizer
      (GRPO, 2402.03300, eq. 3).
    - "gspo": one ratio per sequence, `exp(mean over its tokens of (l - o))`, and one surrogate per
      sequence, sum over sequences / normalizer (GSPO, 2507.18071, eq. 5 and 7).

    Args:
        logprobs: [b, s] l, log-probs under the current weights; the gradient flows into these.
        old_logprobs: [b, s] o, log-probs under the weights at the start of the RL step.
        advantages: [b] or [b, s]. "gspo" takes the mean over the response tokens of [b, s].
        mask: [b, s] response mask. Other positions may hold anything, also NaN or infinity.
        clip_low: width of the clip range below 1, in [0, 1].
        clip_high: width of the clip range above 1, at least 0.
        dual_clip: c > 1 bounds the loss by `-c A` where A < 0 (Dual-clip PPO, 1912.09729, eq. 5).
        importance_weights: [b, s] constants, for instance `truncated_importance_weights`, that
            multiply the loss of each token. "gspo" multiplies a sequence's loss by their mean over
            the sequence, which is what weighting each token's equal share of that loss amounts to
            and which, unlike a product or a geometric mean, neither explodes with the length nor
            falls below 1 on average.
        normalizer: count that the sum is divided by, see `response_counts`: response tokens for
            "token", sequences for the others. None takes this batch's own count. Under
            micro-batches or data parallelism pass the global count of the mini-batch; then the
            losses of its parts add up to the loss of the whole.

    Returns:
        `(loss, metrics)`. `loss` is 0-dim and 0, with zero gradients, if nothing is unmasked.
        `metrics` are detached 0-dim *sums*, to be added over micro-batches and ranks: over response
        tokens for "token" and "sequence" (divide by the global token count for means per token),
        over sequences for "gspo" (divide by the global sequence count).
        `clip_fraction_low` (A < 0 and r < 1 - clip_low), `clip_fraction_high` (A > 0 and
        r > 1 + clip_high), `dual_clip_fraction` (A < 0 and r > dual_clip), `ratio_sum`, and
        `approx_kl`, the k3 estimate of KL(old || new) from per-token ratios ("gspo" adds up each
        sequence's mean over its tokens).

    Raises:
        ValueError: a setting out of range, an unknown aggregation or shapes that do not match.
    """
    _check_settings(clip_low, clip_high, dual_clip, aggregation)
    keep = as_bool_mask(mask)
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, mask=mask)
    log_ratio = _log_ratio(logprobs, old_logprobs.detach(), keep)
    advantage = neutralised(_per_token(advantages, logprobs), keep)
    importance = _importance(importance_weights, log_ratio, keep)
    approx_kl = _k3(log_ratio.detach()) * keep

    if aggregation == "gspo":
        log_ratio, advantage, importance, approx_kl = (
            _row_mean(values, keep) for values in (log_ratio, advantage, importance, approx_kl)
        )
    units = keep.any(dim=1) if aggregation == "gspo" else keep
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    losses = _surrogate(ratio, advantage, clip_low, clip_high, dual_clip) * importance
    total = (_row_mean(losses, keep) if aggregation == "sequence" else losses * units).sum()
    metrics = _clip_metrics(ratio.detach(), advantage, units, clip_low, clip_high, dual_clip)
    metrics["approx_kl"] = approx_kl.sum()
    return total / _denominator(normalizer, mask, aggregation, total), metrics


def response_counts(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Number of response tokens and of sequences with at least one of them.

    Added over micro-batches and data-parallel ranks these are the `normalizer` of
    `clipped_policy_loss`: the first for "token", the second for "sequence" and "gspo".

    Args:
        mask: [b, s] response mask.

    Returns:
        `(tokens, sequences)`, int64, 0-dim.
    """
    keep = as_bool_mask(mask)
    return keep.sum(), keep.any(dim=1).sum()


def truncated_importance_weights(
    train_old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, cap: float
) -> Tensor:
    """Weights for the mismatch between training engine and rollout engine, same weights in both.

    `min(exp(train - rollout), cap)`: truncated importance sampling (Ionides 2008; Yao et al. 2025,
    "Your efficient RL framework secretly brings you off-policy RL training").

    Args:
        train_old_logprobs: [b, s] log-probs of the training engine at the start of the RL step.
        rollout_logprobs: [b, s] log-probs of the rollout engine, those it sampled with.
        mask: [b, s] response mask.
        cap: largest weight, positive; 2 is usual.

    Returns:
        [b, s], detached, at least float32, 1 where masked.

    Raises:
        ValueError: `cap` is not positive, or shapes differ.
    """
    if not cap > 0:
        raise ValueError(f"importance weight cap is {cap}: use a positive number, for instance 2")
    require_same_shape(
        train_old_logprobs=train_old_logprobs, rollout_logprobs=rollout_logprobs, mask=mask
    )
    log_ratio = _log_ratio(
        train_old_logprobs.detach(), rollout_logprobs.detach(), as_bool_mask(mask)
    )
    weights = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().clamp(max=cap)
    return torch.where(as_bool_mask(mask), weights, 1.0)


def _check_settings(
    clip_low: float, clip_high: float, dual_clip: float | None, aggregation: str
) -> None:
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation is {aggregation!r}: use one of {', '.join(AGGREGATIONS)}")
    if not 0 <= clip_low <= 1:
        raise ValueError(f"clip_low is {clip_low}: use a number in [0, 1], for instance 0.2")
    if not clip_high >= 0:
        raise ValueError(f"clip_high is {clip_high}: use a number of at least 0, for instance 0.28")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip is {dual_clip}: use a number above 1 (10 is usual) or None")


def _log_ratio(new: Tensor, old: Tensor, keep: Tensor) -> Tensor:
    return neutralised(new, keep) - neutralised(old, keep)


def _per_token(advantages: Tensor, logprobs: Tensor) -> Tensor:
    """Advantages [b] or [b, s] as constants [b, s]."""
    if logprobs.dim() != 2:
        raise ValueError(f"logprobs have shape {list(logprobs.shape)}: give [b, s]")
    if advantages.shape not in (logprobs.shape, logprobs.shape[:1]):
        raise ValueError(
            f"advantages have shape {list(advantages.shape)}: with logprobs "
            f"{list(logprobs.shape)} give one number per row or per token"
        )
    advantages = advantages.detach()
    return advantages.unsqueeze(1).expand_as(logprobs) if advantages.dim() == 1 else advantages


def _importance(weights: Tensor | None, log_ratio: Tensor, keep: Tensor) -> Tensor:
    if weights is None:
        return torch.ones_like(log_ratio)
    require_same_shape(logprobs=log_ratio, importance_weights=weights)
    return neutralised(weights.detach(), keep)


def _row_mean(values: Tensor, keep: Tensor) -> Tensor:
    """Mean of [b, s] over each row's response tokens, [b]; 0 for a row without any."""
    return (values * keep).sum(dim=1) / keep.sum(dim=1).clamp(min=1)


def _surrogate(
    ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float, dual_clip: float | None
) -> Tensor:
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(-advantage * ratio, -advantage * clipped)
    if dual_clip is None:
        return loss
    return torch.where(advantage < 0, torch.minimum(loss, -dual_clip * advantage), loss)


def _clip_metrics(
    ratio: Tensor,
    advantage: Tensor,
    units: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> dict[str, Tensor]:
    bound = math.inf if dual_clip is None else dual_clip
    return {
        "clip_fraction_low": (units & (advantage < 0) & (ratio < 1 - clip_low)).sum().to(ratio),
        "clip_fraction_high": (units & (advantage > 0) & (ratio > 1 + clip_high)).sum().to(ratio),
        "dual_clip_fraction": (units & (advantage < 0) & (ratio > bound)).sum().to(ratio),
        "ratio_sum": (units * ratio).sum(),
    }


def _k3(log_ratio: Tensor) -> Tensor:
    clamped = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(clamped) - clamped


def _denominator(
    normalizer: float | Tensor | None, mask: Tensor, aggregation: str, total: Tensor
) -> Tensor:
    tokens, sequences = response_counts(mask)
    own = tokens if aggregation == "token" else sequences
    count = _as_count(own if normalizer is None else normalizer, total)
    # A mini-batch without any response token has the count 0 and the loss 0, not 0 / 0. A count
    # of 0 for a batch that does have tokens is wrong and keeps its infinite result.
    return torch.where((count == 0) & (own == 0), 1.0, count)


def _as_count(normalizer: float | Tensor, like: Tensor) -> Tensor:
    if isinstance(normalizer, Tensor):
        if normalizer.dim() != 0:
            raise ValueError(f"normalizer has shape {list(normalizer.shape)}: give a 0-dim tensor")
        return normalizer.detach().to(like)
    if not (math.isfinite(normalizer) and normalizer >= 0):
        raise ValueError(f"normalizer is {normalizer}: give the global count of unmasked items")
    return like.new_full((), normalizer)
