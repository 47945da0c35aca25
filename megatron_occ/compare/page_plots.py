"""The plots of a study's page: intervals of differences, and curves with bands over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_occ.compare import statistics
from megatron_occ.compare.analysis import MAIN, Arm, Comparison, Difference, Outcome
from megatron_occ.compare.results import CURVES
from megatron_occ.compare.wording import amount, interval_text, p_text, ranked
from megatron_occ.observe.plot import Series, plot_series_svg
from megatron_occ.observe.plot_intervals import IntervalRow, plot_intervals_svg
from megatron_occ.observe.text import escape, format_number, format_percent

# colours say how an arm compares: above, below, or open; grey is the reference
VERDICT_COLORS = {"above": 3, "below": 2, "open": 1}
_REFERENCE_COLOR = 7
_TITLES = {
    "reward/mean": "Reward",
    "entropy": "Entropy",
    "draft/acceptance_length": "Acceptance length",
    "agreement/mtp_1": "MTP agreement",
    "grad_norm/trunk": "Gradient norm of the trunk",
}
_PERCENT = ("agreement/mtp_1",)


def forest_card(comparison: Comparison, outcome: Outcome) -> str:
    """The paired differences of an outcome, largest first; "" if there are none."""
    found = comparison.differences.get(outcome.name, [])
    if not found:
        return ""
    frames = "".join(
        f'<div class="frame {kind}">{_forest(comparison, outcome, found, width)}</div>'
        for kind, width in (("broad", 1016), ("narrow", 480))
    )
    return f'<figure class="card wide"><h3>{escape(_capital(outcome.title))}</h3>{frames}</figure>'


def _forest(comparison: Comparison, outcome: Outcome, found: list[Difference], width: int) -> str:
    unit = "points of " if outcome.percent else ""
    reference = comparison.reference.name
    return plot_intervals_svg(
        [_forest_row(d, outcome, with_text=width > 600) for d in found],
        title=f"{outcome.title}: difference to {reference}",
        x_label=f"{unit}{outcome.title} more than {reference}",
        width=width,
        percent=outcome.percent,
    )


def _forest_row(difference: Difference, outcome: Outcome, with_text: bool) -> IntervalRow:
    text = amount(difference.mean, outcome.percent)
    if difference.interval is not None:
        text += f" {interval_text(difference, outcome.percent)}"
        text += f"  p {p_text(difference.p)}, of all {p_text(difference.p_of_all)}"
    return IntervalRow(
        label=difference.arm,
        mean=difference.mean,
        interval=difference.interval,
        values=list(difference.by_seed.values()),
        color=VERDICT_COLORS[difference.verdict],
        text=text if with_text else "",
    )


def learning_curves(comparison: Comparison) -> str:
    """pass@1 of each arm over steps, with that of the reference, all on the same axes."""
    curves = {name: _validation_curve(comparison.arms[name]) for name in ranked(comparison)}
    curves = {name: curve for name, curve in curves.items() if curve}
    if not curves:
        return ""
    ends = [y for curve in curves.values() for _, low, high in curve for y in (low, high)]
    y_range = min(ends), max(ends)
    cards = [
        _curve_card(comparison, name, curves, y_range)
        for name in curves
        if name != comparison.reference.name or len(curves) == 1
    ]
    return f'<div class="multiples">{"".join(cards)}</div>'


def arm_curves(comparison: Comparison, name: str) -> str:
    """The other metrics of an arm over steps, beside those of the reference."""
    arm, cards = comparison.arms[name], []
    lambdas = sorted({n for run in arm.finished() for n in run["curves"] if n not in CURVES})
    for metric in (*CURVES, *lambdas):
        series = _against_reference(comparison, arm, metric)
        if not series:
            continue
        title = _TITLES.get(metric, f"Lambda of depth {metric.rpartition('_')[2]}")
        svg = plot_series_svg(
            series,
            title=f"{title}, {name}",
            x_label="RL step",
            width=340,
            height=170,
            percent=metric in _PERCENT,
        )
        legend = _legend(series, metric in _PERCENT)
        cards.append(f'<figure class="card"><h3>{escape(title)}</h3>{legend}{svg}</figure>')
    return f'<div class="multiples">{"".join(cards)}</div>' if cards else ""


def _against_reference(comparison: Comparison, arm: Arm, metric: str) -> list[Series]:
    series = []
    if arm is not comparison.reference:
        series.append(_series(comparison.reference, metric, _REFERENCE_COLOR))
    series.append(_series(arm, metric, _color(comparison, arm.name)))
    if not series[-1].points:
        return []
    return [s for s in series if s.points]


def _series(arm: Arm, metric: str, color: int) -> Series:
    runs = [run["curves"][metric] for run in arm.finished() if metric in run["curves"]]
    return _banded(arm.name, _over_seeds(runs), color)


def _curve_card(
    comparison: Comparison,
    name: str,
    curves: dict[str, list[tuple[float, float, float]]],
    y_range: tuple[float, float],
) -> str:
    reference = comparison.reference.name
    series = [_banded(name, curves[name], _color(comparison, name))]
    if reference in curves and reference != name:
        series.insert(0, _banded(reference, curves[reference], _REFERENCE_COLOR))
    svg = plot_series_svg(
        series,
        title=f"pass@1 of {name}",
        x_label="RL step",
        width=340,
        height=200,
        percent=True,
        y_range=y_range,
    )
    return f'<figure class="card"><h3>{escape(name)}</h3>{_legend(series, True)}{svg}</figure>'


def _color(comparison: Comparison, name: str) -> int:
    if name == comparison.reference.name:
        return _REFERENCE_COLOR
    difference = comparison.difference(MAIN, name)
    return VERDICT_COLORS["open" if difference is None else difference.verdict]


def _banded(label: str, curve: Sequence[tuple[float, float, float]], color: int) -> Series:
    points = [(x, (low + high) / 2) for x, low, high in curve]
    band = curve if any(high > low for _, low, high in curve) else ()
    return Series(label, points, color, smoothed=False, band=band)


def _validation_curve(arm: Arm) -> list[tuple[float, float, float]]:
    found = [run["validation"] for run in arm.finished()]
    return _over_seeds([[v["step"], v["pass@1"]] for v in found if "pass@1" in v])


def _over_seeds(runs: Sequence[Sequence[list]]) -> list[tuple[float, float, float]]:
    """(step, mean - standard error, mean + standard error) over runs, each [steps, values]."""
    by_step: dict[float, list[float]] = {}
    for steps, values in runs:
        for step, value in zip(steps, values, strict=True):
            if not isinstance(value, str) and math.isfinite(value):
                by_step.setdefault(step, []).append(value)
    curve = []
    for step in sorted(by_step):
        center, error = statistics.mean(by_step[step]), statistics.standard_error(by_step[step])
        error = error if math.isfinite(error) else 0.0
        curve.append((float(step), center - error, center + error))
    return curve


def _legend(series: Sequence[Series], percent: bool) -> str:
    value_of = format_percent if percent else format_number
    keys = "".join(
        f'<span class="key c{s.color}"><i></i>{escape(s.label)} '
        f"<b>{escape(value_of(s.points[-1][1]))}</b></span>"
        for s in series
    )
    return f'<figcaption class="legend">{keys}</figcaption>'


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
