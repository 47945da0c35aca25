"""Policy-gradient losses: an objective's terms, how they are added up, the global normalisation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_occ.losses._inputs import (
    as_bool_mask,
    bounded,
    neutralised,
    require_same_shape,
)
from megatron_occ.losses.objectives import Clipped, Objective, Terms

AGGREGATIONS = ("token", "sequence", "sum", "constant", "gspo")


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    objective: Objective,
    *,
    aggregation: str = "token",
    importance_weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of an objective's terms over a count.

    What a term is and how terms are added up is the `aggregation`; `r = exp(l - o)`:

    - "token": a term for each token; sum over all tokens / normalizer (DAPO, arXiv 2503.14476,
      eq. 8).
    - "sequence": the same terms; mean over each sequence's tokens, sum over sequences / normalizer
      (GRPO, 2402.03300, eq. 3).
    - "sum": the same terms; sum over all tokens / normalizer, which counts sequences, so that the
      loss of a sequence is that of its log-prob (RLOO, 2402.14740, eq. 5 and section 3.2).
    - "constant": as "sum", and the normalizer counts for each sequence the longest allowed response
      (Dr. GRPO, 2503.20783, section 3.2).
    - "gspo": one ratio per sequence, `exp(mean over its tokens of (l - o))`, and one term per
      sequence, sum over sequences / normalizer (GSPO, 2507.18071, eq. 5 and 7).

    Args:
        logprobs: [b, s] l, log-probs under the current weights; the gradient flows into these.
        old_logprobs: [b, s] o, log-probs under the weights at the start of the RL step.
        advantages: [b] or [b, s]. "gspo" takes the mean over the response tokens of [b, s].
        mask: [b, s] response mask. Other positions may hold anything, also NaN or infinity.
        objective: see `objectives`.
        importance_weights: [b, s] constants, for instance those of `correction.correct`, that
            multiply the loss of each token. "gspo" multiplies a sequence's loss by their mean over
            the sequence, which is what weighting each token's equal share of that loss amounts to
            and which, unlike a product or a geometric mean, neither explodes with the length nor
            falls below 1 on average.
        normalizer: count that the sum is divided by, see `response_counts`: response tokens for
            "token", sequences for the others, times a length for "constant". None takes this
            batch's own count ("constant" has none). Under micro-batches or data parallelism pass
            the global count of the mini-batch; then the losses of its parts add up to the loss of
            the whole.

    Returns:
        `(loss, metrics)`. `loss` is 0-dim and 0, with zero gradients, if nothing is unmasked.
        `metrics` are detached 0-dim *sums*, to be added over micro-batches and ranks: over
        sequences for "gspo" (divide by the global sequence count), else over response tokens
        (divide by the global token count for means per token).
        `clip_fraction_low`, `clip_fraction_high` and `dual_clip_fraction`: terms that the objective
        cuts; `ratio_sum`; and `approx_kl`, the k3 estimate of KL(old || new) from per-token ratios
        ("gspo" adds up each sequence's mean over its tokens).

    Raises:
        ValueError: an unknown aggregation, "constant" without normalizer, or shapes that do not
            match.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation is {aggregation!r}: use one of {', '.join(AGGREGATIONS)}")
    keep = as_bool_mask(mask)
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, mask=mask)
    new, old = neutralised(logprobs, keep), neutralised(old_logprobs.detach(), keep)
    advantage = neutralised(_per_token(advantages, logprobs), keep)
    importance = _importance(importance_weights, new, keep)
    approx_kl = _k3((new - old).detach()) * keep

    if aggregation == "gspo":
        new, old, advantage, importance, approx_kl = (
            _row_mean(values, keep) for values in (new, old, advantage, importance, approx_kl)
        )
    units = keep.any(dim=1) if aggregation == "gspo" else keep
    ratio = bounded(new - old).exp()
    found = objective(Terms(ratio, advantage, new, old))
    losses = found.values * importance
    total = (_row_mean(losses, keep) if aggregation == "sequence" else losses * units).sum()
    metrics = {
        "clip_fraction_low": (units & found.low).sum().to(ratio),
        "clip_fraction_high": (units & found.high).sum().to(ratio),
        "dual_clip_fraction": (units & found.dual).sum().to(ratio),
        "ratio_sum": (units * ratio.detach()).sum(),
        "approx_kl": approx_kl.sum(),
    }
    return total / _denominator(normalizer, mask, aggregation, total), metrics


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
    """:func:`policy_loss` of the clipped surrogate, see `objectives.Clipped`.

    `metrics`: `clip_fraction_low` counts A < 0 and r < 1 - clip_low, `clip_fraction_high` A > 0 and
    r > 1 + clip_high, `dual_clip_fraction` A < 0 and r > dual_clip.

    Raises:
        ValueError: a setting out of range, an unknown aggregation or shapes that do not match.
    """
    return policy_loss(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        Clipped(clip_low, clip_high, dual_clip),
        aggregation=aggregation,
        importance_weights=importance_weights,
        normalizer=normalizer,
    )


def response_counts(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Number of response tokens and of sequences with at least one of them.

    Added over micro-batches and data-parallel ranks these are the `normalizer` of
    `policy_loss`: the first for "token", the second for the others.

    Args:
        mask: [b, s] response mask.

    Returns:
        `(tokens, sequences)`, int64, 0-dim.
    """
    keep = as_bool_mask(mask)
    return keep.sum(), keep.any(dim=1).sum()


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


def _importance(weights: Tensor | None, like: Tensor, keep: Tensor) -> Tensor:
    if weights is None:
        return torch.ones_like(like)
    require_same_shape(logprobs=like, importance_weights=weights)
    return neutralised(weights.detach(), keep)


def _row_mean(values: Tensor, keep: Tensor) -> Tensor:
    """Mean of [b, s] over each row's response tokens, [b]; 0 for a row without any."""
    return (values * keep).sum(dim=1) / keep.sum(dim=1).clamp(min=1)


def _k3(log_ratio: Tensor) -> Tensor:
    clamped = bounded(log_ratio)
    return torch.expm1(clamped) - clamped


def _denominator(
    normalizer: float | Tensor | None, mask: Tensor, aggregation: str, total: Tensor
) -> Tensor:
    tokens, sequences = response_counts(mask)
    if aggregation == "constant" and normalizer is None:
        raise ValueError(
            "aggregation='constant' divides by the longest response for each sequence: give a "
            "normalizer, sequences * length"
        )
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
