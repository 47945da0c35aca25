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
        cross: [1+K, 1+K, G] between independent samples at the same weights, symmetric; None
            without any.
    """

    same: Tensor
    cross: Tensor | None = None

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
        raw: [K, G] lambda of each depth by itself, before gate, share and bound.
        error: [K, G] standard error of ``raw``, from those of c and of RL's signal.
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
            variant); ``cross``: between independent samples, which is unbiased.
        lambda_plus: scale, lambda+ of arXiv 2605.28184; None: that of :func:`best_mixture`, which
            needs ``cross``.
        gate: standard errors that ``raw`` has to be away from 0, after `MIN_SAMPLES` (0: no gate).
            Without lambda_plus so has RL's own signal, which is the scale.
        share: norm of the MTP part as a share of the RL part, to be reached where c passes the
            gate; None: as lambda_plus makes it.
        share_cap: the same as an upper bound; None: none.
        clamp: smallest and largest lambda, before it is scaled to a share; None for no bound.
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
    over depths). Depths whose own lambda is not ``gate`` standard errors from 0 get 0; the others
    are solved for together, so that what they have in common is not counted twice. Where negative
    lambdas are clamped away, a depth that would get one is left out and the rest solved again: a
    large positive weight may make sense beside the negative one alone.

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
        # of RL's signal times c, for the covariance of the two
        self._joint = ExponentialAverage(shape[1:], settings.ema)
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
            self._joint.update(sample.cross[0, 0] * sample.cross[0])
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
        depths = len(same) - 1
        signal, error = (part[0, :, group] for part in (self._signal.mean, self._signal.error))
        raw, spread = self._each_alone(same, signal, error, group)
        weights = self._together(same, signal, self._passed(raw, spread, signal[0], error[0]))
        values = self._clamped(depths * weights)
        values = depths * self._shared(same, values / depths)
        share = torch.tensor(update_share(same, values / depths), dtype=torch.float64)
        return values, depths * raw, depths * spread, share

    @property
    def _signal(self) -> ExponentialAverage:
        return self.cross if self.settings.pairs == "cross" else self.same

    def _each_alone(
        self, same: Tensor, signal: Tensor, error: Tensor, group: int
    ) -> tuple[Tensor, Tensor]:
        """Weight of each depth without the others, and its standard error, [K]; nan: there is none.

        With a scale `lambda_plus c / v^2`. Without one the best mixture's,
        `(c S_00 - h_0 S_0k) / (h_0 v^2 - c S_0k)`, by the error of its numerator: S is known far
        better than c and h_0, RL's signal. It tells whether the weight is 0; around one that is
        not, the noise of the denominator comes on top.
        """
        norms = same.diagonal()[1:]
        norms = torch.where(norms > 0, norms, torch.nan)
        c, spread, scale = signal[1:], error[1:], self.settings.lambda_plus
        if scale is not None:
            return scale * c / norms, scale * spread / norms
        main, noise = same[0, 0], same[0, 1:]
        covariance = self._covariance(signal, group)
        variance = (main * spread) ** 2 + (noise * error[0]) ** 2 - 2 * main * noise * covariance
        below = signal[0] * norms - c * noise
        # RL's own weight in the mixture: no step follows one that is not positive
        below = torch.where(below > 0, below, torch.nan)
        return (c * main - signal[0] * noise) / below, variance.clamp(min=0).sqrt() / below

    def _covariance(self, signal: Tensor, group: int) -> Tensor:
        """Of the averages of RL's signal and of each c, [K]."""
        count = self.cross.count
        if count < 1 + 1e-9:
            return torch.zeros_like(signal[1:])
        mixed = self._joint.mean[1:, group] - signal[0] * signal[1:]
        return mixed / (count - 1)

    def _passed(self, raw: Tensor, spread: Tensor, main: Tensor, error: Tensor) -> Tensor:
        """Depths that may act, bool [K]."""
        gate = self.settings.gate
        passed = raw.isfinite() & (raw != 0)
        if gate > 0:
            # rounding must not decide whether eight samples are eight
            passed &= (raw.abs() > gate * spread) & (self._signal.count > MIN_SAMPLES - 1e-6)
        if self.settings.lambda_plus is None:
            # the scale is RL's own signal: it has to be there
            passed &= (main > gate * error) if gate > 0 else main > 0
        return passed

    def _together(self, same: Tensor, signal: Tensor, passed: Tensor) -> Tensor:
        """Weights [K] of the depths that passed, 0 of the others."""
        low = self.settings.clamp[0]
        weights = torch.zeros(len(passed), dtype=torch.float64)
        passed = passed.clone()
        while passed.any():
            solved = weights.clone()
            solved[passed] = self._solved(same, signal, passed)
            if low is None or low < 0 or bool((solved >= 0).all()):
                return solved
            passed[solved.argmin()] = False
        return weights

    def _solved(self, same: Tensor, signal: Tensor, passed: Tensor) -> Tensor:
        index = torch.cat((torch.tensor([True]), passed))
        part = same[index][:, index]
        if self.settings.lambda_plus is None:
            weights = best_mixture(part, signal[index]).weights
        else:
            weights = self.settings.lambda_plus * gram_weights(part[1:, 1:], signal[index][1:])
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
        averages = {"same": self.same, "cross": self.cross, "joint": self._joint}
        return {name: average.state_dict() for name, average in averages.items()}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Restore :meth:`state_dict` bit for bit.

        Raises:
            ValueError: it is of another number of depths or groups.
        """
        self.same.load_state_dict(state["same"])
        self.cross.load_state_dict(state["cross"])
        self._joint.load_state_dict(state["joint"])
        self.current = self.coefficient().values if self.same.count else self.current
