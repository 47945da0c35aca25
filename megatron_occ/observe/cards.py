"""Cards of the report: plots of a run's metrics below each other, with title and legends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_occ.observe.plot import Series, plot_series_svg
from megatron_occ.observe.run_data import RunData
from megatron_occ.observe.text import escape, format_number, format_percent

# Colours mean the same in every plot: 1 is the main head, the trunk or the run as a whole, and
# MTP depth k has colour k+1.
MAIN_COLOR = 1
_DEPTH_COLORS = (2, 3, 4, 5, 6)


@dataclass(frozen=True)
class Panel:
    """One plot of a card; `y_range` in place of that of the values."""

    series: list[Series]
    percent: bool = False
    include_zero: bool = False
    caption: str = ""
    y_range: tuple[float, float] | None = None


def depth_color(depth: int) -> int:
    """The colour of an MTP depth, counted from 1."""
    return _DEPTH_COLORS[(depth - 1) % len(_DEPTH_COLORS)]


def some_series(
    run: RunData, wanted: Sequence[tuple[str, str, int]], phase: str = "rl"
) -> list[Series]:
    """Series for (metric, label, colour), leaving out metrics without a finite value."""
    found = [Series(label, run.points(phase, name), color) for name, label, color in wanted]
    return [s for s in found if any(math.isfinite(y) for _, y in s.points)]


def depth_series(run: RunData, phase: str, prefix: str, label: str = "depth") -> list[Series]:
    """Series of the metrics `<prefix><k>`, one for each MTP depth k."""
    wanted = [(f"{prefix}{k}", f"{label} {k}", depth_color(k)) for k in run.depths(phase, prefix)]
    return some_series(run, wanted, phase)


def card(
    title: str,
    panels: Sequence[Panel],
    hint: str = "",
    *,
    wide: bool = False,
    x_label: str = "RL step",
) -> str:
    """One framed group of plots below each other, or "" if none of them has data.

    A wide card holds its plots twice, and the style sheet shows the one that fits the window.
    """
    panels = [panel for panel in panels if panel.series]
    if not panels:
        return ""
    parts = [f"<h3>{escape(title)}</h3>"]
    if hint:
        parts.append(f'<p class="hint">{escape(hint)}</p>')
    height = 284 if len(panels) == 1 else 124
    for panel in panels:
        label = x_label if panel is panels[-1] else ""
        parts.append(_legend(panel))
        if wide:
            parts.append(_frame(panel, title, label, "broad", 1016, 300))
        parts.append(_frame(panel, title, label, "narrow" if wide else "", 480, height))
    return f'<figure class="card{" wide" if wide else ""}">{"".join(parts)}</figure>'


def _frame(panel: Panel, title: str, x_label: str, kind: str, width: int, height: int) -> str:
    svg = plot_series_svg(
        panel.series,
        title=f"{title} {panel.caption}".strip(),
        x_label=x_label,
        width=width,
        height=height,
        percent=panel.percent,
        include_zero=panel.include_zero,
        y_range=panel.y_range,
    )
    return f'<div class="frame {kind}">{svg}</div>'


def _legend(panel: Panel) -> str:
    """The colour, the name and the last value of each curve."""
    value_of = format_percent if panel.percent else format_number
    keys = "".join(
        f'<span class="key c{s.color}"><i class="{"dashed" if s.dashed else ""}"></i>'
        f"{escape(s.label)} <b>{escape(value_of(s.points[-1][1]))}</b></span>"
        for s in panel.series
    )
    caption = f'<span class="caption">{escape(panel.caption)}</span>' if panel.caption else ""
    return f'<figcaption class="legend">{caption}{keys}</figcaption>'
