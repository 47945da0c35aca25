"""Which coefficient a mini-batch uses: fixed, or lambda from calibration sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_occ.config.schema_mtp import MTPConfig
from megatron_occ.losses.calibration import CalibrationSums
from megatron_occ.losses.calibrator import OCCCalibrator
from megatron_occ.losses.regime import Regime


def regime_from(config: MTPConfig) -> Regime:
    """The regime of section ``mtp``."""
    trunk, head = config.trunk, config.head
    low, high = trunk.clamp
    return Regime(
        trunk=trunk.signal,
        head=head.signal,
        trunk_weight=None if trunk.coefficient == "occ" else trunk.weight,
        head_weight=head.weight,
        weighting=trunk.weighting,
        dual_clip=trunk.dual_clip,
        ratio_cap=trunk.ratio_cap,
        estimator=trunk.estimator,
        lambda_plus=trunk.lambda_plus,
        clamp=(low, high),
        leaks=not head.cut_output_layer,
        head_on_rollouts=head.states == "rollout",
    )


class CoefficientTracker:
    """Lambda over successive mini-batches, its metrics, and its state for checkpoints.

    With ``statistics=previous`` a mini-batch uses the sums of the one before it: free, one update
    old, and independent of how the mini-batch is cut. With ``current`` a forward pass over the
    mini-batch gives them first, as in the paper. The released formula has no state: it is evaluated
    inside the loss, for each micro-batch.

    Args:
        config: section ``mtp``.
    """

    def __init__(self, config: MTPConfig) -> None:
        trunk = config.trunk
        self.regime = regime_from(config)
        self.uses_sums = (
            trunk.signal != "none" and trunk.coefficient == "occ" and trunk.estimator == "logprob"
        )
        self.uses_current = self.uses_sums and trunk.statistics == "current"
        low, high = trunk.clamp
        self._calibrator = (
            OCCCalibrator(
                num_depths=config.num_layers,
                lambda_plus=trunk.lambda_plus,
                clamp=(low, high),
                ema=trunk.ema,
            )
            if self.uses_sums
            else None
        )
        self.events: list[str] = []

    def before_update(self, forward_sums: Callable[[], CalibrationSums]) -> Tensor | None:
        """Lambda [K] for the next mini-batch; None where the regime does not use it.

        Args:
            forward_sums: runs a forward pass over the mini-batch; called only if needed.
        """
        if self._calibrator is None:
            return None
        if self.uses_current:
            self._take(forward_sums())
        return self._calibrator.current

    def after_update(self, sums: CalibrationSums | None, used: Tensor | None) -> dict[str, float]:
        """Take in the mini-batch's sums; returns lambda that was used and both inner products."""
        if sums is None:
            return {}
        metrics = {}
        for k in range(sums.cross.numel()):
            metrics[f"calibration/cross_{k + 1}"] = float(sums.cross[k])
            metrics[f"calibration/norm_squared_{k + 1}"] = float(sums.norm_squared[k])
            fixed = 0.0 if self.regime.trunk == "none" else self.regime.trunk_weight
            if used is not None or fixed is not None:
                metrics[f"lambda/mtp_{k + 1}"] = fixed if used is None else float(used[k])
        if self._calibrator is not None and not self.uses_current:
            self._take(sums)
        return metrics

    def pop_events(self) -> list[str]:
        """Events since the last call."""
        events, self.events = self.events, []
        return events

    def _take(self, sums: CalibrationSums) -> None:
        assert self._calibrator is not None
        self.events += self._calibrator.update(sums).events

    def state_dict(self) -> dict[str, Any]:
        """State of the calibrator, empty where there is none."""
        return self._calibrator.state_dict() if self._calibrator is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        if self._calibrator is not None:
            self._calibrator.load_state_dict(state)


def to_device(coefficients: Tensor | None, device: Any) -> Tensor | None:
    """Coefficients as fp32 on ``device``."""
    return None if coefficients is None else coefficients.to(device=device, dtype=torch.float32)
