"""One optimizer update of the policy: constants, normalisers, lambda, loss, step."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_occ.config.schema import Config
from megatron_occ.config.schema_loss import PolicyLossConfig
from megatron_occ.config.validate_exact import measures_gradients
from megatron_occ.losses import shift_to_source
from megatron_occ.losses.calibration import CalibrationSums
from megatron_occ.losses.head_loss import HeadLoss
from megatron_occ.losses.heads import (
    HeadOutputs,
    HeadTargets,
    JointTargets,
    LossReport,
    Normalizers,
)
from megatron_occ.losses.joint import JointLoss, calibration_report
from megatron_occ.losses.objectives import Cispo, Clipped, Dppo, Objective, Sapo
from megatron_occ.losses.regime import PolicySettings
from megatron_occ.rl.batch import MiniBatch, consecutive, masks_at_source
from megatron_occ.rl.calibration import CoefficientTracker, to_device
from megatron_occ.rl.exact import ExactTracker
from megatron_occ.rl.head_rows import HeadBatch, HeadRows
from megatron_occ.rl.interfaces import Actor, LossFunction, StepReportLike
from megatron_occ.rl.prepared import PreparedBatch, count_targets
from megatron_occ.rl.reports import SKIPPED, on_host, update_metrics
from megatron_occ.rl.selection import with_top_entropy

_GAP_MEAN, _GAP_MAX = "logprob_gap/mean", "logprob_gap/max"


@dataclass(frozen=True)
class Update:
    """Metrics of an update over all ranks, and what went wrong in it, one line each.

    ``gap`` holds the metrics of :meth:`PolicyUpdater.logprob_gap` where this update measured them.
    ``skipped``: its gradient was not finite, and the weights are what they were.
    """

    metrics: dict[str, float]
    events: list[str]
    gap: dict[str, float]
    skipped: bool = False


class PolicyUpdater:
    """Updates a policy on mini-batches; lambda is its only state from step to step.

    Args:
        config: the run's configuration.
        actor: the policy.
    """

    def __init__(self, config: Config, actor: Actor) -> None:
        self.config, self.actor = config, actor
        self.coefficients = CoefficientTracker(config.mtp)
        self.exact: ExactTracker | None = None
        if measures_gradients(config.mtp):
            self.exact = ExactTracker(config.mtp, actor.gradient_space, config.seed)
        self.loss = JointLoss(
            policy_settings(config),
            self.coefficients.regime,
            config.rl.rollout.max_response_length,
        )
        self.head_loss = HeadLoss(self.coefficients.regime.head_weight)
        self.reuses_rollout = config.rl.old_logprobs == "rollout"
        # of whole prompts, that a mini-batch is cut into
        self.parts = 1 if self.exact is None else self.exact.parts
        self._gap_is_due = False

    def compute_logprobs(self, mini_batches: Sequence[MiniBatch]) -> list[MiniBatch]:
        """Add old log-probs, and those of the reference policy if it is used.

        The forward passes have the micro-batches that the updates will have. With
        ``rl.old_logprobs=rollout`` old log-probs are those that the rollout sampled with.
        """
        rl = self.config.rl
        self._gap_is_due = self.reuses_rollout
        if self.reuses_rollout and rl.loss.kl_coefficient == 0:
            return [mini.with_logprobs(_sampled(mini), None) for mini in mini_batches]
        ids = torch.cat([mini.rows.ids for mini in mini_batches])
        packed = mini_batches[0].lengths is not None
        arguments = {
            "parts": consecutive(size for mini in mini_batches for size in mini.sizes),
            "lengths": [n for mini in mini_batches for n in mini.lengths or ()] if packed else None,
            "temperature": rl.rollout.temperature,
            "masks": _joined(masks_at_source(mini.rows) for mini in mini_batches),
        }
        entropies, share = None, rl.loss.top_entropy
        # the reference policy is another model: its routers choose
        replayed: dict[str, Any] = {"routes": _joined(mini.rows.routes for mini in mini_batches)}
        recorded: list[torch.Tensor] = []
        if rl.routing_replay == "training":
            replayed["recorded"] = recorded
        if self.reuses_rollout:
            old = torch.cat([_sampled(mini) for mini in mini_batches])
        elif share < 1:
            old, entropies = self.actor.get_inference_log_probs(
                ids, **arguments, **replayed, entropies=True
            )
        else:
            old = self.actor.get_inference_log_probs(ids, **arguments, **replayed)
        reference = None
        if rl.loss.kl_coefficient > 0:
            reference = self.actor.get_init_policy_logprobs(ids, **arguments)
        spans = consecutive(len(mini.rows) for mini in mini_batches)
        scored = [
            mini.with_logprobs(
                old[span.start : span.stop],
                None if reference is None else reference[span.start : span.stop],
            )
            for mini, span in zip(mini_batches, spans, strict=True)
        ]
        for routes in recorded:
            scored = [
                mini.with_routes(routes[span.start : span.stop])
                for mini, span in zip(scored, spans, strict=True)
            ]
        if entropies is None:
            return scored
        return [
            with_top_entropy(mini, entropies[span.start : span.stop], share, self.actor.layout)
            for mini, span in zip(scored, spans, strict=True)
        ]

    def logprob_gap(self, mini_batches: Sequence[MiniBatch]) -> dict[str, float]:
        """Difference between the log-probs of the rollout and of the training forward pass."""
        gaps, count = [], 0
        for mini in mini_batches:
            mask = shift_to_source(mini.rows.response_mask, 0) > 0
            difference = (mini.rows.old_logprobs - _sampled(mini)).abs()
            gaps.append(torch.where(mask, difference, 0.0).double())
            count = count + mask.sum().double()
        gap, layout = torch.cat(gaps), self.actor.layout
        total = layout.all_reduce_data_parallel(torch.stack((gap.sum(), count)))
        largest = layout.all_reduce_data_parallel(gap.max(), maximum=True)
        return {
            _GAP_MEAN: float(total[0] / total[1].clamp(min=1)),
            _GAP_MAX: float(largest),
        }

    def run_update(self, mini_batch: MiniBatch, head: HeadRows | None = None) -> Update:
        """One optimizer update.

        Args:
            mini_batch: from :meth:`compute_logprobs`.
            head: responses with trunk states that train the head in this update, see
                ``mtp.head.states``.

        Where the old log-probs are the rollout's, the first update after that also tells how far
        the training forward pass is from them: the weights have not moved yet.
        """
        measures_gap, self._gap_is_due = self._gap_is_due, False
        prepared = PreparedBatch(self.config, self.actor, mini_batch)
        head_parts = self._head_batches(head)
        head_normalizers = count_targets(self.actor, head_parts) if head_parts else None
        used = self._coefficients(prepared)
        weights = to_device(used, self.actor.layout.device)
        is_due = self.exact is not None and self.exact.is_due
        cut = is_due or self._is_idle(used)

        def loss(
            outputs: HeadOutputs, targets: JointTargets | HeadTargets
        ) -> tuple[torch.Tensor, LossReport]:
            if isinstance(targets, HeadTargets):
                return self.head_loss(outputs, targets, head_normalizers)
            counts = prepared.normalizers
            value, report = self.loss(outputs, targets, counts, weights, cut=cut)
            if measures_gap:
                _add_gap(report, outputs, targets, counts)
            return value, report

        # the policy's come last: gradients may be reduced while the last micro-batch goes backward
        head_batches = [part.for_actor(self.actor, self.config) for part in head_parts]
        if is_due:
            report, step = self._measured_step(prepared, head_batches, loss)
        else:
            batches = head_batches + self._for_training(prepared, cut=cut)
            balanced = self.config.rl.balance_loss > 0 and prepared.teaches_policy()
            report = self.actor.get_loss_and_metrics(batches, loss, balanced=balanced)
            step = self.actor.finish_training_step()
        # of all ranks already, as the report is by now
        report.metrics.update(prepared.metrics)
        report = on_host(report)
        metrics = update_metrics(report, step) | self.actor.pop_routing_metrics()
        metrics.update(self.coefficients.after_update(report.calibration, used))
        events = self.coefficients.pop_events()
        if self.exact is not None:
            metrics.update(self.exact.after_update())
            events += self.exact.pop_events()
        if metrics.pop("calibration/non_finite", 0.0):
            events.append("released lambda not finite in a micro-batch: using 0")
        if step.skipped:
            events.append(SKIPPED)
        names = (_GAP_MEAN, _GAP_MAX) if measures_gap else ()
        gap = {name: metrics.pop(name) for name in names}
        return Update(metrics, events, gap, step.skipped)

    def state_dict(self) -> dict[str, Any]:
        """State of the calibration."""
        return (self.exact or self.coefficients).state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        (self.exact or self.coefficients).load_state_dict(state)

    def _coefficients(self, prepared: PreparedBatch) -> torch.Tensor | None:
        """Lambda [K] of the loss; None where the regime's weight is fixed, or the released one."""
        if self.exact is not None:
            return self.exact.current
        return self.coefficients.before_update(lambda: self._forward_sums(prepared))

    def _measured_step(
        self, prepared: PreparedBatch, head_batches: list[Any], loss: LossFunction
    ) -> tuple[LossReport, StepReportLike]:
        """The update of a mini-batch whose gradients are taken apart, see ``ExactTracker``."""
        assert self.exact is not None, "there is nothing to measure"
        *parts, last = range(prepared.num_parts)
        reports = []
        for part in parts:
            depths = self._depth_gradients(prepared, part)
            batches = self._for_training(prepared, cut=True, part=part)
            main, report = self.actor.get_gradient(batches, loss, head=True, counts=True)
            self.exact.add_part(main, depths)
            reports.append(report)
        depths = self._depth_gradients(prepared, last)
        batches = head_batches + self._for_training(prepared, cut=True, part=last)
        reports.append(self.actor.get_loss_and_metrics(batches, loss))
        step = self.actor.finish_training_step(functools.partial(self.exact.mix, depths))
        return sum(reports[1:], reports[0]), step

    def _depth_gradients(self, prepared: PreparedBatch, part: int) -> list[Any]:
        """Gradients of what MTP sends into the trunk, by depth, each with weight 1."""
        regime, overlaps = self.loss.regime, self.config.parallel.overlap_grad_reduce
        shares_loss = regime.trains_head and not regime.has_own_loss

        def loss(depth: int, *given: Any) -> tuple[torch.Tensor, LossReport]:
            losses = self.loss.trunk_losses(*given)
            # an overlapped reduction waits for the gradient of every parameter
            return losses[depth] + (0.0 * losses.sum() if overlaps else 0.0), LossReport()

        wanted = {"head": shares_loss, "part": part, "main_head": False}
        passes = ((True, shares_loss or overlaps),)
        return [
            prepared.gradient(functools.partial(loss, depth), passes, **wanted)[0]
            for depth in range(self.actor.num_depths)
        ]

    def _is_idle(self, used: torch.Tensor | None) -> bool:
        """Whether the trunk's MTP loss has the weight 0 and a pass to itself."""
        regime = self.loss.regime
        if used is None or regime.trunk == "none" or not regime.has_own_loss:
            return False
        if regime.head_on_rollouts and self.exact is None:
            # the only MTP pass: the next lambda comes from it
            return False
        return not bool(used.any())

    def _head_batches(self, rows: HeadRows | None) -> list[HeadBatch]:
        if rows is None:
            return []
        return list(rows.batches(self.config.rl, self.actor.num_depths, self.actor.layout.device))

    def _forward_sums(self, prepared: PreparedBatch) -> CalibrationSums:
        """Calibration sums of the mini-batch by a forward pass of its own."""
        batches = prepared.micro_batches(passes=((False, False),))
        report = self.actor.get_loss_and_metrics(batches, calibration_report, forward_only=True)
        assert report.calibration is not None
        return report.calibration

    def _for_training(
        self, prepared: PreparedBatch, *, cut: bool, part: int | None = None
    ) -> list[Any]:
        regime = self.loss.regime
        return prepared.micro_batches(
            part,
            passes=regime.cut_passes if cut else regime.passes,
            entropy=True,
            distance=regime.distance,
            leaks=regime.leaks,
        )


def _joined(parts: Iterable[torch.Tensor | None]) -> torch.Tensor | None:
    """Rows of all mini-batches as one tensor; None where they have none."""
    parts = list(parts)
    return None if parts[0] is None else torch.cat(parts)


def _sampled(mini_batch: MiniBatch) -> torch.Tensor:
    """Log-probs of the rollout, source frame."""
    return shift_to_source(mini_batch.rows.rollout_logprobs, 0)


def _add_gap(
    report: LossReport, outputs: HeadOutputs, targets: JointTargets, normalizers: Normalizers
) -> None:
    difference = (outputs.logprobs.detach() - targets.old_logprobs[0]).abs().double()
    gap = torch.where(targets.mask[0] > 0, difference, 0.0)
    report.metrics[_GAP_MEAN] = gap.sum() / normalizers.tokens[0]
    report.maxima[_GAP_MAX] = gap.max()


def policy_settings(config: Config) -> PolicySettings:
    """Settings of the policy loss from section ``rl.loss``."""
    loss = config.rl.loss
    return PolicySettings(
        objective=_objective(loss),
        aggregation=loss.aggregation,
        entropy_coefficient=loss.entropy_coefficient,
        kl_coefficient=loss.kl_coefficient,
        kl_kind=loss.kl_kind,
        kl_importance=loss.kl_importance,
        kl_input_clamp=loss.kl_input_clamp,
        kl_output_clamp=loss.kl_output_clamp,
    )


def _objective(loss: PolicyLossConfig) -> Objective:
    if loss.kind == "cispo":
        return Cispo(loss.clip_low, loss.clip_high)
    if loss.kind == "sapo":
        return Sapo(loss.tau_positive, loss.tau_negative)
    if loss.kind == "dppo":
        return Dppo(loss.divergence_limit, loss.divergence)
    return Clipped(loss.clip_low, loss.clip_high, loss.dual_clip)
