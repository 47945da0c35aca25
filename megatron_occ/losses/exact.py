"""The coefficient lambda from inner products of the gradients themselves, with its error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_occ.losses.averages import ExponentialAverage
from megatron_occ.losses.mixture import best_mixture, gram_weights, update_share

PAIRS = ("same", "cross")
# Effective samples below which a standard error says little: the gate stays shut.
MIN_SAMPLES = 8.0


@dataclass(frozen=True, eq=False)
class GradientProducts:
    """Inner products of the trunk gradients of one mini-batch, float64, K depths, G groups.

    Index 0 is RL's gradient, k that of MTP depth k with weight 1.

    Args:
        same: [1+K, 1+K, G] within the mini-batch.
        cross: [1+K, 1+K, G] with gradients of independent mini-batches, symmetric, averaged over
            those that there are; None without any.
    """

    same: Tensor
    cross: Tensor | None = None

    @classmethod
    def from_blocks(cls, products: Tensor) -> GradientProducts:
        """From [1+K, n (1+K), G]: with the mini-batch's own gradients, then with each other's."""
        same, *others = products.split(products.size(0), dim=1)
        if not others:
            return cls(same)
        mean = torch.stack(others).mean(dim=0)
        # <g_i here, g_j there> and <g_j here, g_i there> estimate the same
        return cls(same, (mean + mean.transpose(0, 1)) / 2)

    @property
    def is_finite(self) -> bool:
        """Whether every number is."""
        return bool(self.same.isfinite().all()) and (
            self.cross is None or bool(self.cross.isfinite().all())
        )


@dataclass(frozen=True, eq=False)
class ExactCoefficient:
    """Lambda of the next mini-batches, and why; float64, K depths, G groups.

    Args:
        values: [K, G] lambda to use.
        raw: [K, G] `lambda_plus K c / v^2` of each depth by itself: no gate, share or bound.
        error: [K, G] standard error of ``raw``, from that of c.
        share: [G] norm of the MTP part of the gradient as a share of the RL part's.
    """

    values: Tensor
    raw: Tensor
    error: Tensor
    share: Tensor


@dataclass(frozen=True)
class ExactSettings:
    """How lambda follows from averaged inner products.

    Args:
        pairs: ``same``: c is the inner product within a mini-batch (the paper's full-gradient
            variant); ``cross``: between independent ones, which is unbiased.
        lambda_plus: scale, lambda+ of arXiv 2605.28184; None: that of :func:`best_mixture`, which
            needs ``cross``.
        gate: standard errors that c has to be away from 0, after `MIN_SAMPLES` (0: no gate).
        share: norm of the MTP part as a share of the RL part, to be reached where c passes the
            gate; None: as lambda_plus makes it.
        share_cap: the same as an upper bound; None: none.
        clamp: smallest and largest lambda, applied last; None for no bound.
        ema: weight of the past in the averages.
    """

    pairs: str = "cross"
    lambda_plus: float | None = None
    gate: float = 2.0
    share: float | None = None
    share_cap: float | None = None
    clamp: tuple[float | None, float | None] = (0.0, None)
    ema: float = 0.98

    def __post_init__(self) -> None:
        if self.pairs not in PAIRS:
            raise ValueError(f"pairs is {self.pairs!r}: use one of {', '.join(PAIRS)}")
        if self.lambda_plus is None and self.pairs == "same":
            raise ValueError(
                "lambda_plus=None takes the scale from the signal in RL's own gradient, which "
                "pairs='same' does not measure: give a number, or pairs='cross'"
            )


class ExactCalibrator:
    """Turns the :class:`GradientProducts` of successive mini-batches into lambda.

    Lambda of depth k acts as `lambda_k / K`, the weight of its gradient (the joint loss averages
    over depths). Depths whose c is not ``gate`` standard errors from 0 get 0; the others are solved
    for together, so that what they have in common is not counted twice.

    Args:
        num_depths: K.
        num_groups: G, each with coefficients of its own.
        settings: see :class:`ExactSettings`.
    """

    def __init__(self, num_depths: int, num_groups: int, settings: ExactSettings) -> None:
        self.settings = settings
        shape = (1 + num_depths, 1 + num_depths, num_groups)
        self.same = ExponentialAverage(shape, settings.ema)
        self.cross = ExponentialAverage(shape, settings.ema)
        self.current = self._clamped(torch.zeros(num_depths, num_groups, dtype=torch.float64))

    def update(self, sample: GradientProducts) -> ExactCoefficient:
        """Take in the products of a mini-batch, complete over ranks.

        Raises:
            ValueError: they are of another number of depths or groups, or not finite.
        """
        expected = self.same.mean.shape
        if sample.same.shape != expected:
            raise ValueError(
                f"products {list(sample.same.shape)}, expected {list(expected)}: [1+K, 1+K, G]"
            )
        if not sample.is_finite:
            raise ValueError("an inner product of gradients is not finite: leave the sample out")
        self.same.update(sample.same)
        if sample.cross is not None:
            self.cross.update(sample.cross)
        answer = self.coefficient()
        self.current = answer.values
        return answer

    def coefficient(self) -> ExactCoefficient:
        """Lambda from the averages as they are."""
        groups = [self._of_group(group) for group in range(self.same.mean.size(-1))]
        values, raw, error, share = (
            torch.stack(part, dim=-1) for part in zip(*groups, strict=True)
        )
        return ExactCoefficient(values, raw, error, share)

    def _of_group(self, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        same = self.same.mean[..., group]
        measured = self.cross if self.settings.pairs == "cross" else self.same
        signal, error = measured.mean[0, :, group], measured.error[0, :, group]
        depths = len(same) - 1
        scale = self._scale(same, signal)
        norms = same.diagonal()[1:]
        factor = depths * scale / torch.where(norms > 0, norms, torch.nan)
        weights = torch.zeros(depths, dtype=torch.float64)
        passed = self._passed(signal, error, measured.count) & (norms > 0)
        if passed.any():
            weights[passed] = self._solved(same, signal, scale, passed)
        weights = self._shared(same, weights)
        values = self._clamped(depths * weights)
        share = torch.tensor(update_share(same, values / depths), dtype=torch.float64)
        return values, factor * signal[1:], (factor * error[1:]).abs(), share

    def _scale(self, same: Tensor, signal: Tensor) -> float:
        """lambda_plus; without one that of the best step: E|g_0|^2 / |E g_0|^2."""
        if self.settings.lambda_plus is not None:
            return self.settings.lambda_plus
        return float(same[0, 0] / signal[0]) if signal[0] > 0 else torch.nan

    def _passed(self, signal: Tensor, error: Tensor, count: float) -> Tensor:
        """Depths that may act, bool [K]."""
        gate = self.settings.gate
        if gate == 0:
            clear = torch.ones_like(signal, dtype=torch.bool)
        else:
            # rounding must not decide whether eight samples are eight
            clear = (signal.abs() > gate * error) & (count > MIN_SAMPLES - 1e-6)
        passed = clear[1:] & (signal[1:] != 0)
        if self.settings.lambda_plus is None:
            # the scale is RL's own signal: it has to be there
            passed &= clear[0] & (signal[0] > 0)
        return passed

    def _solved(self, same: Tensor, signal: Tensor, scale: float, passed: Tensor) -> Tensor:
        index = torch.cat((torch.tensor([True]), passed))
        part = same[index][:, index]
        if self.settings.lambda_plus is None:
            weights = best_mixture(part, signal[index]).weights
        else:
            weights = scale * gram_weights(part[1:, 1:], signal[index][1:])
        return torch.where(weights.isfinite(), weights, 0.0)

    def _shared(self, same: Tensor, weights: Tensor) -> Tensor:
        """The same direction with the share that is asked for, or allowed."""
        share = update_share(same, weights)
        if share == 0:
            return weights
        if self.settings.share is not None:
            weights, share = weights * (self.settings.share / share), self.settings.share
        cap = self.settings.share_cap
        return weights if cap is None or share <= cap else weights * (cap / share)

    def _clamped(self, values: Tensor) -> Tensor:
        low, high = self.settings.clamp
        return values if low is None and high is None else values.clamp(low, high)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """State of the averages."""
        return {"same": self.same.state_dict(), "cross": self.cross.state_dict()}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Restore :meth:`state_dict` bit for bit.

        Raises:
            ValueError: it is of another number of depths or groups.
        """
        self.same.load_state_dict(state["same"])
        self.cross.load_state_dict(state["cross"])
        self.current = self.coefficient().values if self.same.count else self.current
