"""Pretraining loss: next-token cross-entropy, and that of every MTP depth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_occ.losses.heads import HeadOutputs, LossReport, Normalizers


@dataclass(frozen=True)
class PretrainLoss:
    """``CE_0 + (w/K) sum_k CE_k`` (DeepSeek-V3, arXiv 2412.19437, equations 24 and 25).

    Args:
        mtp_weight: w.
    """

    mtp_weight: float

    def __call__(
        self, outputs: HeadOutputs, mask: Tensor, normalizers: Normalizers
    ) -> tuple[Tensor, LossReport]:
        """Loss of one micro-batch, to be summed over micro-batches and data-parallel ranks.

        Args:
            outputs: of the model, one MTP pass or none.
            mask: [1+K, b, s] 1.0 where the head's target counts, source frame.
            normalizers: global counts.
        """
        heads = [outputs.logprobs, *(outputs.passes[0] if outputs.passes else ())]
        losses = [
            -torch.where(mask[k] > 0, logprobs, 0.0).sum() / normalizers.tokens[k]
            for k, logprobs in enumerate(heads)
        ]
        report = LossReport({"loss/main": losses[0].detach()})
        for k, loss in enumerate(losses[1:], start=1):
            report.metrics[f"loss/mtp_{k}"] = loss.detach()
            agreed = torch.where(mask[k] > 0, outputs.agreement[k - 1], 0.0).sum()
            report.metrics[f"agreement/mtp_{k}"] = agreed / normalizers.tokens[k]
        if len(losses) == 1:
            return losses[0], report
        return losses[0] + self.mtp_weight * torch.stack(losses[1:]).mean(), report
