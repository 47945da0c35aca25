"""Correction for a policy that sampled otherwise than the trained one says: weights and rejection.

The log-ratio of a token is `o - s`: o its log-prob by the training engine at the start of the RL
step, s the one that it was sampled with. Weights change how much a token counts and stay in the
denominator of the loss; what is rejected leaves the numerator and the denominator, as if it had not
been sampled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_occ.losses._inputs import as_bool_mask, bounded, neutralised, require_same_shape

WEIGHTS = ("none", "token", "sequence")
OUTSIDE = ("truncate", "mask")
REJECTIONS = ("none", "token", "sequence", "geometric")


@dataclass(frozen=True)
class CorrectionSettings:
    """What is done about the log-ratios.

    Args:
        weights: `token`: each token's ratio; `sequence`: the product over its sequence, for each of
            its tokens; `none`: 1.
        low, high: range of the weights; None: no such bound.
        outside: `truncate` moves a weight to the nearer bound (truncated importance sampling,
            Ionides 2008; Yao et al. 2025, "Your efficient RL framework secretly brings you
            off-policy RL training"), `mask` makes it 0 (IcePop, arXiv 2510.18855, section 3.2).
        reject: what has to lie in [reject_low, reject_high] to be kept: the ratio of a `token`, the
            product over a `sequence`, or its `geometric` mean `exp(mean(o - s))`, which does not
            grow with the length (Liu et al. 2025, "When speed kills stability").
        reject_low, reject_high: the range; None: no such bound.
        veto: sequences with a token whose ratio is below this are rejected; None: none are.
    """

    weights: str = "none"
    low: float | None = None
    high: float | None = None
    outside: str = "truncate"
    reject: str = "none"
    reject_low: float | None = None
    reject_high: float | None = None
    veto: float | None = None

    @property
    def acts(self) -> bool:
        """Whether anything is changed."""
        return self.weights != "none" or self.rejects

    @property
    def rejects(self) -> bool:
        """Whether any token may be rejected."""
        return self.reject != "none" or self.veto is not None


@dataclass(frozen=True)
class Corrected:
    """What a correction makes of a batch.

    Args:
        weights: [b, s], detached, at least float32, 1 where masked or rejected; None where all
            are 1.
        keep: [b, s] bool: the mask without what was rejected.
        sums: [8] float64, detached, to be added over micro-batches and ranks, see
            `correction_metrics`.
    """

    weights: Tensor | None
    keep: Tensor
    sums: Tensor


def correct(
    old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, settings: CorrectionSettings
) -> Corrected:
    """Weights and rejection of whole sequences.

    Args:
        old_logprobs: [b, s] o.
        rollout_logprobs: [b, s] s.
        mask: [b, s] response mask. Other positions may hold anything, also NaN or infinity.
        settings: what to do.

    Raises:
        ValueError: shapes differ, or an unknown name.
    """
    _check(settings)
    require_same_shape(old_logprobs=old_logprobs, rollout_logprobs=rollout_logprobs, mask=mask)
    given = as_bool_mask(mask)
    old, sampled = old_logprobs.detach(), rollout_logprobs.detach()
    log_ratio = neutralised(old, given) - neutralised(sampled, given)
    keep = given & ~_rejected(log_ratio, given, settings)
    # what is rejected has no part in the product of its sequence
    raw = _at_level(torch.where(keep, log_ratio, 0.0), keep, settings.weights)
    outside = _outside(raw, settings.low, settings.high)
    weights = torch.where(keep, _bounded(raw, outside, settings), 1.0)
    sums = _sums(given, keep, weights, outside)
    return Corrected(weights if settings.weights != "none" else None, keep, sums)


def correction_metrics(sums: Tensor, settings: CorrectionSettings) -> dict[str, Tensor]:
    """Metrics of a mini-batch, 0-dim, from the `sums` of its parts, added up.

    Of what was sampled: the shares `rejected/tokens` and `rejected/sequences` (no token is left).
    Of the tokens that were kept: `weight/mean`, the shares `weight/low` and `weight/high` that lay
    outside of the range, and `weight/effective`, the effective number of tokens by their number,
    `(sum w)^2 / (n sum w^2)` (Kish 1965).
    """
    tokens, sequences, kept, kept_sequences, total, squares, low, high = sums.unbind()
    found = {}
    if settings.rejects:
        found["rejected/tokens"] = 1 - kept / tokens.clamp(min=1)
        found["rejected/sequences"] = 1 - kept_sequences / sequences.clamp(min=1)
    if settings.weights != "none":
        count = kept.clamp(min=1)
        found |= {"weight/mean": total / count, "weight/low": low / count}
        found["weight/high"] = high / count
        tiny = torch.finfo(squares.dtype).tiny
        found["weight/effective"] = total.square() / (count * squares).clamp(min=tiny)
    return found


def _at_level(log_ratio: Tensor, keep: Tensor, level: str) -> Tensor:
    """[b, s] log-ratio of each token, or of its sequence; `log_ratio` is 0 where not kept."""
    if level == "none":
        return torch.zeros_like(log_ratio)
    if level == "token":
        return log_ratio
    found = log_ratio.sum(dim=1, keepdim=True)
    if level == "geometric":
        found = found / keep.sum(dim=1, keepdim=True).clamp(min=1)
    return found.expand_as(log_ratio)


def _rejected(log_ratio: Tensor, keep: Tensor, settings: CorrectionSettings) -> Tensor:
    """[b, s] bool, of whole sequences where a sequence is judged."""
    judged = _at_level(log_ratio, keep, settings.reject)
    low, high = _outside(judged, settings.reject_low, settings.reject_high)
    rejected = low | high
    if settings.veto is not None:
        vetoed = keep & (log_ratio < math.log(settings.veto))
        rejected = rejected | vetoed.any(dim=1, keepdim=True)
    return rejected


def _outside(log_ratio: Tensor, low: float | None, high: float | None) -> tuple[Tensor, Tensor]:
    """Where a ratio lies below and above a range; in logarithms, so that none overflows."""
    nowhere = torch.zeros_like(log_ratio, dtype=torch.bool)
    return (
        nowhere if low is None else log_ratio < math.log(low),
        nowhere if high is None else log_ratio > math.log(high),
    )


def _bounded(
    log_ratio: Tensor, outside: tuple[Tensor, Tensor], settings: CorrectionSettings
) -> Tensor:
    ratio = bounded(log_ratio).exp()
    for where, bound in zip(outside, (settings.low, settings.high), strict=True):
        if bound is not None:
            ratio = torch.where(where, bound if settings.outside == "truncate" else 0.0, ratio)
    return ratio


def _sums(given: Tensor, keep: Tensor, weights: Tensor, outside: tuple[Tensor, Tensor]) -> Tensor:
    used = torch.where(keep, weights, 0.0).double()
    counts = [each for mask in (given, keep) for each in (mask.sum(), mask.any(dim=1).sum())]
    cut = [(keep & each).sum() for each in outside]
    return torch.stack([each.double() for each in (*counts, used.sum(), used.square().sum(), *cut)])


def _check(settings: CorrectionSettings) -> None:
    for name, value, known in (
        ("weights", settings.weights, WEIGHTS),
        ("outside", settings.outside, OUTSIDE),
        ("reject", settings.reject, REJECTIONS),
    ):
        if value not in known:
            raise ValueError(f"{name} is {value!r}: use one of {', '.join(known)}")
