"""Lambda from the gradients themselves: what is measured in a mini-batch, kept, and added."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from megatron_occ.config.schema import MTPConfig, TrunkConfig
from megatron_occ.losses.exact import (
    ExactCalibrator,
    ExactCoefficient,
    ExactSettings,
    GradientProducts,
)
from megatron_occ.rl.interfaces import GradientSpaceLike


def exact_settings(trunk: TrunkConfig) -> ExactSettings:
    """The settings of section ``mtp.trunk``."""
    exact, (low, high) = trunk.exact, trunk.clamp
    return ExactSettings(
        pairs=exact.pairs,
        lambda_plus=trunk.lambda_plus,
        gate=exact.gate,
        share=exact.share,
        share_cap=exact.share_cap,
        clamp=(low, high),
        ema=trunk.ema,
    )


def measures_gradients(config: MTPConfig) -> bool:
    """Whether lambda comes from the gradients themselves."""
    trunk = config.trunk
    return trunk.signal != "none" and trunk.coefficient == "occ" and trunk.estimator == "exact"


class ExactTracker:
    """Lambda over successive mini-batches by ``mtp.trunk.estimator=exact``.

    A mini-batch that is due has a pass for each depth first, which gives the gradient g_k of its
    loss with weight 1. The update's own pass then leaves that loss out: what it brings is RL's
    gradient g_0. :meth:`mix` multiplies them with each other and with those that are kept, takes
    lambda from the averages, adds `lambda_k / K g_k`, and keeps the gradients. In the mini-batches
    between, the loss has the last lambda.

    Args:
        config: section ``mtp``.
        space: where gradients are copied, multiplied and added.
    """

    def __init__(self, config: MTPConfig, space: GradientSpaceLike) -> None:
        exact, self.depths = config.trunk.exact, config.num_layers
        self._space, self._metric, self._every = space, exact.metric, exact.every
        self._per_layer = exact.per == "layer"
        self._names = list(space.groups) if self._per_layer else ["trunk"]
        self._calibrator = ExactCalibrator(
            self.depths, len(self._names), exact_settings(config.trunk)
        )
        self._kept: deque[list[Any]] = deque(maxlen=exact.kept if exact.pairs == "cross" else 0)
        self._updates = 0
        self.events: list[str] = []
        self.metrics: dict[str, float] = {}

    @property
    def is_due(self) -> bool:
        """Whether the next mini-batch is measured; Adam's metric needs an update before it."""
        ready = self._metric == "euclidean" or self._space.has_adam_metric
        return ready and self._updates % self._every == 0

    @property
    def current(self) -> Tensor:
        """Lambda [K] of a mini-batch that is not measured."""
        return self._calibrator.current[:, 0]

    def mix(self, depths: Sequence[Any]) -> None:
        """Measure, and add the depths' gradients to RL's, which the optimizer is about to use."""
        space, main = self._space, self._space.current()
        sample = self._products([main, *depths])
        if not sample.is_finite:
            self.events.append("calibration: a gradient is not finite: measured nothing")
            return
        answer = self._calibrator.update(sample)
        kept = [space.copy(main), *depths] if self._kept.maxlen else []
        space.add(depths, answer.values / self.depths)
        if kept:
            self._kept.append(kept)
        self.metrics = self._describe(sample, answer)

    def after_update(self) -> dict[str, float]:
        """Lambda that was used and, of a mini-batch that was measured, what was found."""
        self._updates += 1
        found, self.metrics = self.metrics, {}
        values = self._calibrator.current.mean(dim=1)
        return {f"lambda/mtp_{k}": float(v) for k, v in enumerate(values, start=1)} | found

    def forget(self) -> None:
        """Drop the kept gradients: a checkpoint does not hold them.

        A run that goes on from it and one that was never interrupted then do the same.
        """
        self._kept.clear()

    def pop_events(self) -> list[str]:
        """Events since the last call."""
        events, self.events = self.events, []
        return events

    def state_dict(self) -> dict[str, Any]:
        """Averages, and the place in the rhythm of measurements."""
        return {"updates": self._updates, "averages": self._calibrator.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._updates = state["updates"]
        self._calibrator.load_state_dict(state["averages"])

    def _products(self, now: list[Any]) -> GradientProducts:
        """Within the mini-batch, and with all kept ones."""
        others = [gradient for kept in self._kept for gradient in kept]
        found = self._space.products(now, [*now, *others], self._metric)
        if not self._per_layer:
            found = found.sum(dim=-1, keepdim=True)
        return GradientProducts.from_blocks(found)

    def _describe(self, sample: GradientProducts, answer: ExactCoefficient) -> dict[str, float]:
        metrics = {}
        for group, name in enumerate(self._names):
            suffix = f"/{name}" if self._per_layer else ""
            for k in range(1, self.depths + 1):
                values = {
                    "c_same": sample.same[0, k, group],
                    "norm_squared": sample.same[k, k, group],
                    "lambda_raw": answer.raw[k - 1, group],
                    "lambda_error": answer.error[k - 1, group],
                }
                if sample.cross is not None:
                    values["c_cross"] = sample.cross[0, k, group]
                if self._per_layer:
                    values["lambda"] = answer.values[k - 1, group]
                metrics |= {f"exact/{key}_{k}{suffix}": float(v) for key, v in values.items()}
            metrics[f"exact/rl_norm_squared{suffix}"] = float(sample.same[0, 0, group])
            if sample.cross is not None:
                metrics[f"exact/rl_signal{suffix}"] = float(sample.cross[0, 0, group])
            metrics[f"exact/share{suffix}"] = float(answer.share[group])
        return {name: value for name, value in metrics.items() if math.isfinite(value)}
