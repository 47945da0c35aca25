"""Line plots as plain SVG text: no plotting library, no scripts, light and dark from one file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from megatron_occ.config.words import counted
from megatron_occ.observe import plot_scale
from megatron_occ.observe.plot_scale import Point, Scale
from megatron_occ.observe.text import escape, format_number, format_percent, tick_formatter

COLORS = 7  # the classes c1 to c7 of plot.css
_RAW_POINTS = 480
_SMOOTH_POINTS = 240
_HOVER_COLUMNS = 60
_MARKERS_UP_TO = 15


@dataclass(frozen=True)
class Series:
    """One curve: `points` are (x, y) with increasing x; a y that is not finite leaves a gap.

    `color` is a slot of the palette, 1 to 7. A `smoothed` series of 16 points or more is drawn as a
    faint raw line below its running median; one of 15 points or fewer gets markers. `band` are
    (x, low, high) with increasing x: the area between is tinted, e.g. a spread over seeds.
    """

    label: str
    points: Sequence[Point]
    color: int = 1
    dashed: bool = False
    smoothed: bool = True
    band: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Frame:
    """The drawing area of a plot: the two scales, with their ticks and the format of y values."""

    x: Scale
    y: Scale
    x_ticks: list[float]
    y_ticks: list[float]
    y_format: Callable[[float], str]
    y_tick_format: Callable[[float], str]


def plot_series_svg(
    series: Sequence[Series],
    *,
    title: str = "",
    x_label: str = "",
    width: int = 480,
    height: int = 220,
    percent: bool = False,
    include_zero: bool = False,
    standalone: bool = False,
    y_range: tuple[float, float] | None = None,
) -> str:
    """Return an `<svg>` element that shows `series` over a common axis of step numbers.

    `percent` shows fractions as percentages; `include_zero` keeps 0 in the y range. `y_range` is
    given where several plots are to have the same, by default it is that of the values. The element
    takes its colours from plot.css; a `standalone` one carries that style, a background, the
    title and a legend. Where a few spikes would flatten everything else, the y range leaves them
    out and the plot says how many points lie outside.

    Raises ValueError if no series has a finite point.
    """
    finite = [(x, y) for s in series for x, y in s.points if math.isfinite(y)]
    if not finite:
        raise ValueError(f"nothing to plot in {title!r}: no series has a finite value")
    head, top = _standalone_head(series, title, width) if standalone else ("", 10)
    shown = finite + [(x, y) for s in series for x, *ends in s.band for y in ends]
    low, high = y_range or plot_scale.robust_range([y for _, y in shown])
    if include_zero:
        low, high = min(0.0, low), max(0.0, high)
    frame = _frame(finite, (low, high), width, height, top, percent)
    parts = [head, axes_svg(frame, x_label)]
    parts += [_band_svg(s, frame) for s in series if s.band]
    parts += [_curve_svg(s, frame) for s in series]
    parts += [_outside_note(finite, frame), _hover_svg(series, frame)]
    label = title or ", ".join(s.label for s in series)
    return svg_element("".join(parts), width, height, label)


def write_plot(path: str | Path, series: Sequence[Series], **options: Any) -> Path:
    """Write a standalone SVG file, e.g. for a README; options as in `plot_series_svg`."""
    options = {"width": 720, "height": 360, **options}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(plot_series_svg(series, standalone=True, **options) + "\n", encoding="utf-8")
    return path


def plot_style() -> str:
    """Return the style sheet that every plot needs."""
    return resources.files("megatron_occ.observe").joinpath("plot.css").read_text("utf-8")


def svg_element(content: str, width: float, height: float, label: str) -> str:
    """Wrap drawing instructions into an `<svg>` that scales with its surroundings."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" viewBox="0 0 {width} {height}" '
        f'role="img" aria-label="{escape(label)}">{content}</svg>'
    )


def axes_svg(frame: Frame, x_label: str) -> str:
    """Draw grid lines, tick labels, the x axis (emphasised zero line if 0 is inside)."""
    left, right, bottom = frame.x.start, frame.x.end, frame.y.start
    parts = []
    for tick in frame.y_ticks:
        y = frame.y(tick)
        kind = "axis" if tick == 0 or y == bottom else "grid"
        parts.append(f'<path class="{kind}" d="M{left:.1f} {y:.1f}H{right:.1f}"/>')
        text = escape(frame.y_tick_format(tick))
        parts.append(f'<text x="{left - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for tick in frame.x_ticks:
        x, text = frame.x(tick), escape(_step_label(tick))
        parts.append(f'<path class="axis" d="M{x:.1f} {bottom:.1f}v4"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 17:.1f}" text-anchor="middle">{text}</text>')
    if x_label:
        place = f'x="{right:.1f}" y="{bottom + 31:.1f}"'
        parts.append(f'<text class="note" {place} text-anchor="end">{escape(x_label)}</text>')
    return "".join(parts)


def line_path(points: Sequence[Point], x: Scale, y: Scale) -> str:
    """Return the `d` attribute of a polyline; a value that is not finite interrupts the line."""
    parts, pen_up = [], True
    for px, py in points:
        if math.isfinite(py):
            parts.append(f"{'M' if pen_up else 'L'}{x(px):.1f} {y(py):.1f}")
        pen_up = not math.isfinite(py)
    return "".join(parts)


def left_margin(ticks: Sequence[float], tick_format: Callable[[float], str]) -> float:
    """Room for the tick labels; the same for most plots, so that those below each other align."""
    return max(46.0, 16 + 6.4 * max(len(tick_format(tick)) for tick in ticks))


def _frame(
    finite: list[Point],
    y_range: tuple[float, float],
    width: int,
    height: int,
    top: int,
    percent: bool,
) -> Frame:
    y_low, y_high, y_ticks = plot_scale.nice_range(*y_range, target=max(3, height // 45))
    tick_format = tick_formatter(y_ticks, percent)
    left = left_margin(y_ticks, tick_format)
    x_low, x_high = plot_scale.widen_empty(min(x for x, _ in finite), max(x for x, _ in finite))
    return Frame(
        x=Scale(x_low, x_high, left, width - 12),
        y=Scale(y_low, y_high, height - 36, top),
        x_ticks=plot_scale.step_ticks(x_low, x_high),
        y_ticks=y_ticks,
        y_format=format_percent if percent else format_number,
        y_tick_format=tick_format,
    )


def _band_svg(series: Series, frame: Frame) -> str:
    upper = [(x, _clip(high, frame.y)) for x, _, high in series.band]
    lower = [(x, _clip(low, frame.y)) for x, low, _ in reversed(series.band)]
    path = line_path([*upper, *lower], frame.x, frame.y)
    return f'<path class="band c{series.color}" d="{path}Z"/>'


def _curve_svg(series: Series, frame: Frame) -> str:
    classes = f"line c{series.color}" + (" dashed" if series.dashed else "")
    half_width = plot_scale.smoothing_half_width(len(series.points))
    clipped = [(x, _clip(y, frame.y)) for x, y in series.points]
    if not (series.smoothed and half_width):
        path = line_path(plot_scale.thin(clipped, _RAW_POINTS), frame.x, frame.y)
        markers = clipped if len(clipped) <= _MARKERS_UP_TO else []
        dots = "".join(
            f'<circle class="marker c{series.color}" cx="{frame.x(x):.1f}" '
            f'cy="{frame.y(y):.1f}" r="3.5"/>'
            for x, y in markers
            if math.isfinite(y)
        )
        return f'<path class="{classes}" d="{path}"/>{dots}'
    raw = line_path(plot_scale.thin(clipped, _RAW_POINTS), frame.x, frame.y)
    means = plot_scale.bucket_means(series.points, _SMOOTH_POINTS)
    half_width = plot_scale.smoothing_half_width(len(means))
    averaged = [(x, _clip(y, frame.y)) for x, y in plot_scale.smooth(means, half_width)]
    path = line_path(averaged, frame.x, frame.y)
    return f'<path class="{classes} raw" d="{raw}"/><path class="{classes}" d="{path}"/>'


def _clip(value: float, scale: Scale) -> float:
    return min(max(value, scale.low), scale.high) if math.isfinite(value) else math.nan


def _outside_note(finite: list[Point], frame: Frame) -> str:
    count = sum(not frame.y.low <= y <= frame.y.high for _, y in finite)
    if not count:
        return ""
    text = f"{counted(count, 'point')} outside the range shown"
    x, y = frame.x.start, frame.y.start + 31
    return f'<text class="note" x="{x:.1f}" y="{y:.1f}">{text}</text>'


def _hover_svg(series: Sequence[Series], frame: Frame) -> str:
    """Transparent columns whose tooltip lists the last value of each series inside them."""
    count = min(_HOVER_COLUMNS, max(len(s.points) for s in series))
    edge = (frame.x.end - frame.x.start) / count
    columns: list[dict[str, Point]] = [{} for _ in range(count)]
    for s in series:
        for x, y in s.points:
            index = min(count - 1, int((frame.x(x) - frame.x.start) / edge))
            columns[index][s.label] = (x, y)
    return "".join(
        _hover_column(column, frame, frame.x.start + index * edge, edge)
        for index, column in enumerate(columns)
        if column
    )


def _hover_column(column: dict[str, Point], frame: Frame, left: float, width: float) -> str:
    at = max(x for x, _ in column.values())
    lines = [f"step {_step_label(at)}"]
    lines += [f"{label}: {frame.y_format(y)}" for label, (_, y) in column.items()]
    top, bottom = frame.y.end, frame.y.start
    title = escape("\n".join(lines))
    return (
        f'<rect class="hover" x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" '
        f'height="{bottom - top:.1f}"><title>{title}</title></rect>'
        f'<path class="guide" d="M{frame.x(at):.1f} {top:.1f}V{bottom:.1f}"/>'
    )


def _standalone_head(series: Sequence[Series], title: str, width: int) -> tuple[str, int]:
    """Style, background, title and legend; also returns where the drawing area may start."""
    background = '<rect class="background" width="100%" height="100%" rx="8"/>'
    parts = [f"<style>{plot_style()}</style>", background]
    y = 12
    if title:
        y += 20
        parts.append(f'<text class="title" x="16" y="{y}">{escape(title)}</text>')
    x, y = 16.0, y + 24
    for s in series:
        entry = 44 + 7.0 * len(s.label)
        if x > 16 and x + entry > width:
            x, y = 16.0, y + 20
        dashed = " dashed" if s.dashed else ""
        parts.append(f'<path class="line c{s.color}{dashed}" d="M{x:.1f} {y - 4}h20"/>')
        parts.append(f'<text class="key" x="{x + 28:.1f}" y="{y}">{escape(s.label)}</text>')
        x += entry
    return "".join(parts), y + 20


def _step_label(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"
