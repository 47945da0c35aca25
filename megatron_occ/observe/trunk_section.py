"""The part of the report that answers whether MTP moves the trunk."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from megatron_occ.observe.cards import MAIN_COLOR, Panel, card, depth_color, depth_series
from megatron_occ.observe.exact_log import CLEAR, Estimate, ExactLog, mean_of, running_means
from megatron_occ.observe.html_page import grid
from megatron_occ.observe.plot import Series
from megatron_occ.observe.plot_intervals import IntervalRow, plot_intervals_svg
from megatron_occ.observe.plot_scale import Point
from megatron_occ.observe.regime import TrunkRegime, trunk_regime
from megatron_occ.observe.report_tables import tile
from megatron_occ.observe.run_data import RunData
from megatron_occ.observe.text import escape, format_number
from megatron_occ.observe.trunk_effect import acted_steps, share_text, trunk_verdict, with_error

_DEPTHS_SHOWN = 3
_EDGE = 0.2  # part of a band's ends at either side that may lie outside the plot
_PAIRS = ("same", "cross")


def trunk_section(run: RunData) -> str:
    """Return the verdict, the figures and the plots; "" without an RL phase."""
    regime = trunk_regime(run.rl_config)
    log = ExactLog(run)
    verdict = _verdict(run)
    if regime is not None and regime.kind in ("nothing", "fixed"):
        return verdict
    if regime is None or not log.depths:
        return verdict + grid(_coefficient_cards(run, regime))
    cards = [_coefficients(run, log), _layers(log), _shares(log, regime), *_cosines(log)]
    figures = _tiles(run, log, regime) + _depth_table(log)
    return verdict + figures + grid([text for text in cards if text])


def _verdict(run: RunData) -> str:
    verdict = trunk_verdict(run)
    if verdict is None:
        return ""
    reason = f'<p class="hint">{escape(verdict.reason)}</p>' if verdict.reason else ""
    answer = f'<span class="answer">{escape(verdict.answer)}</span>'
    return f'<div class="verdict"><p>{answer} {escape(verdict.sentence)}</p>{reason}</div>'


def _coefficient_cards(run: RunData, regime: TrunkRegime | None) -> list[str]:
    """Lambda, and what it is made of where that is the sums of log-prob differences."""
    coefficient = depth_series(run, "rl", "lambda/mtp_")
    cards = [card("Calibration coefficient λ", [Panel(coefficient, include_zero=True)])]
    if regime is None or regime.kind == "logprob":
        cross = depth_series(run, "rl", "calibration/cross_")
        norm = depth_series(run, "rl", "calibration/norm_squared_")
        panels = [
            Panel(cross, include_zero=True, caption="c, the cross term"),
            Panel(norm, include_zero=True, caption="v², the squared norm"),
        ]
        cards.append(card("What λ is made of", panels))
    return [text for text in cards if text]


def _tiles(run: RunData, log: ExactLog, regime: TrunkRegime) -> str:
    acted, steps = acted_steps(log.acted())
    shares = [share for _, share in log.share()]
    found = []
    if shares:
        note = (
            f"in the end, of RL's part of the {regime.of_what}; "
            f"median {share_text(statistics.median(shares))}, largest {share_text(max(shares))}"
        )
        found.append(tile("MTP's part", share_text(shares[-1]), note))
    gate = f"gate: {regime.gate:g} standard errors" if regime.gate else "no gate set"
    found.append(tile("λ not 0", f"{acted:,} of {steps:,} steps", gate))
    signal = mean_of(log.rl_signal_share())
    if signal is not None:
        clear = "clear" if signal.is_clear else "not clear"
        note = (
            "of its squared norm: what independent mini-batches have in common, the rest is "
            f"sampling noise; {clear} of 0"
        )
        found.append(tile("Signal in RL's gradient", escape(_percent_error(signal)), note))
    return f'<div class="tiles">{"".join(found)}</div>'


def _percent_error(estimate: Estimate) -> str:
    text = f"{100 * estimate.value:.1f}"
    return f"{text} ± {100 * estimate.error:.1f}%" if estimate.count > 1 else f"{text}%"


def _depth_table(log: ExactLog) -> str:
    """Coefficient and alignment of each depth, with standard errors."""
    heads = ["c same", "c cross", "cosine same", "cosine cross"]
    if not log.per_layer:
        heads = ["λ measured, in the end", "median over the run", "beyond 2 errors", *heads]
    head = "".join(f"<td>{escape(text)}</td>" for text in heads)
    rows = []
    for depth in log.depths:
        cells = [] if log.per_layer else _measured(log, depth)
        cells += [with_error(mean_of(log.total(f"c_{pairs}_{depth}"))) for pairs in _PAIRS]
        cells += [with_error(mean_of(log.cosines(depth, pairs))) for pairs in _PAIRS]
        columns = "".join(f"<td>{escape(text)}</td>" for text in cells)
        rows.append(f"<tr><th>Depth {depth}</th>{columns}</tr>")
    hint = (
        "c: inner product of RL's and MTP's gradients of the same mini-batch, and of independent "
        "ones; mean over steps ± standard error."
    )
    if not log.per_layer:
        hint = f"λ measured: before gate, share and bounds, ± its standard error. {hint}"
    table = (
        f'<div class="scroll"><table class="metrics"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
    return f'<div class="card figures"><p class="hint">{escape(hint)}</p>{table}</div>'


def _measured(log: ExactLog, depth: int) -> list[str]:
    """The last raw coefficient, the median, and how often it was clear of 0."""
    raw, errors = log.points(f"lambda_raw_{depth}"), dict(log.points(f"lambda_error_{depth}"))
    if not raw:
        return ["\N{EN DASH}"] * 3
    step, value = raw[-1]
    last = with_error(Estimate(value, errors.get(step, math.inf), 2))
    known = [(y, errors[x]) for x, y in raw if x in errors]
    clear = sum(abs(y) > CLEAR * error for y, error in known)
    return [
        last,
        format_number(statistics.median([y for _, y in raw]), 2),
        f"{clear} of {len(known)} steps",
    ]


def _coefficients(run: RunData, log: ExactLog) -> str:
    """A plot for each of the first depths: measured with its band, and what acted over it."""
    panels, gaps = [], False
    for depth in log.depths[:_DEPTHS_SHOWN] if not log.per_layer else ():
        raw, errors = log.points(f"lambda_raw_{depth}"), dict(log.points(f"lambda_error_{depth}"))
        band = [(x, y - CLEAR * errors[x], y + CLEAR * errors[x]) for x, y in raw if x in errors]
        acted = log.points(f"lambda_{depth}") or run.points("rl", f"lambda/mtp_{depth}")
        acted = [point for point in acted if math.isfinite(point[1])]
        measured = Series("measured", raw, depth_color(depth), smoothed=False, band=band)
        both = (measured, Series("acted", acted, MAIN_COLOR, smoothed=False))
        series = [one for one in both if one.points]
        caption = f"depth {depth}" if len(log.depths) > 1 else ""
        panels.append(Panel(series, False, True, caption, _range(raw, band, acted)))
        gaps = gaps or len(raw) < len(log.points(f"c_same_{depth}"))
    hint = "Measured: before gate, share and bounds, with a band of ± 2 standard errors"
    if gaps:
        hint += "; it has no value where RL's own signal is not positive"
    hint += "."
    return card("Coefficient λ: measured, and what acted", panels, hint)


def _range(
    raw: Sequence[Point], band: Sequence[tuple[float, float, float]], acted: Sequence[Point]
) -> tuple[float, float]:
    """All that acted, and the middle of what was measured: early bands are very wide."""
    lows, highs = ([y for _, y in raw],) * 2
    if band:
        lows, highs = [low for _, low, _ in band], [high for _, _, high in band]
    values = [y for _, y in acted]
    if lows:
        values += [_quantile(lows, _EDGE), _quantile(highs, 1 - _EDGE)]
    low, high = min(0.0, *values), max(0.0, *values)
    room = 0.2 * (high - low) if lows else 0.0
    return low - room, high + room


def _layers(log: ExactLog) -> str:
    """The last coefficient of each group of layers: measured with its interval, and what acts."""
    rows = []
    for group in log.groups if log.per_layer else ():
        for depth in log.depths[:_DEPTHS_SHOWN]:
            label = group.removeprefix("/")
            if len(log.depths) > 1:
                label += f", depth {depth}"
            rows += _layer_row(log, label, depth, group)
    if not rows:
        return ""
    svg = plot_intervals_svg(
        rows, title="λ by layer", heads=("acts",), x_label="λ, measured last", width=480
    )
    hint = (
        "Circle and bar: measured before gate, share and bounds, ± 2 standard errors. Empty "
        "circle: what acts, where nothing was measured."
    )
    return (
        f'<figure class="card"><h3>Coefficient λ by layer, in the end</h3>'
        f'<p class="hint">{escape(hint)}</p>{svg}</figure>'
    )


def _layer_row(log: ExactLog, label: str, depth: int, group: str) -> list[IntervalRow]:
    acted = log.points(f"lambda_{depth}{group}")
    raw = log.points(f"lambda_raw_{depth}{group}")
    if not acted:
        return []
    acts = acted[-1][1]
    cells = (format_number(acts, 2),)
    errors = dict(log.points(f"lambda_error_{depth}{group}"))
    if not raw or raw[-1][0] not in errors:
        return [IntervalRow(label, acts, None, (), depth_color(depth), cells)]
    step, value = raw[-1]
    ends = (value - CLEAR * errors[step], value + CLEAR * errors[step])
    return [IntervalRow(label, value, ends, (), depth_color(depth), cells)]


def _shares(log: ExactLog, regime: TrunkRegime) -> str:
    points = log.share()
    series = [Series("of RL's part", points, MAIN_COLOR, smoothed=False)] if points else []
    flat = (0.0, 0.1) if not any(share for _, share in points) else None
    return card(
        f"MTP's part of the trunk's {regime.of_what}",
        [Panel(series, percent=True, include_zero=True, y_range=flat)],
        "Norm of what MTP adds, relative to that of RL's gradient; all depths together.",
    )


def _cosines(log: ExactLog) -> list[str]:
    """Running means: within mini-batches against between them; the latter beside RL's own."""
    same, cross = [], []
    for depth in log.depths[:_DEPTHS_SHOWN]:
        name = f", depth {depth}" if len(log.depths) > 1 else ""
        same += _running(f"c same{name}", log.cosines(depth, "same"), depth_color(depth), True)
        cross += _running(f"c cross{name}", log.cosines(depth, "cross"), depth_color(depth))
    rl = _running("RL with itself", log.rl_signal_share(), MAIN_COLOR)
    noise = card(
        "Alignment or shared noise?",
        [Panel(same + cross, include_zero=True)],
        "Cosine of RL's and MTP's gradients, mean up to each step ± 2 standard errors. Within a "
        "mini-batch (c same) both hold the same noise.",
    )
    signal = card(
        "What independent mini-batches agree in",
        [Panel(cross + rl, include_zero=True)] if cross else [],
        "The same for pairs of different mini-batches, enlarged: noise averages out. RL with "
        "itself is the signal in RL's own gradient.",
    )
    return [noise, signal]


def _running(label: str, points: Sequence[Point], color: int, dashed: bool = False) -> list[Series]:
    means = running_means(points)
    if not means:
        return []
    band = [
        (x, m.value - CLEAR * m.error, m.value + CLEAR * m.error) for x, m in means if m.count > 4
    ]
    values = [(x, m.value) for x, m in means]
    return [Series(label, values, color, dashed, smoothed=False, band=band)]


def _quantile(values: Sequence[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[round(part * (len(ordered) - 1))]
