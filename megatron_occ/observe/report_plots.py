"""Which plots the report shows, in which order, and from which metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_occ.observe.cards import (
    MAIN_COLOR,
    Panel,
    card,
    depth_color,
    depth_series,
    some_series,
)
from megatron_occ.observe.plot import Series
from megatron_occ.observe.plot_bars import plot_stacked_bars_svg
from megatron_occ.observe.run_data import RunData, acceptance_lengths
from megatron_occ.observe.servers_section import server_numbers
from megatron_occ.observe.text import escape, format_duration, format_percent

_TIME_PHASES = (
    ("time/rollout", "rollout", 1),
    ("time/reward", "reward", 5),
    ("time/logprobs", "log-probs", 3),
    ("time/train", "training", 2),
    ("time/validation", "validation", 4),
)
_OTHER_COLOR = 7
_SET_COLORS = 7


def rl_cards(run: RunData) -> list[str]:
    """Return the plots of the RL phase as HTML; metrics that are missing leave no gap."""
    reward = some_series(run, [("reward/mean", "mean over responses", MAIN_COLOR)]) + _mean_scores(
        run
    )
    entropy = some_series(run, [("entropy", "policy", MAIN_COLOR)])
    agreement = depth_series(run, "rl", "agreement/mtp_")
    panels = {
        "Reward": [Panel(reward)],
        "Entropy": [Panel(entropy, include_zero=True)],
        "MTP agreement with the main head": [Panel(agreement, percent=True)],
        "Speculative decoding": _draft_panels(run),
        "MTP loss": [
            Panel(depth_series(run, "rl", "loss/mtp_"), caption="cross-entropy"),
            Panel(depth_series(run, "rl", "loss/head_mtp_"), caption="distance to the main head"),
        ],
        "Gradient norms": _gradient_panels(run, "rl"),
        "Balance loss of experts": _balance_panels(run, "rl"),
        "Policy update": _update_panels(run),
        "Correction for the rollout's policy": _correction_panels(run),
        "Response length": _length_panels(run),
        "Rollout": _rollout_panels(run),
        "Weights of the rollout": _weights_panels(run),
    }
    cards = [_accuracy_card(run), _sets_card(run)]
    cards += [card(title, group) for title, group in panels.items()]
    return [text for text in cards if text]


def pretrain_cards(run: RunData) -> list[str]:
    """Return the plots of the pretraining phase as HTML."""
    main = some_series(run, [("loss/main", "main head", MAIN_COLOR)], "pretrain")
    speed = some_series(run, [("tokens_per_second", "all ranks", MAIN_COLOR)], "pretrain")
    agreement = depth_series(run, "pretrain", "agreement/mtp_")
    pass_rate = some_series(run, [("pass@1", "held-out problems", MAIN_COLOR)], "pretrain")
    panels = {
        "Loss": [Panel(main + depth_series(run, "pretrain", "loss/mtp_"))],
        "Sampled pass@1": [Panel(pass_rate, percent=True)],
        "MTP agreement with the main head": [Panel(agreement, percent=True)],
        "Gradient norms": _gradient_panels(run, "pretrain"),
        "Balance loss of experts": _balance_panels(run, "pretrain"),
        "Tokens per second": [Panel(speed, include_zero=True)],
    }
    cards = [card(title, group, x_label="pretraining step") for title, group in panels.items()]
    return [text for text in cards if text]


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


def _accuracy_card(run: RunData) -> str:
    """Accuracy on training prompts as a curve, on the validation problems as points."""
    series = some_series(run, [("rollout/accuracy", "training prompts", 7)])
    main = run.accuracy_metric
    names = [main] if main else []
    names += [n for n in run.names("validation") if n.startswith("pass@") and n != main]
    for name, color in zip(names, (1, 4, 6, 3), strict=False):
        points = run.points("validation", name)
        series.append(Series(f"validation {name}", points, color, name != main, smoothed=False))
    hint = "Points: the validation problems. Curve: the prompts of each RL step."
    return card("Accuracy", [Panel(series, percent=True)], hint, wide=True)


def _sets_card(run: RunData) -> str:
    """Accuracy on each of several sets of validation problems."""
    main, sets = run.accuracy_metric, run.validation_sets
    if main is None or len(sets) < 2:
        return ""
    series = [
        Series(
            name,
            run.points("validation", f"{name}/{main}"),
            1 + place % _SET_COLORS,
            smoothed=False,
        )
        for place, name in enumerate(sets)
    ]
    hint = f"Validation {main}; the curve above is their mean."
    return card("Accuracy by set", [Panel(series, percent=True)], hint, wide=True)


def _mean_scores(run: RunData) -> list[Series]:
    """Scores of the validation problems, of a verifier with partial credit."""
    name = run.score_metric
    if name is None:
        return []
    points = run.points("validation", name)
    return [Series(f"validation {name}", points, depth_color(1), smoothed=False)]


def _gradient_panels(run: RunData, phase: str) -> list[Panel]:
    trunk = some_series(run, [("grad_norm/trunk", "trunk", MAIN_COLOR)], phase)
    head = some_series(run, [("grad_norm/head", "MTP heads", depth_color(1))], phase)
    return [Panel(trunk, include_zero=True), Panel(head, include_zero=True)]


def _balance_panels(run: RunData, phase: str) -> list[Panel]:
    wanted = [
        ("routing/balance", "trunk", MAIN_COLOR),
        ("routing/balance_mtp", "MTP layers", depth_color(1)),
    ]
    return [Panel(some_series(run, wanted, phase), caption="even scores: 1")]


def _length_panels(run: RunData) -> list[Panel]:
    lengths = [("rollout/length_max", "longest", 7), ("rollout/length_mean", "mean", MAIN_COLOR)]
    cut = [("rollout/truncated", "cut off at the limit", 2)]
    return [
        Panel(some_series(run, lengths), include_zero=True, caption="tokens"),
        Panel(some_series(run, cut), percent=True, include_zero=True),
    ]


def _rollout_panels(run: RunData) -> list[Panel]:
    speed = [("rollout/tokens_per_second", "tokens per second", MAIN_COLOR)]
    dropped = [("rollout/dropped_groups", "groups dropped", 2)]
    return [
        Panel(some_series(run, speed), include_zero=True),
        Panel(some_series(run, dropped), include_zero=True),
    ]


def _weights_panels(run: RunData) -> list[Panel]:
    """How old the weights were that responses come from, and how long new ones take."""
    lag = [("lag/max", "largest", 7), ("lag/mean", "mean over tokens", MAIN_COLOR)]
    several = [("lag/straddling", "responses over several versions", 4)]
    update = [("time/update_weights", "seconds of an update", 5)]
    # an engine in the training processes has its weights at once
    times = some_series(run, update) if server_numbers(run) else []
    return [
        Panel(some_series(run, lag), include_zero=True, caption="RL steps behind training"),
        Panel(some_series(run, several), percent=True, include_zero=True),
        Panel(times, include_zero=True),
    ]


def _draft_panels(run: RunData) -> list[Panel]:
    """Drafts by their place: depth k drafts the k-th token, and the last depth the others."""
    lengths = some_series(run, [("draft/acceptance_length", "tokens a trunk pass", MAIN_COLOR)])
    measured = acceptance_lengths(run)
    if measured:
        lengths.append(Series("validation", measured, depth_color(1), smoothed=False))
    return [
        Panel(
            depth_series(run, "rl", "draft/accepted_", "draft"), percent=True, caption="accepted"
        ),
        Panel(
            depth_series(run, "rl", "draft/proposed_", "draft"), percent=True, caption="in passes"
        ),
        Panel(lengths if run.depths("rl", "draft/accepted_") else []),
    ]


def _update_panels(run: RunData) -> list[Panel]:
    clipped = [("clip_fraction/low", "clipped low", 4), ("clip_fraction/high", "clipped high", 6)]
    gap = [("logprob_gap/mean", "log-prob gap, rollout to training", 7)]
    return [
        Panel(some_series(run, clipped), percent=True, include_zero=True),
        Panel(some_series(run, gap), include_zero=True),
    ]


def _correction_panels(run: RunData) -> list[Panel]:
    left_out = [
        ("correction/rejected/tokens", "tokens rejected", 2),
        ("correction/rejected/sequences", "sequences rejected", 4),
        ("correction/weight/high", "weights above the range", 6),
        ("correction/weight/low", "weights below it", 7),
    ]
    effective = [("correction/weight/effective", "effective share of tokens", MAIN_COLOR)]
    return [
        Panel(some_series(run, left_out), percent=True, include_zero=True),
        Panel(some_series(run, effective), percent=True, include_zero=True),
    ]


def _time_series(run: RunData) -> list[Series]:
    """The phases of an RL step, and what is left of `time/step` besides them as "other"."""
    series = some_series(run, _TIME_PHASES)
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
