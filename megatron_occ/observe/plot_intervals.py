"""Differences with their intervals as SVG, a row for each: a forest plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_occ.observe import plot_scale
from megatron_occ.observe.plot import svg_element
from megatron_occ.observe.plot_scale import Scale
from megatron_occ.observe.text import escape, tick_formatter

_ROW = 28
_TOP = 20
_BOTTOM = 40


@dataclass(frozen=True)
class IntervalRow:
    """One row: its mean, an interval around it if there is one, and the values behind it.

    `color` is a slot of the palette, 1 to 7; `cells` stand in columns at the right end.
    """

    label: str
    mean: float
    interval: tuple[float, float] | None
    values: Sequence[float]
    color: int = 1
    cells: Sequence[str] = ()


def plot_intervals_svg(
    rows: Sequence[IntervalRow],
    *,
    title: str,
    heads: Sequence[str] = (),
    x_label: str = "",
    width: int = 1016,
    percent: bool = False,
) -> str:
    """Return an `<svg>` element with the rows from top to bottom and a line at 0.

    `percent` labels the axis in percentage points, `x_label` says what its numbers are, `heads` are
    the titles of the columns of cells.

    Raises ValueError without a row.
    """
    if not rows:
        raise ValueError(f"nothing to plot in {title!r}: no row")
    shown = [x for row in rows for x in (row.mean, *row.values, *(row.interval or ()))]
    factor = 100.0 if percent else 1.0
    low, high, ticks = plot_scale.nice_range(
        min(0.0, *shown) * factor, max(0.0, *shown) * factor, target=max(4, width // 160)
    )
    left = 20 + 6.6 * max(len(row.label) for row in rows)
    columns = _columns([heads, *(row.cells for row in rows)], width)
    right = columns[0][0] - 12 if columns else width - 12
    bottom = _TOP + _ROW * len(rows)
    x = Scale(low, high, left, right)
    parts = [_axis(ticks, x, bottom, tick_formatter(ticks), x_label)]
    parts.append(_cells_svg(heads, columns, 12, "note"))
    for index, row in enumerate(rows):
        y = _TOP + _ROW * (index + 0.5)
        parts += [_row_svg(row, y, x, factor), _cells_svg(row.cells, columns, y + 4, "")]
    return svg_element("".join(parts), width, bottom + _BOTTOM, title)


def _axis(
    ticks: list[float], x: Scale, bottom: float, label_of: Callable[[float], str], x_label: str
) -> str:
    parts = []
    for tick in ticks:
        at, kind = x(tick), "zero" if tick == 0 else "grid"
        text = escape(label_of(tick) if tick <= 0 else f"+{label_of(tick)}")
        parts.append(f'<path class="{kind}" d="M{at:.1f} {_TOP}V{bottom}"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 17}" text-anchor="middle">{text}</text>')
    if x_label:
        place = f'x="{x.end:.1f}" y="{bottom + 33}"'
        parts.append(f'<text class="note" {place} text-anchor="end">{escape(x_label)}</text>')
    return "".join(parts)


def _row_svg(row: IntervalRow, y: float, x: Scale, factor: float) -> str:
    color = f"c{row.color}"
    parts = [f'<text class="key" x="0" y="{y + 4:.1f}">{escape(row.label)}</text>']
    parts += [
        f'<circle class="dot {color}" cx="{x(value * factor):.1f}" cy="{y:.1f}" r="2.5"/>'
        for value in row.values
    ]
    if row.interval is not None:
        ends = [x(end * factor) for end in row.interval]
        line = f"M{ends[0]:.1f} {y:.1f}H{ends[1]:.1f}"
        caps = "".join(f"M{end:.1f} {y - 5:.1f}v10" for end in ends)
        parts.append(f'<path class="line {color}" d="{line}{caps}"/>')
    kind = "marker" if row.interval is not None else "marker hollow"
    center = f'cx="{x(row.mean * factor):.1f}" cy="{y:.1f}"'
    parts.append(f'<circle class="{kind} {color}" {center} r="5"/>')
    return "".join(parts)


def _columns(lines: Sequence[Sequence[str]], width: int) -> list[tuple[float, float]]:
    """Left and right end of each column of cells, which fill the plot up to its right end."""
    sizes = [6.2 * max(map(len, cells)) + 14 for cells in zip(*lines, strict=True)]
    ends = [width - sum(sizes[i + 1 :]) for i in range(len(sizes))]
    return [(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def _cells_svg(
    cells: Sequence[str], columns: list[tuple[float, float]], y: float, kind: str
) -> str:
    return "".join(
        f'<text class="{kind}" x="{end:.1f}" y="{y:.1f}" text-anchor="end">{escape(cell)}</text>'
        for cell, (_, end) in zip(cells, columns, strict=True)
    )
