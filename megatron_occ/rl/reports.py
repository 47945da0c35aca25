"""From an update's report to metrics, with one transfer from the device."""

from __future__ import annotations

import torch

from megatron_occ.losses.calibration import CalibrationSums
from megatron_occ.losses.heads import LossReport
from megatron_occ.rl.interfaces import StepReportLike

SKIPPED = "gradient not finite: update skipped"


def on_host(report: LossReport) -> LossReport:
    """The same report in float64 on the CPU: the host waits for the device once, here."""
    single = [*report.metrics.values(), *report.maxima.values()]
    values = [value.detach().double().reshape(1) for value in single]
    if report.calibration is not None:
        values.append(report.calibration.to_tensor().double())
    numbers = torch.cat(values).cpu()
    metrics = dict(zip(report.metrics, numbers, strict=False))
    maxima = dict(zip(report.maxima, numbers[len(metrics) :], strict=False))
    rest = numbers[len(single) :]
    sums = CalibrationSums.from_tensor(rest) if len(rest) else None
    return LossReport(metrics, sums, maxima)


def update_metrics(report: LossReport, step: StepReportLike) -> dict[str, float]:
    """Metrics of a report that is :func:`on_host`, and those of the optimizer's step."""
    found = {**report.metrics, **report.maxima}
    metrics = {name: float(value) for name, value in found.items()}
    norms = {"grad_norm/trunk": step.trunk_norm, "grad_norm/head": step.head_norm}
    return {**metrics, **norms, "lr": step.lr, "update/skipped": float(step.skipped)}
