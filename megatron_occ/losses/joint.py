"""The joint loss: the policy loss, what MTP sends into the trunk, and what trains its head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_occ.losses.alignment import shift_to_source, shift_to_tokens
from megatron_occ.losses.calibration import CalibrationSums, calibration_sums, released_coefficient
from megatron_occ.losses.head_loss import describe_heads, mean_distances
from megatron_occ.losses.heads import HeadOutputs, JointTargets, LossReport, Normalizers
from megatron_occ.losses.kl import kl_penalty, masked_sum
from megatron_occ.losses.policy import policy_loss
from megatron_occ.losses.regime import PolicySettings, Regime
from megatron_occ.losses.weighted import weighted_policy_loss

_METRIC_NAMES = {
    "clip_fraction_low": "clip_fraction/low",
    "clip_fraction_high": "clip_fraction/high",
    "dual_clip_fraction": "clip_fraction/dual",
    "ratio_sum": "ratio/mean",
    "approx_kl": "approx_kl",
}


@dataclass(frozen=True)
class JointLoss:
    """Loss of one micro-batch, to be summed over micro-batches and data-parallel ranks.

    Args:
        policy: settings of the policy loss.
        regime: what MTP does.
        max_response_length: tokens of the longest allowed response, for the released formula and
            the aggregation ``constant``.
    """

    policy: PolicySettings
    regime: Regime
    max_response_length: int | None = None

    def __call__(
        self,
        outputs: HeadOutputs,
        targets: JointTargets,
        normalizers: Normalizers,
        coefficients: Tensor | None = None,
        *,
        cut: bool = False,
    ) -> tuple[Tensor, LossReport]:
        """Compute loss and report.

        Args:
            outputs: of the model.
            targets: constants.
            normalizers: global counts.
            coefficients: lambda [K], with ``regime.trunk_weight=None`` unless the estimator is the
                released one.
            cut: the outputs are those of ``regime.cut_passes``: the trunk's MTP loss is reported
                alone.

        Returns:
            The scalar ``L_RL + (1/K) sum_k lambda_k L_k + (w/K) sum_k H_k`` (arXiv 2605.28184, with
            the head's own loss H added), and detached sums.
        """
        report = LossReport()
        loss = self._main_loss(outputs, targets, normalizers, report.metrics)
        if not outputs.passes:
            return loss, report
        depths = outputs.passes[0].size(0)
        report.calibration = _calibration(outputs, targets)
        if not self.regime.head_on_rollouts:
            describe_heads(outputs, targets.mask, normalizers, report.metrics)
        if self.regime.trunk != "none":
            losses = self.trunk_losses(outputs, targets, normalizers)
            for k, value in enumerate(losses.detach(), start=1):
                report.metrics[f"loss/trunk_mtp_{k}"] = value
            if cut:
                weights = torch.zeros_like(losses)
            else:
                weights = self._trunk_weights(outputs, targets, coefficients, depths)
            if self._is_released:
                weights = _answer_non_finite(weights, targets, normalizers, report.metrics)
            loss = loss + (weights.to(losses.dtype) * losses).sum()
        if self.regime.has_own_loss and not self.regime.head_on_rollouts:
            losses = self._head_losses(outputs, targets, normalizers)
            loss = loss + self.regime.head_weight * losses.mean()
        return loss, report

    def trunk_losses(
        self, outputs: HeadOutputs, targets: JointTargets, normalizers: Normalizers
    ) -> Tensor:
        """What MTP sends into the trunk with weight 1: the loss of each depth, [K]."""
        return self._depth_losses(self.regime.trunk, outputs.passes[0], targets, normalizers)

    @property
    def _is_released(self) -> bool:
        return self.regime.trunk_weight is None and self.regime.estimator == "released"

    def _main_loss(
        self,
        outputs: HeadOutputs,
        targets: JointTargets,
        normalizers: Normalizers,
        metrics: dict[str, Tensor],
    ) -> Tensor:
        mask, tokens = targets.mask[0], normalizers.tokens[0]
        loss, sums = self._policy_loss(outputs.logprobs, targets, normalizers, depth=0)
        metrics["loss/policy"] = loss.detach()
        count = normalizers.sequences[0] if self.policy.aggregation == "gspo" else tokens
        for name, total in sums.items():
            metrics[_METRIC_NAMES[name]] = total / count
        if outputs.entropy is not None:
            entropy = masked_sum(outputs.entropy, mask) / tokens
            metrics["entropy"] = entropy.detach()
            if self.policy.entropy_coefficient:
                loss = loss - self.policy.entropy_coefficient * entropy
        if targets.ref_logprobs is not None:
            kl = masked_sum(self._kl(outputs.logprobs, targets), mask) / tokens
            metrics["loss/kl"] = kl.detach()
            loss = loss + self.policy.kl_coefficient * kl
        return loss

    def _kl(self, logprobs: Tensor, targets: JointTargets) -> Tensor:
        policy, mask = self.policy, targets.mask[0]
        return kl_penalty(
            logprobs,
            targets.ref_logprobs,
            policy.kl_kind,
            input_clamp=policy.kl_input_clamp,
            output_clamp=policy.kl_output_clamp,
            old_logprobs=targets.old_logprobs[0] if policy.kl_importance else None,
            mask=mask,
        )

    def _policy_loss(
        self, logprobs: Tensor, targets: JointTargets, normalizers: Normalizers, depth: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        policy = self.policy
        head = policy.clipped_for_heads(self.regime.dual_clip)
        return policy_loss(
            logprobs,
            targets.old_logprobs[depth],
            targets.advantages,
            targets.mask[depth],
            policy.objective if depth == 0 else head,
            aggregation=policy.aggregation,
            importance_weights=_importance(targets, depth),
            normalizer=self._count(normalizers, depth),
        )

    def _count(self, normalizers: Normalizers, depth: int) -> Tensor:
        """What the aggregation divides a depth's policy loss by."""
        if self.policy.aggregation == "token":
            return normalizers.tokens[depth]
        sequences = normalizers.sequences[depth]
        if self.policy.aggregation != "constant":
            return sequences
        assert self.max_response_length is not None, "this aggregation divides by it"
        return sequences * self.max_response_length

    def _mtp_policy_loss(
        self, logprobs: Tensor, targets: JointTargets, normalizers: Normalizers, depth: int
    ) -> Tensor:
        regime = self.regime
        if regime.weighting == "ppo":
            return self._policy_loss(logprobs, targets, normalizers, depth)[0]
        return weighted_policy_loss(
            logprobs,
            targets.old_logprobs[depth],
            targets.advantages,
            targets.mask[depth],
            ratio_cap=regime.ratio_cap if regime.weighting == "truncated" else None,
            aggregation=self.policy.aggregation,
            importance_weights=_importance(targets, depth),
            normalizer=self._count(normalizers, depth),
        )

    def _trunk_weights(
        self, outputs: HeadOutputs, targets: JointTargets, coefficients: Tensor | None, depths: int
    ) -> Tensor:
        """Weight of each depth's loss, [K]; it scales the loss, so the clipped side never flips."""
        device = outputs.logprobs.device
        if self.regime.trunk_weight is not None:
            return torch.full((depths,), self.regime.trunk_weight / depths, device=device)
        if self._is_released:
            assert self.max_response_length is not None, "the released formula divides by it"
            raw = released_coefficient(
                *token_aligned(outputs, targets),
                max_response_length=self.max_response_length,
                factor=self.regime.lambda_plus,
            )
            # its 1/K is part of the formula
            return raw if self.regime.clamp == (None, None) else raw.clamp(*self.regime.clamp)
        assert coefficients is not None, "OCC needs the coefficients of this mini-batch"
        return coefficients.to(device) / depths

    def _depth_losses(
        self, signal: str, logprobs: Tensor, targets: JointTargets, normalizers: Normalizers
    ) -> Tensor:
        """Loss of each depth, [K]."""
        depths = range(logprobs.size(0))
        if signal == "policy":
            losses = [
                self._mtp_policy_loss(logprobs[k], targets, normalizers, k + 1) for k in depths
            ]
        else:
            losses = [
                -masked_sum(logprobs[k], targets.mask[k + 1]) / normalizers.tokens[k + 1]
                for k in depths
            ]
        return torch.stack(losses)

    def _head_losses(
        self, outputs: HeadOutputs, targets: JointTargets, normalizers: Normalizers
    ) -> Tensor:
        if self.regime.head in ("ce", "policy"):
            return self._depth_losses(self.regime.head, outputs.passes[-1], targets, normalizers)
        return mean_distances(outputs, targets.mask, normalizers)


def calibration_report(outputs: HeadOutputs, targets: JointTargets) -> tuple[Tensor, LossReport]:
    """Calibration sums alone, for a forward pass ahead of the update; the loss is 0."""
    return outputs.logprobs.new_zeros(()), LossReport(calibration=_calibration(outputs, targets))


def _importance(targets: JointTargets, depth: int) -> Tensor | None:
    """Importance weights in a depth's frame."""
    weights = targets.importance_weights
    if weights is None or depth == 0:
        return weights
    return shift_to_source(weights, depth - 1, fill=1.0)


def _calibration(outputs: HeadOutputs, targets: JointTargets) -> CalibrationSums:
    return calibration_sums(*token_aligned(outputs, targets))


def token_aligned(
    outputs: HeadOutputs, targets: JointTargets
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Detached l [b, s], o [b, s], m_k [K, b, s] and w_k [K, b, s], entry t about token x_t."""
    return (
        shift_to_tokens(outputs.logprobs.detach(), 0),
        shift_to_tokens(targets.old_logprobs[0], 0),
        _each_to_tokens(outputs.passes[0].detach()),
        _each_to_tokens(targets.mask[1:]),
    )


def _each_to_tokens(values: Tensor) -> Tensor:
    """[K, b, s] of depths 1..K, source frame, to token frame."""
    return torch.stack([shift_to_tokens(depth, k) for k, depth in enumerate(values, start=1)])


def _answer_non_finite(
    weights: Tensor, targets: JointTargets, normalizers: Normalizers, metrics: dict[str, Tensor]
) -> Tensor:
    """Replace non-finite weights [K] of this micro-batch by 0, count them, and log the weights."""
    finite = torch.isfinite(weights)
    weights = torch.where(finite, weights, 0.0)
    share = targets.mask[1:].sum((1, 2)) / normalizers.tokens[1:]
    # logged without the formula's 1/K, as lambda is everywhere else
    for k, weight in enumerate(weights * share * len(weights), start=1):
        metrics[f"lambda/mtp_{k}"] = weight
    metrics["calibration/non_finite"] = (~finite).sum()
    return weights
