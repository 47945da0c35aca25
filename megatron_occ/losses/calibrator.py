"""From calibration sums to the coefficients of successive mini-batches, bounded and checked."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_occ.losses.calibration import CalibrationSums, coefficient_from_sums

# Nats squared per token up to which the policy counts as unmoved.
UNMOVED = 1e-10


@dataclass(frozen=True, eq=False)
class Coefficient:
    """Answer of `OCCCalibrator.update` for one mini-batch, float64 on the CPU.

    Log all of it: `values` is what acts, the rest says why.
    """

    values: Tensor  # [K] lambda to use
    raw: Tensor  # [K] lambda of these sums alone: no average, bound or check; may be NaN
    cross: Tensor  # [K] <d_RL, d_k> of these sums
    norm_squared: Tensor  # [K] ||d_k||^2 of these sums
    events: list[str]  # what went wrong, one line each; depths are 1-based
    held: bool  # the policy had not moved: `values` are those of the mini-batch before


@dataclass(eq=False)
class OCCCalibrator:
    """Turns each mini-batch's `CalibrationSums` into lambda.

    - Sums in which the policy has not moved carry no information: at the first mini-batch of an RL
      step the log-probs are the old ones, `d_RL = 0`, and the formula would answer 0. The last
      coefficient is held instead and the average stays as it was. "Not moved" is
      `moved <= tolerance * count`, a root mean square change of at most `sqrt(tolerance)` = 1e-5
      nats per token by default: above float32 rounding, below what one optimizer step does. Raise
      it if old and current log-probs are computed in bfloat16 and differ by rounding.
    - `ema` averages the sums, not their ratio, over mini-batches, with bias correction.
    - A non-finite lambda is answered by 0 for that depth and an event. Non-finite sums of a depth
      enter neither the average nor the other depths' coefficients.
    - `clamp` is applied last, whatever the value came from.

    The state lives on the CPU; `update` moves the sums there, once per mini-batch.

    Args:
        num_depths: K.
        lambda_plus: scale of the coefficient.
        eps: added to the squared norm.
        clamp: smallest and largest coefficient, None for no bound.
        ema: weight of the past in the average of sums, in [0, 1); 0 uses each mini-batch alone.
        joint: solve for all depths at once, see `coefficient_from_sums`.
        tolerance: nats squared per token up to which the policy counts as unmoved.

    Raises:
        ValueError: a setting out of range.
    """

    num_depths: int
    lambda_plus: float = 1.0
    eps: float = 1e-8
    clamp: tuple[float | None, float | None] = (0.0, None)
    ema: float = 0.0
    joint: bool = False
    tolerance: float = UNMOVED
    current: Tensor = field(init=False)  # [K] latest lambda; 0 within `clamp` at the start

    def __post_init__(self) -> None:
        self._check_settings()
        count = self.num_depths
        self._cross = torch.zeros(count, dtype=torch.float64)
        self._gram = torch.zeros(count, count, dtype=torch.float64)
        self._weight = torch.zeros(count, dtype=torch.float64)
        self.current = self._clamped(torch.zeros(count, dtype=torch.float64))

    def update(self, sums: CalibrationSums) -> Coefficient:
        """Take in the sums of a mini-batch, complete over micro-batches and ranks.

        Raises:
            ValueError: the sums are for another number of depths.
        """
        if len(sums.cross) != self.num_depths:
            raise ValueError(
                f"calibration sums for {len(sums.cross)} depths, but the calibrator has "
                f"num_depths={self.num_depths}: build it for as many depths as the model has"
            )
        sums = CalibrationSums.from_tensor(sums.to_tensor().detach().cpu().double())
        finite = _finite_depths(sums)
        moved = sums.moved > self.tolerance * sums.count
        held = bool((finite & ~moved).all())
        events: list[str] = []
        if not held:
            informative = finite & moved
            self._average(_restricted(sums, informative), informative)
            values = torch.where(informative, self._averaged_coefficient(), self.current)
            self.current, events = self._guarded(values.where(finite, torch.nan), sums)
        return Coefficient(
            values=self.current.clone(),
            raw=self._coefficient(_restricted(sums, finite)).where(finite, torch.nan),
            cross=sums.cross,
            norm_squared=sums.norm_squared,
            events=events,
            held=held,
        )

    def state_dict(self) -> dict[str, Tensor]:
        """State as plain float64 tensors; the settings are not part of it."""
        return {name: value.clone() for name, value in self._state().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore `state_dict()` bit for bit.

        Raises:
            ValueError: entries missing, unknown or of another number of depths.
        """
        expected = {name: value.shape for name, value in self._state().items()}
        found = {name: torch.as_tensor(value).shape for name, value in state.items()}
        if found != expected:
            raise ValueError(
                f"calibrator state has {_describe(found)}, expected {_describe(expected)}: it was "
                "saved with another number of MTP depths or by another version"
            )
        self._cross, self._gram, self._weight, self.current = (
            torch.as_tensor(state[name]).detach().cpu().double().clone()
            for name in ("cross", "gram", "weight", "current")
        )

    def _state(self) -> dict[str, Tensor]:
        return {
            "cross": self._cross,
            "gram": self._gram,
            "weight": self._weight,
            "current": self.current,
        }

    def _check_settings(self) -> None:
        low, high = self.clamp
        if self.num_depths < 1:
            raise ValueError(f"num_depths is {self.num_depths}: OCC needs at least one MTP depth")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema}: use a number in [0, 1), 0 for no average")
        for name in ("lambda_plus", "eps", "tolerance"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value}: use a finite number of at least 0")
        if any(bound is not None and math.isnan(bound) for bound in (low, high)):
            raise ValueError(f"clamp is {self.clamp}: use numbers or None")
        if low is not None and high is not None and low > high:
            raise ValueError(f"clamp is {self.clamp}: the lower bound exceeds the upper one")

    def _average(self, sums: CalibrationSums, informative: Tensor) -> None:
        # A depth without information has zero sums here and only decays, value and weight alike,
        # which leaves its average as it was.
        keep, new = self.ema, 1.0 - self.ema
        self._cross = keep * self._cross + new * sums.cross
        self._gram = keep * self._gram + new * sums.gram
        self._weight = keep * self._weight + new * informative.double()

    def _averaged_coefficient(self) -> Tensor:
        # Bias correction. The square root keeps the matrix positive semi-definite when one depth
        # missed mini-batches that another took part in; otherwise it is a plain division.
        weight = torch.where(self._weight > 0, self._weight, 1.0)
        gram = self._gram / (weight.unsqueeze(0) * weight.unsqueeze(1)).sqrt()
        unused = torch.zeros_like(weight)
        return self._coefficient(CalibrationSums(self._cross / weight, gram, unused, unused))

    def _coefficient(self, sums: CalibrationSums) -> Tensor:
        return coefficient_from_sums(
            sums, lambda_plus=self.lambda_plus, eps=self.eps, joint=self.joint
        )

    def _guarded(self, values: Tensor, sums: CalibrationSums) -> tuple[Tensor, list[str]]:
        """Finite and clamped coefficients, and an event for each that was not finite."""
        bad = ~torch.isfinite(values)
        values = self._clamped(values.masked_fill(bad, 0.0))
        events = [
            f"lambda[{k + 1}] not finite (cross={float(sums.cross[k]):g}, "
            f"norm_squared={float(sums.norm_squared[k]):g}): using {float(values[k]):g}"
            for k in bad.nonzero().flatten().tolist()
        ]
        return values, events

    def _clamped(self, values: Tensor) -> Tensor:
        low, high = self.clamp
        return values if low is None and high is None else values.clamp(low, high)


def _finite_depths(sums: CalibrationSums) -> Tensor:
    """bool [K]: whether all sums that concern this depth alone are finite."""
    own = torch.stack([sums.cross, sums.norm_squared, sums.count, sums.moved])
    return torch.isfinite(own).all(dim=0)


def _restricted(sums: CalibrationSums, depths: Tensor) -> CalibrationSums:
    """The sums with zeros for all depths but `depths` (bool [K])."""
    pair = depths.unsqueeze(0) & depths.unsqueeze(1)
    return CalibrationSums(
        cross=torch.where(depths, sums.cross, 0.0),
        gram=torch.where(pair, sums.gram, 0.0),
        count=torch.where(depths, sums.count, 0.0),
        moved=torch.where(depths, sums.moved, 0.0),
    )


def _describe(shapes: dict[str, torch.Size]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))
