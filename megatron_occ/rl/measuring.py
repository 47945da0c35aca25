"""What an audit measures in a mini-batch: gradients taken apart, and their inner products."""

from __future__ import annotations

from collections import deque
from typing import Any

from megatron_occ.audit.recorder import products_of_sample
from megatron_occ.audit.signals import SIGNALS, SignalLoss, policy_gradient, tail
from megatron_occ.config.schema import Config
from megatron_occ.losses.calibration import CalibrationSums, coefficient_from_sums
from megatron_occ.losses.calibrator import UNMOVED
from megatron_occ.rl.batch import MiniBatch
from megatron_occ.rl.interfaces import Actor
from megatron_occ.rl.prepared import PreparedBatch
from megatron_occ.rl.update import policy_settings

METRICS = ("euclidean", "adam")
# earlier mini-batches that each is paired with, where nothing else is asked for
WINDOW = 8


class Measuring:
    """Gradients of RL and of all signals in successive mini-batches, multiplied with each other.

    Args:
        config: of the run.
        actor: the policy; its optimizer has made an update, on whose moments Adam's metric stands.
        window: mini-batches of earlier rounds that each is paired with. Those of its own round are
            left out: updates lie between them, and an update along -g_0 alone makes the next g_0
            smaller in that direction, by an amount that grows with the noise.
    """

    def __init__(self, config: Config, actor: Actor, window: int) -> None:
        self._config, self._actor = config, actor
        policy, length = policy_settings(config), config.rl.rollout.max_response_length
        self._main = policy_gradient(policy, length)
        self.signals = [
            {"name": name, "depth": depth}
            for name in SIGNALS
            for depth in range(1, actor.num_depths + 1)
        ]
        self._losses = [
            SignalLoss(policy, SIGNALS[signal["name"]], signal["depth"] - 1, length)
            for signal in self.signals
        ]
        self._kept: deque[tuple[int, list[Any]]] = deque(maxlen=window)
        self._round: list[tuple[int, list[Any]]] = []
        self._count = 0

    def end_round(self) -> None:
        """Let the mini-batches since the last call be paired with those that come."""
        self._kept.extend(self._round)
        self._round = []

    def measure(self, mini_batch: MiniBatch) -> dict[str, Any]:
        """Figures of a mini-batch with old log-probs; weights and optimizer stay as they are."""
        prepared = PreparedBatch(self._config, self._actor, mini_batch)
        # the bonus is part of RL's loss
        bonus = self._config.rl.loss.entropy_coefficient != 0
        main, _ = prepared.gradient(self._main, (), entropy=bonus)
        gradients, tails, released, sums = [main], [], [], None
        for loss in self._losses:
            gradient, report = prepared.gradient(loss, ((True, False),))
            gradients.append(gradient)
            tails.append(tail(report.metrics))
            released.append(float(report.metrics["released"]))
            sums = report.calibration
        assert sums is not None, "an audit has signals"
        counts = prepared.normalizers
        sample = {
            "sequences": int(counts.sequences[0]),
            "tokens": int(counts.tokens[0]),
            "tails": tails,
            "proxies": self._proxies(sums, released),
        }
        sample |= self._products(gradients)
        self._round.append((self._count, gradients))
        self._count += 1
        return sample

    def _products(self, gradients: list[Any]) -> dict[str, Any]:
        """Within the mini-batch, and with each kept one, in both metrics."""
        others = [gradient for _, kept in self._kept for gradient in kept]
        numbers = [number for number, _ in self._kept]
        same: dict[str, Any] = {}
        cross: dict[str, Any] = {}
        for metric in METRICS:
            found = self._actor.gradient_space.products(gradients, [*gradients, *others], metric)
            same[metric], cross[metric] = products_of_sample(found, numbers)
        return {"same": same, "cross": cross}

    def _proxies(
        self, sums: CalibrationSums, released: list[float]
    ) -> dict[str, list[float | None]]:
        """The paper's and the released coefficient; None where the policy had not moved."""
        sums = CalibrationSums.from_tensor(sums.to_tensor().cpu())
        has_moved = sums.moved > UNMOVED * sums.count
        values = coefficient_from_sums(sums, lambda_plus=1.0)
        by_depth = [
            float(value) if moved and value.isfinite() else None
            for value, moved in zip(values, has_moved, strict=True)
        ]
        paper = [by_depth[signal["depth"] - 1] for signal in self.signals]
        pairs = zip(paper, released, strict=True)
        return {"logprob": paper, "released": [r if p is not None else None for p, r in pairs]}
