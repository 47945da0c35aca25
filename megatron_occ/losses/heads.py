"""What goes into a loss and what comes out of it: outputs of the heads, constants, counts, report.

Everything is in the *source frame*: entry t of depth d is about token x_{t+1+d}, predicted at
position t (d = 0 is the main head). Targets, masks and old log-probs are shifted once, as
constants; log-probs are never moved.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_occ.losses.calibration import CalibrationSums


@dataclass(frozen=True)
class HeadOutputs:
    """What the model returns for one micro-batch of b sequences of s positions, source frame.

    Args:
        logprobs: [b, s] of the main head; None where only a depth's are wanted.
        passes: log-probs [K, b, s] of each MTP pass, in the order of :attr:`Regime.passes`.
        distance: [K, b, s] soft cross-entropy or total variation of the head's own loss.
        entropy: [b, s] of the main head, nats.
        agreement: [K, b, s] 1.0 where depth k's top token equals the main head's.
    """

    logprobs: Tensor | None
    passes: tuple[Tensor, ...] = ()
    distance: Tensor | None = None
    entropy: Tensor | None = None
    agreement: Tensor | None = None


@dataclass(frozen=True)
class JointTargets:
    """Constants of one micro-batch in the source frame; leading dimension 1+K, 0 the main head.

    Args:
        mask: [1+K, b, s] 1.0 where the target is a response token that the depth can predict.
        old_logprobs: [1+K, b, s] log-prob of the target under the main head of the old policy.
        advantages: [b].
        ref_logprobs: [b, s] under the reference policy, main head's frame.
        importance_weights: [b, s] of the tokens, main head's frame.
    """

    mask: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    ref_logprobs: Tensor | None = None
    importance_weights: Tensor | None = None


@dataclass(frozen=True)
class HeadTargets:
    """Constants of one micro-batch that trains the head alone.

    Args:
        mask: as in :class:`JointTargets`.
    """

    mask: Tensor


@dataclass(frozen=True)
class Normalizers:
    """Global counts over all micro-batches and data-parallel ranks, one per head: [1+K]."""

    tokens: Tensor
    sequences: Tensor

    @staticmethod
    def count(mask: Tensor) -> Tensor:
        """Counts of one micro-batch, [2, 1+K] (tokens, sequences): add them up, then reduce.

        Args:
            mask: [1+K, b, s].
        """
        tokens = mask.sum((1, 2), dtype=torch.float64)
        sequences = (mask.sum(2) > 0).sum(1).double()
        return torch.stack((tokens, sequences))

    @classmethod
    def from_counts(cls, counts: Tensor) -> Normalizers:
        """From summed counts [2, 1+K]; an empty count divides by 1, its sums are 0 anyway."""
        tokens, sequences = counts.clamp(min=1.0).float()
        return cls(tokens, sequences)


@dataclass
class LossReport:
    """Parts of the loss that add up over micro-batches and ranks to mini-batch means.

    ``maxima`` are the exception: the largest value of all of them counts.
    """

    metrics: dict[str, Tensor] = field(default_factory=dict)
    calibration: CalibrationSums | None = None
    maxima: dict[str, Tensor] = field(default_factory=dict)

    def __add__(self, other: LossReport) -> LossReport:
        """Of two passes over parts of a mini-batch."""
        metrics, maxima = dict(self.metrics), dict(self.maxima)
        for name, value in other.metrics.items():
            metrics[name] = metrics[name] + value if name in metrics else value
        for name, value in other.maxima.items():
            maxima[name] = torch.maximum(maxima[name], value) if name in maxima else value
        sums = [r.calibration for r in (self, other) if r.calibration is not None]
        return LossReport(metrics, sum(sums[1:], sums[0]) if sums else None, maxima)
