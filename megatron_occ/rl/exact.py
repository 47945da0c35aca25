"""Lambda from the gradients themselves: what is measured in a mini-batch, and what is added."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_occ.config.schema_mtp import MTPConfig, TrunkConfig
from megatron_occ.data.splits import mix64
from megatron_occ.losses.exact import (
    ExactCalibrator,
    ExactCoefficient,
    ExactSettings,
    GradientProducts,
)
from megatron_occ.losses.mixture import update_share
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


class ExactTracker:
    """Lambda over successive mini-batches by ``mtp.trunk.estimator=exact``.

    A mini-batch that is due is gone through part by part. In each, a pass for every depth gives the
    gradient g_k of its loss with weight 1, and a pass that leaves that loss out RL's gradient g_0.
    :meth:`add_part` takes all parts but the last, whose g_0 the optimizer is about to use when
    :meth:`mix` adds the others to it, takes lambda from the averages, and adds `lambda_k / K g_k`.
    In the mini-batches between, a head that shares the trunk's loss has the last lambda in it for
    nothing; beside a head loss of its own MTP would need a pass more, and leaves the trunk alone.

    With `S` the inner products of the whole gradients and `S_i` those within part i of P, whose
    prompts differ, pairs of different parts alone give `P / (P - 1) (S - sum_i S_i)`.

    Args:
        config: section ``mtp``.
        space: where gradients are multiplied and added.
        seed: of a control, see ``mtp.trunk.exact.control``.
    """

    def __init__(self, config: MTPConfig, space: GradientSpaceLike, seed: int = 0) -> None:
        exact, self.depths = config.trunk.exact, config.num_layers
        self._space, self._metric, self._every = space, exact.metric, exact.every
        self._per_layer = exact.per == "layer"
        self._carries = config.head.signal == "same_as_trunk"
        self._names = list(space.groups) if self._per_layer else ["trunk"]
        self._calibrator = ExactCalibrator(
            self.depths, len(self._names), exact_settings(config.trunk)
        )
        self.parts = exact.parts if exact.pairs == "cross" else 1
        self._control, self._seed = exact.control, seed
        # of the parts so far: how many, sums of gradients, and of products within each
        self._parts, self._sums, self._within = 0, [], torch.zeros(())
        # of a shuffled lambda: what has been measured, each [K, G]
        self._history: list[Tensor] = []
        self._updates = 0
        self._used = self._calibrator.current
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
        return self._used[:, 0] if self._carries else torch.zeros(self.depths)

    def add_part(self, main: Any, depths: Sequence[Any]) -> None:
        """Take the gradients of a part that is not the last: RL's with the head's, and MTP's."""
        now = [main, *depths]
        self._within = self._within + self._products(now)
        pairs = zip(self._sums, now, strict=True)
        self._sums = [self._space.sum(pair) for pair in pairs] if self._parts else now
        self._parts += 1

    def mix(self, depths: Sequence[Any]) -> None:
        """Measure, and add the depths' gradients to RL's, which the optimizer is about to use.

        Args:
            depths: of the last part.
        """
        space, parts, within = self._space, self._parts + 1, self._within
        depths = list(depths)
        if self._parts:
            within = within + self._products([space.current(), *depths])
            space.add(self._sums[:1], torch.ones(1, 1))
            pairs = zip(self._sums[1:], depths, strict=True)
            depths = [space.sum(pair) for pair in pairs]
        self._parts, self._sums, self._within = 0, [], torch.zeros(())
        same = self._products([space.current(), *depths])
        cross = parts / (parts - 1) * (same - within) if parts > 1 else None
        sample = GradientProducts(same, cross)
        if not sample.is_finite:
            self._used = torch.zeros_like(self._used)
            self.events.append("calibration: a gradient is not finite: measured and added nothing")
            return
        answer = self._calibrator.update(sample)
        self._used = self._chosen(answer.values)
        space.add(self._added(depths), self._used / self.depths)
        self.metrics = self._describe(sample, answer)

    def _chosen(self, values: Tensor) -> Tensor:
        """Lambda [K, G] that acts: the measured one, or, shuffled, one of all so far."""
        if self._control != "shuffled":
            return values
        self._history.append(values)
        return self._history[self._draw() % len(self._history)]

    def _added(self, depths: Sequence[Any]) -> list[Any]:
        """What is added to RL's gradient: the depths' gradients, unless a control replaces them."""
        if self._control != "random":
            return list(depths)
        # the same signs for all depths keep the norm of their sum
        seed = self._draw() % 2**31
        return [self._space.random_like(each, seed) for each in depths]

    def _draw(self) -> int:
        """A random number of this update."""
        return mix64(mix64(self._seed) + self._updates)

    def after_update(self) -> dict[str, float]:
        """Lambda that was used and, of a mini-batch that was measured, what was found."""
        self._updates += 1
        found, self.metrics = self.metrics, {}
        # a mini-batch that is not measured, or whose gradient is not finite, found nothing
        values = self._used.mean(dim=1) if found else self.current
        return {f"lambda/mtp_{k}": float(v) for k, v in enumerate(values, start=1)} | found

    def pop_events(self) -> list[str]:
        """Events since the last call."""
        events, self.events = self.events, []
        return events

    def state_dict(self) -> dict[str, Any]:
        """Averages, and the place in the rhythm of measurements."""
        return {
            "updates": self._updates,
            "averages": self._calibrator.state_dict(),
            "used": self._used.clone(),
            "history": list(self._history),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._updates = state["updates"]
        self._calibrator.load_state_dict(state["averages"])
        self._used, self._history = state["used"].clone(), list(state["history"])

    def _products(self, gradients: list[Any]) -> Tensor:
        """Inner products of all pairs, [1+K, 1+K, G]."""
        found = self._space.products(gradients, gradients, self._metric)
        return found if self._per_layer else found.sum(dim=-1, keepdim=True)

    def _share(self, group: int) -> float:
        """Of what acts, on the average mini-batch."""
        same = self._calibrator.same.mean[..., group]
        return update_share(same, self._used[:, group] / self.depths)

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
                    "lambda": self._used[k - 1, group],
                }
                if sample.cross is not None:
                    values["c_cross"] = sample.cross[0, k, group]
                metrics |= {f"exact/{key}_{k}{suffix}": float(v) for key, v in values.items()}
            metrics[f"exact/rl_norm_squared{suffix}"] = float(sample.same[0, 0, group])
            if sample.cross is not None:
                metrics[f"exact/rl_signal{suffix}"] = float(sample.cross[0, 0, group])
            metrics[f"exact/share{suffix}"] = self._share(group)
        return {name: value for name, value in metrics.items() if math.isfinite(value)}
