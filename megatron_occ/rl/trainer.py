"""Reinforcement learning with verifiable rewards, in the terms of NeMo-Aligner's GRPO trainer.

``fit`` reads top to bottom: roll out, compute old log-probs, update, validate, save.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_occ.config.schema import Config
from megatron_occ.losses import shift_to_source
from megatron_occ.losses.calibration import CalibrationSums
from megatron_occ.losses.heads import JointTargets, Normalizers
from megatron_occ.losses.joint import JointLoss, PolicySettings, calibration_report
from megatron_occ.observe.metrics import MetricsLogger, RolloutLog
from megatron_occ.observe.progress import Progress, Timers
from megatron_occ.rl.batch import RolloutBatch, joint_targets
from megatron_occ.rl.calibration import CoefficientTracker, to_device
from megatron_occ.rl.interfaces import Actor, Collectives
from megatron_occ.rl.rollouts import RolloutSource

SHOWN = {"reward": "reward/mean", "accuracy": "rollout/accuracy", "entropy": "entropy"}


class GRPOTrainer:
    """The RL loop over an :class:`~megatron_occ.rl.interfaces.Actor`.

    Args:
        config: the run's configuration.
        actor: the policy.
        rollouts: draws prompts and samples responses.
        validate: returns validation metrics of the current policy.
        logger: of metrics and events.
        rollout_log: of sampled responses.
        save: writes a checkpoint of the given finished step.
    """

    def __init__(
        self,
        config: Config,
        actor: Actor,
        rollouts: RolloutSource,
        *,
        validate: Callable[[], dict[str, float]],
        logger: MetricsLogger,
        rollout_log: RolloutLog,
        save: Callable[[int], None],
    ) -> None:
        self.config, self.actor, self.rollouts = config, actor, rollouts
        self.validate, self.logger, self.rollout_log, self.save = (
            validate,
            logger,
            rollout_log,
            save,
        )
        self.coefficients = CoefficientTracker(config.mtp)
        self.loss = JointLoss(_policy_settings(config), self.coefficients.regime)
        self.timers = Timers()
        self.step = 0
        self._logged_at = time.perf_counter()

    def fit(self) -> None:
        """Run the remaining steps."""
        rl, layout = self.config.rl, self.actor.layout
        self._logged_at = time.perf_counter()
        if self.step == 0:
            self.run_validation()
        with Progress(rl.steps, "rl", self.step, enabled=layout.is_main) as progress:
            while self.step < rl.steps:
                metrics = self.run_step()
                self.step += 1
                self._log(metrics)
                progress.update(self.step, _shown(metrics))
                if self.step == rl.steps or _is_due(self.step, rl.validation.every):
                    self.run_validation()
                if self.step == rl.steps or _is_due(self.step, rl.save_every):
                    with self.timers("save"):
                        self.save(self.step)

    def run_step(self) -> dict[str, float]:
        """One rollout step with its updates; returns metrics."""
        failures = _Failures(self.rollouts.sampler.verifiers.counts)
        rollouts = self.rollouts.generate(self.timers)
        self._warn(rollouts.events)
        self.rollout_log.write(self.step + 1, rollouts.samples)
        with self.timers("logprobs"):
            batch = self.compute_logprobs(rollouts.batch)
        gap = self._logprob_gap(batch)
        with self.timers("train"):
            metrics = self.run_training(batch)
        return {**rollouts.metrics, **gap, **metrics, **failures.since(self.actor.layout)}

    def compute_logprobs(self, batch: RolloutBatch) -> RolloutBatch:
        """Add old log-probs, and those of the reference policy if it is used."""
        rl = self.config.rl
        arguments = {
            "micro_batch_size": rl.micro_batch_size,
            "temperature": rl.rollout.temperature,
        }
        old = self.actor.get_inference_log_probs(batch.ids, **arguments)
        reference = None
        if rl.loss.kl_coefficient > 0:
            reference = self.actor.get_init_policy_logprobs(batch.ids, **arguments)
        return batch.with_logprobs(old, reference)

    def run_training(self, batch: RolloutBatch) -> dict[str, float]:
        """One pass over the batch in mini-batches; returns their mean metrics."""
        size = len(batch) // self.config.rl.mini_batches
        updates = [self.run_update(mini_batch) for mini_batch in batch.split(size)]
        names = updates[0].keys()
        return {name: sum(update[name] for update in updates) / len(updates) for name in names}

    def run_update(self, mini_batch: RolloutBatch) -> dict[str, float]:
        """One optimizer update; returns its metrics."""
        rl, actor = self.config.rl, self.actor
        parts = mini_batch.split(rl.micro_batch_size)
        targets = [joint_targets(p, actor.num_depths, rl.loss.importance_cap) for p in parts]
        counts = torch.stack([Normalizers.count(target.mask) for target in targets]).sum(0)
        normalizers = Normalizers.from_counts(actor.layout.all_reduce_data_parallel(counts))
        regime = self.loss.regime
        micro_batches = self._micro_batches(
            parts,
            targets,
            passes=regime.passes if actor.num_depths else (),
            entropy=True,
            distance=regime.head if regime.head in ("soft_ce", "tv") else None,
        )

        def forward_sums() -> CalibrationSums:
            batches = self._micro_batches(parts, targets, passes=((False, False),))
            report = actor.get_loss_and_metrics(batches, calibration_report, forward_only=True)
            assert report.calibration is not None
            return report.calibration

        used = self.coefficients.before_update(forward_sums)
        weights = to_device(used, actor.layout.device)
        report = actor.get_loss_and_metrics(
            micro_batches,
            lambda outputs, target: self.loss(outputs, target, normalizers, weights),
        )
        step = actor.finish_training_step()
        metrics = {name: float(value) for name, value in report.metrics.items()}
        metrics.update(self.coefficients.after_update(report.calibration, used))
        self._warn(self.coefficients.pop_events())
        if metrics.pop("calibration/non_finite", 0.0):
            self._warn(["released lambda not finite in a micro-batch: using 0"])
        if step.skipped:
            self._warn(["gradient not finite: update skipped"])
        norms = {"grad_norm/trunk": step.trunk_norm, "grad_norm/head": step.head_norm}
        return {**metrics, **norms, "lr": step.lr}

    def _micro_batches(
        self,
        parts: list[RolloutBatch],
        targets: list[JointTargets],
        *,
        passes: tuple[tuple[bool, bool], ...],
        **wanted: Any,
    ) -> list[Any]:
        temperature = self.config.rl.rollout.temperature
        return [
            self.actor.micro_batch(p.ids, t, passes=passes, temperature=temperature, **wanted)
            for p, t in zip(parts, targets, strict=True)
        ]

    def run_validation(self) -> dict[str, float]:
        """Validate the current policy and log the result."""
        with self.timers("validation"):
            metrics = self.validate()
        self.logger.log("validation", self.step, metrics)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Position in the data and calibration state."""
        return {
            "step": self.step,
            "position": self.rollouts.position,
            "calibration": self.coefficients.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.step, self.rollouts.position = state["step"], state["position"]
        self.coefficients.load_state_dict(state["calibration"])

    def _logprob_gap(self, batch: RolloutBatch) -> dict[str, float]:
        """Difference between the log-probs of the rollout and of the training forward pass."""
        mask = shift_to_source(batch.response_mask, 0) > 0
        sampled = shift_to_source(batch.rollout_logprobs, 0)
        gap = torch.where(mask, (batch.old_logprobs - sampled).abs(), 0.0).double()
        layout = self.actor.layout
        total = layout.all_reduce_data_parallel(torch.stack((gap.sum(), mask.sum().double())))
        largest = layout.all_reduce_data_parallel(gap.max(), maximum=True)
        return {
            "logprob_gap/mean": float(total[0] / total[1].clamp(min=1)),
            "logprob_gap/max": float(largest),
        }

    def _log(self, metrics: dict[str, float]) -> None:
        times = self.timers.pop()
        tokens = metrics.pop("rollout/tokens")
        metrics["rollout/tokens_per_second"] = tokens / max(times["time/rollout"], 1e-9)
        metrics.update(times)
        # since the last line: validation and saving belong to the step that comes after them
        now = time.perf_counter()
        metrics["time/step"], self._logged_at = now - self._logged_at, now
        self.logger.log("rl", self.step, metrics)

    def _warn(self, events: list[str]) -> None:
        for event in events:
            self.logger.event(self.step + 1, event)


class _Failures:
    """Verifier failures of one step: the pool counts on, and validation uses it too."""

    def __init__(self, counts: dict[str, int]) -> None:
        self.counts, self.before = counts, dict(counts)

    def since(self, layout: Collectives) -> dict[str, float]:
        """Failures since the object was made, over data-parallel ranks."""
        here = [self.counts[name] - count for name, count in self.before.items()]
        total = torch.tensor(here, dtype=torch.float64, device=layout.device)
        values = layout.all_reduce_data_parallel(total).tolist()
        return {f"verifier/{n}": value for n, value in zip(self.before, values, strict=True)}


def _policy_settings(config: Config) -> PolicySettings:
    loss = config.rl.loss
    return PolicySettings(
        clip_low=loss.clip_low,
        clip_high=loss.clip_high,
        dual_clip=loss.dual_clip,
        aggregation=loss.aggregation,
        entropy_coefficient=loss.entropy_coefficient,
        kl_coefficient=loss.kl_coefficient,
        kl_kind=loss.kl_kind,
    )


def _shown(metrics: dict[str, float]) -> dict[str, float]:
    shown: dict[str, float | Tensor] = {name: metrics[key] for name, key in SHOWN.items()}
    if "lambda/mtp_1" in metrics:
        shown["lambda"] = metrics["lambda/mtp_1"]
    return shown


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
