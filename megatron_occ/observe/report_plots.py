"""Which plots the report shows, in which order, and from which metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_occ.observe.plot import Series, plot_series_svg
from megatron_occ.observe.plot_bars import plot_stacked_bars_svg
from megatron_occ.observe.run_data import RunData, acceptance_lengths
from megatron_occ.observe.text import escape, format_duration, format_number, format_percent

# Colours mean the same in every plot: 1 is the main head, the trunk or the run as a whole, and
# MTP depth k has colour k+1.
_MAIN = 1
_DEPTH_COLORS = (2, 3, 4, 5, 6)
_TIME_PHASES = (
    ("time/rollout", "rollout", 1),
    ("time/reward", "reward", 5),
    ("time/logprobs", "log-probs", 3),
    ("time/train", "training", 2),
    ("time/validation", "validation", 4),
)
_OTHER_COLOR = 7


@dataclass(frozen=True)
class Panel:
    """One plot of a card."""

    series: list[Series]
    percent: bool = False
    include_zero: bool = False
    caption: str = ""


def rl_cards(run: RunData) -> list[str]:
    """Return the plots of the RL phase as HTML; metrics that are missing leave no gap."""
    reward = _some(run, [("reward/mean", "mean over responses", _MAIN)]) + _mean_scores(run)
    coefficient = _by_depth(run, "rl", "lambda/mtp_")
    entropy = _some(run, [("entropy", "policy", _MAIN)])
    agreement = _by_depth(run, "rl", "agreement/mtp_")
    panels = {
        "Reward": [Panel(reward)],
        "Entropy": [Panel(entropy, include_zero=True)],
        "Calibration coefficient λ": [Panel(coefficient, include_zero=True)],
        "What λ is made of": _calibration_panels(run),
        "MTP agreement with the main head": [Panel(agreement, percent=True)],
        "Speculative decoding": _draft_panels(run),
        "MTP loss": [
            Panel(_by_depth(run, "rl", "loss/mtp_"), caption="cross-entropy"),
            Panel(_by_depth(run, "rl", "loss/head_mtp_"), caption="distance to the main head"),
        ],
        "Gradient norms": _gradient_panels(run, "rl"),
        "Policy update": _update_panels(run),
        "Response length": _length_panels(run),
        "Rollout": _rollout_panels(run),
    }
    cards = [_accuracy_card(run)] + [_card(title, group) for title, group in panels.items()]
    return [card for card in cards if card]


def pretrain_cards(run: RunData) -> list[str]:
    """Return the plots of the pretraining phase as HTML."""
    main = _some(run, [("loss/main", "main head", _MAIN)], "pretrain")
    speed = _some(run, [("tokens_per_second", "all ranks", _MAIN)], "pretrain")
    agreement = _by_depth(run, "pretrain", "agreement/mtp_")
    pass_rate = _some(run, [("pass@1", "held-out problems", _MAIN)], "pretrain")
    panels = {
        "Loss": [Panel(main + _by_depth(run, "pretrain", "loss/mtp_"))],
        "Sampled pass@1": [Panel(pass_rate, percent=True)],
        "MTP agreement with the main head": [Panel(agreement, percent=True)],
        "Gradient norms": _gradient_panels(run, "pretrain"),
        "Tokens per second": [Panel(speed, include_zero=True)],
    }
    cards = [_card(title, group, x_label="pretraining step") for title, group in panels.items()]
    return [card for card in cards if card]


def time_card(run: RunData) -> str:
    """Return the time per RL step: stacked bars, and a table with the share of each phase."""
    series = _time_series(run)
    if not series:
        return ""
    svg = plot_stacked_bars_svg(
        series, title="Seconds per RL step and phase", x_label="RL step", width=560, height=230
    )
    title = '<h3>Seconds per step</h3><div class="split">'
    return f'<figure class="card wide">{title}<div>{svg}</div>{_time_table(series)}</div></figure>'


def _some(run: RunData, wanted: Sequence[tuple[str, str, int]], phase: str = "rl") -> list[Series]:
    """Series for (metric, label, colour), leaving out metrics without a finite value."""
    found = [Series(label, run.points(phase, name), color) for name, label, color in wanted]
    return [s for s in found if any(math.isfinite(y) for _, y in s.points)]


def _by_depth(run: RunData, phase: str, prefix: str, label: str = "depth") -> list[Series]:
    wanted = [
        (f"{prefix}{k}", f"{label} {k}", _DEPTH_COLORS[(k - 1) % len(_DEPTH_COLORS)])
        for k in run.depths(phase, prefix)
    ]
    return _some(run, wanted, phase)


def _accuracy_card(run: RunData) -> str:
    """Accuracy on training prompts as a curve, on the validation problems as points."""
    series = _some(run, [("rollout/accuracy", "training prompts", 7)])
    main = run.accuracy_metric
    names = [main] if main else []
    names += [n for n in run.names("validation") if n.startswith("pass@") and n != main]
    for name, color in zip(names, (1, 4, 6, 3), strict=False):
        points = run.points("validation", name)
        series.append(Series(f"validation {name}", points, color, name != main, smoothed=False))
    hint = "Points: the validation problems. Curve: the prompts of each RL step."
    return _card("Accuracy", [Panel(series, percent=True)], hint, wide=True)


def _mean_scores(run: RunData) -> list[Series]:
    """Scores of the validation problems, of a verifier with partial credit."""
    name = run.score_metric
    if name is None:
        return []
    points = run.points("validation", name)
    return [Series(f"validation {name}", points, _DEPTH_COLORS[0], smoothed=False)]


def _calibration_panels(run: RunData) -> list[Panel]:
    return [
        Panel(
            _by_depth(run, "rl", "calibration/cross_"),
            include_zero=True,
            caption="c, the cross term",
        ),
        Panel(
            _by_depth(run, "rl", "calibration/norm_squared_"),
            include_zero=True,
            caption="v², the squared norm",
        ),
    ]


def _gradient_panels(run: RunData, phase: str) -> list[Panel]:
    trunk = _some(run, [("grad_norm/trunk", "trunk", _MAIN)], phase)
    head = _some(run, [("grad_norm/head", "MTP heads", _DEPTH_COLORS[0])], phase)
    return [Panel(trunk, include_zero=True), Panel(head, include_zero=True)]


def _length_panels(run: RunData) -> list[Panel]:
    lengths = [("rollout/length_max", "longest", 7), ("rollout/length_mean", "mean", _MAIN)]
    cut = [("rollout/truncated", "cut off at the limit", 2)]
    return [
        Panel(_some(run, lengths), include_zero=True, caption="tokens"),
        Panel(_some(run, cut), percent=True, include_zero=True),
    ]


def _rollout_panels(run: RunData) -> list[Panel]:
    speed = [("rollout/tokens_per_second", "tokens per second", _MAIN)]
    dropped = [("rollout/dropped_groups", "groups dropped", 2)]
    return [
        Panel(_some(run, speed), include_zero=True),
        Panel(_some(run, dropped), include_zero=True),
    ]


def _draft_panels(run: RunData) -> list[Panel]:
    """Drafts by their place: depth k drafts the k-th token, and the last depth the others."""
    lengths = _some(run, [("draft/acceptance_length", "tokens a trunk pass", _MAIN)])
    measured = acceptance_lengths(run)
    if measured:
        lengths.append(Series("validation", measured, _DEPTH_COLORS[0], smoothed=False))
    return [
        Panel(_by_depth(run, "rl", "draft/accepted_", "draft"), percent=True, caption="accepted"),
        Panel(_by_depth(run, "rl", "draft/proposed_", "draft"), percent=True, caption="in passes"),
        Panel(lengths if run.depths("rl", "draft/accepted_") else []),
    ]


def _update_panels(run: RunData) -> list[Panel]:
    clipped = [("clip_fraction/low", "clipped low", 4), ("clip_fraction/high", "clipped high", 6)]
    gap = [("logprob_gap/mean", "log-prob gap, rollout to training", 7)]
    return [
        Panel(_some(run, clipped), percent=True, include_zero=True),
        Panel(_some(run, gap), include_zero=True),
    ]


def _card(
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


def _time_series(run: RunData) -> list[Series]:
    """The phases of an RL step, and what is left of `time/step` besides them as "other"."""
    series = _some(run, _TIME_PHASES)
    spent: dict[float, float] = {}
    for s in series:
        for x, y in s.points:
            spent[x] = spent.get(x, 0.0) + y
    rest = [(x, max(0.0, y - spent.get(x, 0.0))) for x, y in run.points("rl", "time/step")]
    if any(y > 0 for _, y in rest):
        series.append(Series("other", rest, _OTHER_COLOR))
    return series


def _time_table(series: Sequence[Series]) -> str:
    totals = [sum(y for _, y in s.points if math.isfinite(y)) for s in series]
    everything = sum(totals) or 1.0
    steps = len({x for s in series for x, _ in s.points})
    rows = [
        _time_row(s, total / steps, total, total / everything)
        for s, total in zip(series, totals, strict=True)
    ]
    head = "<tr><th>Phase</th><td>per step</td><td>in all</td><td>share</td><td></td></tr>"
    foot = (
        f"<tr><th>Sum</th><td>{format_duration(everything / steps)}</td>"
        f"<td>{format_duration(everything)}</td><td></td><td></td></tr>"
    )
    return (
        f'<table class="times"><thead>{head}</thead><tbody>{"".join(rows)}</tbody>'
        f"<tfoot>{foot}</tfoot></table>"
    )


def _time_row(series: Series, per_step: float, total: float, share: float) -> str:
    return (
        f'<tr><th class="c{series.color}"><i></i>{escape(series.label)}</th>'
        f"<td>{format_duration(per_step)}</td><td>{format_duration(total)}</td>"
        f"<td>{format_percent(share)}</td>"
        f'<td class="share c{series.color}"><u style="width:{100 * share:.1f}%"></u></td></tr>'
    )
