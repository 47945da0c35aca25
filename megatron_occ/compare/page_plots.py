"""The plots of a study's page: intervals of differences, and curves with bands over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from megatron_occ.compare import statistics
from megatron_occ.compare.analysis import MAIN, Arm, Comparison, Difference, Outcome
from megatron_occ.compare.results import CURVES
from megatron_occ.compare.wording import amount, interval_text, level_text, p_text, ranked
from megatron_occ.observe.plot import Series, plot_series_svg
from megatron_occ.observe.plot_intervals import IntervalRow, plot_intervals_svg
from megatron_occ.observe.text import escape, format_number, format_percent

# (step, mean - standard error, mean + standard error)
Curve = list[tuple[float, float, float]]

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
_FLAT_RANGE = (-0.01, 0.01)


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
    unit = ", in points" if outcome.percent else ""
    with_cells = width > 600
    return plot_intervals_svg(
        [_forest_row(d, outcome, with_cells) for d in found],
        title=f"{outcome.title}: difference to {comparison.reference.name}",
        heads=("mean", "95% interval", "p", "p of all") if with_cells else (),
        x_label=f"{outcome.title} minus that of {comparison.reference.name}{unit}",
        width=width,
        percent=outcome.percent,
    )


def _forest_row(difference: Difference, outcome: Outcome, with_cells: bool) -> IntervalRow:
    cells = (
        amount(difference.mean, outcome.percent),
        interval_text(difference, outcome.percent),
        p_text(difference.p),
        p_text(difference.p_of_all),
    )
    return IntervalRow(
        label=difference.arm,
        mean=difference.mean,
        interval=difference.interval,
        values=list(difference.by_seed.values()),
        color=VERDICT_COLORS[difference.verdict],
        cells=cells if with_cells else (),
    )


def learning_curves(comparison: Comparison) -> str:
    """pass@1 of each arm over steps, and its difference to the reference.

    The levels have the same axes in all cards, each difference its own.
    """
    reference = comparison.reference
    names = [name for name in ranked(comparison) if name != reference.name]
    curves = {name: _validation_curve(comparison.arms[name]) for name in names}
    curves = {name: curve for name, curve in curves.items() if curve}
    gaps = {name: _gap_curve(comparison.arms[name], reference) for name in curves}
    base = _validation_curve(reference)
    ends = [y for curve in (base, *curves.values()) for _, low, high in curve for y in (low, high)]
    y_range = (min(ends), max(ends)) if ends else None
    cards = [
        _curve_card(comparison, name, (base, curves[name], gaps[name]), y_range) for name in curves
    ]
    return f'<div class="multiples">{"".join(cards)}</div>' if cards else ""


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
        value_of = format_percent if metric in _PERCENT else format_number
        legend = _legend(series, name, {s.label: value_of(s.points[-1][1]) for s in series})
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
    curves: tuple[Curve, Curve, Curve],
    y_range: tuple[float, float] | None,
) -> str:
    """A card with the reference's curve, the arm's, and below them that of their difference."""
    base, own, gap = curves
    color, reference = _color(comparison, name), comparison.reference.name
    series = [_banded(reference, base, _REFERENCE_COLOR), _banded(name, own, color)]
    series = [s for s in series if s.points]
    values = {
        arm.name: level_text(arm.level(MAIN)[0], Outcome(MAIN, "", percent=True))
        for arm in (comparison.reference, comparison.arms[name])
    }
    options = {"width": 340, "percent": True}
    svg = plot_series_svg(series, title=f"pass@1 of {name}", height=180, y_range=y_range, **options)
    if gap:
        title = f"pass@1 of {name} minus that of {reference}"
        svg += '<p class="hint strip">difference, seed by seed</p>'
        svg += plot_series_svg(
            [_banded("difference", gap, color)],
            title=title,
            x_label="RL step",
            height=120,
            include_zero=True,
            # two arms that did the same have a range of nothing
            y_range=None if any(low or high for _, low, high in gap) else _FLAT_RANGE,
            **options,
        )
    return (
        f'<figure class="card"><h3>{escape(name)}</h3>{_legend(series, name, values)}{svg}</figure>'
    )


def _color(comparison: Comparison, name: str) -> int:
    if name == comparison.reference.name:
        return _REFERENCE_COLOR
    difference = comparison.difference(MAIN, name)
    return VERDICT_COLORS["open" if difference is None else difference.verdict]


def _banded(label: str, curve: Curve, color: int) -> Series:
    points = [(x, (low + high) / 2) for x, low, high in curve]
    band = curve if any(high > low for _, low, high in curve) else ()
    return Series(label, points, color, smoothed=False, band=band)


def _validation_curve(arm: Arm) -> Curve:
    return _over_seeds(list(_validations(arm).values()))


def _validations(arm: Arm) -> dict[int, list[list]]:
    """[steps, pass@1] of each finished run, by seed."""
    found = {run["seed"]: run["validation"] for run in arm.finished()}
    points = {
        seed: [(x, y) for x, y in zip(v["step"], v["pass@1"], strict=True) if y is not None]
        for seed, v in found.items()
        if "pass@1" in v
    }
    return {seed: [list(part) for part in zip(*p, strict=True)] for seed, p in points.items() if p}


def _gap_curve(arm: Arm, reference: Arm) -> Curve:
    """Paired differences by step, over the seeds that both have."""
    mine, others = _validations(arm), _validations(reference)
    pairs = []
    for seed in mine.keys() & others.keys():
        base = dict(zip(*others[seed], strict=True))
        steps = [step for step in mine[seed][0] if step in base]
        own = dict(zip(*mine[seed], strict=True))
        pairs.append([steps, [own[step] - base[step] for step in steps]])
    return _over_seeds(pairs)


def _over_seeds(runs: Sequence[Sequence[list]]) -> Curve:
    """Mean and standard error over runs, each [steps, values]."""
    by_step: dict[float, list[float]] = {}
    for steps, values in runs:
        for step, value in zip(steps, values, strict=True):
            if math.isfinite(value):
                by_step.setdefault(step, []).append(value)
    curve = []
    for step in sorted(by_step):
        center, error = statistics.mean(by_step[step]), statistics.standard_error(by_step[step])
        error = error if math.isfinite(error) else 0.0
        curve.append((float(step), center - error, center + error))
    return curve


def _legend(series: Sequence[Series], name: str, values: Mapping[str, str]) -> str:
    """Colours of the reference and of the arm ``name``, with a value each."""
    keys = "".join(
        f'<span class="key c{s.color}"><i></i>{"this arm" if s.label == name else escape(s.label)} '
        f"<b>{escape(values[s.label])}</b></span>"
        for s in series
    )
    return f'<figcaption class="legend">{keys}</figcaption>'


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
