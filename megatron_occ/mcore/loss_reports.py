"""Loss reports of micro-batches, joined over a mini-batch and all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_occ.losses.calibration import CalibrationSums
from megatron_occ.losses.heads import LossReport
from megatron_occ.mcore.layout import Layout


def join_reports(reports: Sequence[LossReport], layout: Layout) -> LossReport:
    """Sums, and maxima, over micro-batches and data-parallel ranks, known to all stages.

    Args:
        reports: of this rank's micro-batches; empty on all pipeline stages but the last.
        layout: this rank's place.
    """
    summed = None
    if layout.is_last_stage:
        maxima = _largest([report.maxima for report in reports], layout)
        # micro-batches of the policy and of the head alone report different things
        names = sorted({name for report in reports for name in report.metrics})
        total = torch.zeros(len(names), dtype=torch.float64, device=layout.device)
        for place, name in enumerate(names):
            parts = [r.metrics[name].double() for r in reports if name in r.metrics]
            total[place] = torch.stack(parts).sum()
        sums = [r.calibration for r in reports if r.calibration is not None]
        if sums:
            total = torch.cat((total, sum(sums[1:], sums[0]).to_tensor().to(total)))
        layout.all_reduce_data_parallel(total)
        if layout.pipeline_size > 1:
            total = total.cpu()
            maxima = {name: value.cpu() for name, value in maxima.items()}
        summed = names, total, maxima
    names, total, maxima = layout.share_last_stage(summed)
    rest = total[len(names) :]
    calibration = CalibrationSums.from_tensor(rest) if rest.numel() else None
    return LossReport(dict(zip(names, total, strict=False)), calibration, maxima)


def _largest(maxima: Sequence[dict[str, Tensor]], layout: Layout) -> dict[str, Tensor]:
    """The largest of micro-batches and data-parallel ranks."""
    found = {}
    for name in sorted({name for each in maxima for name in each}):
        value = torch.stack([each[name] for each in maxima if name in each]).amax(0).double()
        found[name] = layout.all_reduce_data_parallel(value, maximum=True)
    return found
