"""What trains and describes the MTP head by itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_occ.losses.heads import HeadOutputs, HeadTargets, LossReport, Normalizers
from megatron_occ.losses.kl import masked_sum


@dataclass(frozen=True)
class HeadLoss:
    """Loss of the head on trunk states that rollouts left, next to the policy's own micro-batches.

    Args:
        weight: of the loss, averaged over depths.
    """

    weight: float

    def __call__(
        self, outputs: HeadOutputs, targets: HeadTargets, normalizers: Normalizers
    ) -> tuple[Tensor, LossReport]:
        """Compute loss and report of one micro-batch, to be summed over them and over ranks.

        Args:
            outputs: of the model, with distances.
            targets: which entries count.
            normalizers: global counts of these entries.

        Returns:
            The scalar ``(w/K) sum_k H_k``, H_k the mean distance of depth k, and detached sums.
        """
        report = LossReport()
        describe_heads(outputs, targets.mask, normalizers, report.metrics)
        losses = mean_distances(outputs, targets.mask, normalizers)
        return self.weight * losses.mean(), report


def mean_distances(outputs: HeadOutputs, mask: Tensor, normalizers: Normalizers) -> Tensor:
    """This micro-batch's part of each depth's mean distance to the main head, [K].

    Args:
        outputs: of the model, with distances.
        mask: [1+K, b, s].
        normalizers: global counts.
    """
    assert outputs.distance is not None, "the model was not asked for distances"
    pairs = enumerate(outputs.distance, start=1)
    means = [masked_sum(d, mask[k]) / normalizers.tokens[k] for k, d in pairs]
    return torch.stack(means)


def describe_heads(
    outputs: HeadOutputs, mask: Tensor, normalizers: Normalizers, metrics: dict[str, Tensor]
) -> None:
    """Add each depth's cross-entropy, and its agreement with and distance to the main head.

    Args:
        outputs: of the model.
        mask: [1+K, b, s].
        normalizers: global counts.
        metrics: ``loss/mtp_k``, ``agreement/mtp_k`` and ``loss/head_mtp_k`` are added, the last
            two where the model was asked for them.
    """
    for k, logprobs in enumerate(outputs.passes[-1].detach(), start=1):
        tokens = normalizers.tokens[k]
        metrics[f"loss/mtp_{k}"] = -masked_sum(logprobs, mask[k]) / tokens
        if outputs.agreement is not None:
            metrics[f"agreement/mtp_{k}"] = masked_sum(outputs.agreement[k - 1], mask[k]) / tokens
        if outputs.distance is not None:
            distance = outputs.distance[k - 1].detach()
            metrics[f"loss/head_mtp_{k}"] = masked_sum(distance, mask[k]) / tokens
