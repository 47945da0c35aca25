"""Stacked bars as SVG: how the time of a step divides into phases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_occ.observe import plot_scale
from megatron_occ.observe.plot import Frame, Series, axes_svg, left_margin, svg_element
from megatron_occ.observe.plot_scale import Scale
from megatron_occ.observe.text import escape, format_duration, format_number, tick_formatter

_BARS = 60


@dataclass(frozen=True)
class Bar:
    """One bar: it covers the steps from `first` to `last` and stacks `values`, one per series."""

    label: str
    first: float
    last: float
    values: list[float]


def plot_stacked_bars_svg(
    series: Sequence[Series],
    *,
    title: str = "",
    x_label: str = "",
    width: int = 480,
    height: int = 220,
) -> str:
    """Return an `<svg>` element with one bar per step, first series at the bottom.

    More than 60 steps share bars: a bar then shows the mean of its steps. A step at which a
    series has no value counts as 0 there. Raises ValueError if there is no finite value.
    """
    steps, rows = _table(series)
    if not steps:
        raise ValueError(f"nothing to plot in {title!r}: no series has a finite value")
    bars = _group(steps, rows)
    frame = _frame(bars, width, height)
    parts = [axes_svg(frame, x_label)]
    parts += [_bar_svg(series, bar, frame) for bar in bars]
    return svg_element("".join(parts), width, height, title)


def _table(series: Sequence[Series]) -> tuple[list[float], list[list[float]]]:
    """Steps in order, and for each of them one value per series."""
    by_step: dict[float, list[float]] = {}
    for index, s in enumerate(series):
        for x, y in s.points:
            if math.isfinite(y):
                by_step.setdefault(x, [0.0] * len(series))[index] = y
    steps = sorted(by_step)
    return steps, [by_step[step] for step in steps]


def _group(steps: list[float], rows: list[list[float]]) -> list[Bar]:
    size = math.ceil(len(steps) / _BARS)
    half_step = 0.5 * (steps[-1] - steps[0]) / (len(steps) - 1) if len(steps) > 1 else 0.5
    bars = []
    for start in range(0, len(steps), size):
        members = rows[start : start + size]
        first, last = steps[start], steps[start + len(members) - 1]
        means = [sum(column) / len(members) for column in zip(*members, strict=True)]
        label = f"step {first:g}" if first == last else f"steps {first:g} to {last:g}, mean"
        bars.append(Bar(label, first - half_step, last + half_step, means))
    return bars


def _frame(bars: list[Bar], width: int, height: int) -> Frame:
    highest = max(sum(bar.values) for bar in bars)
    _, high, ticks = plot_scale.nice_range(0.0, highest or 1.0, target=max(3, height // 45))
    tick_format = tick_formatter(ticks)
    left = left_margin(ticks, tick_format)
    first, last = bars[0].first, bars[-1].last
    return Frame(
        x=Scale(first, last, left, width - 12),
        y=Scale(0.0, high, height - 36, 10),
        x_ticks=plot_scale.step_ticks(first, last),
        y_ticks=ticks,
        y_format=format_number,
        y_tick_format=tick_format,
    )


def _bar_svg(series: Sequence[Series], bar: Bar, frame: Frame) -> str:
    left, right = frame.x(bar.first), frame.x(bar.last)
    gap = min(1.5, 0.2 * (right - left))
    base, parts = 0.0, []
    for s, value in zip(series, bar.values, strict=True):
        top = frame.y(base + value)
        box = f'x="{left:.1f}" y="{top:.1f}" width="{right - left - gap:.1f}" '
        box += f'height="{frame.y(base) - top:.1f}"'
        tip = escape(f"{bar.label}\n{s.label}: {format_duration(value)}")
        if value > 0:
            parts.append(f'<rect class="bar c{s.color}" {box}><title>{tip}</title></rect>')
        base += value
    return "".join(parts)
