"""The page of several runs side by side: curves over each other, figures, what differs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from megatron_occ.observe.cards import Panel, card
from megatron_occ.observe.html_page import grid, html_page, section, write_page
from megatron_occ.observe.plot import Series
from megatron_occ.observe.several import (
    Differences,
    LabelledRun,
    differences,
    remarks,
    setting_text,
)
from megatron_occ.observe.several_figures import DEFINITIONS, figures
from megatron_occ.observe.text import escape

SIDE_BY_SIDE_FILE = "side_by_side.html"
# (title, metric, percent, include_zero)
_RL_CARDS = (
    ("Reward", "reward/mean", False, False),
    ("Entropy", "entropy", False, True),
    ("Acceptance length", "draft/acceptance_length", False, False),
    ("MTP agreement with the main head", "agreement/mtp_1", True, False),
    ("Response length", "rollout/length_mean", False, True),
    ("Gradient norm of the trunk", "grad_norm/trunk", False, True),
    ("Log-prob gap, rollout to training", "logprob_gap/mean", False, True),
    ("Seconds per step", "time/step", False, True),
)
_PRETRAIN_CARDS = (
    ("Loss of the main head", "loss/main", False, False),
    ("Loss of MTP depth 1", "loss/mtp_1", False, False),
    ("Sampled pass@1", "pass@1", True, False),
    ("Tokens per second", "tokens_per_second", False, True),
)


def write_side_by_side(runs: Sequence[LabelledRun], path: Path) -> Path:
    """Write the page of several runs; return its path."""
    return write_page(path, render_side_by_side(runs))


def render_side_by_side(runs: Sequence[LabelledRun]) -> str:
    """Return the whole page."""
    body = [
        _head(runs),
        section("Key figures", _figures(runs), DEFINITIONS),
        section(
            "Reinforcement learning",
            grid([_accuracy_card(runs), *_lambda_cards(runs), *_cards(runs, "rl", _RL_CARDS)]),
        ),
        section("Pretraining", grid(_cards(runs, "pretrain", _PRETRAIN_CARDS))),
        section("What differs", _differences(runs)),
        "<footer>Written by megatron_occ from metrics.jsonl and config.yaml of each run. Curves "
        "are running medians over the raw values, which are fainter; legends give the last value."
        "</footer>",
    ]
    css = resources.files("megatron_occ.observe").joinpath("several.css").read_text("utf-8")
    title = f"{', '.join(run.label for run in runs)}: side by side"
    return html_page(title, "".join(body), css)


def _head(runs: Sequence[LabelledRun]) -> str:
    notes = "".join(f"<p>{escape(text)}</p>" for text in remarks(runs))
    notes = f'<div class="remarks">{notes}</div>' if notes else ""
    return (
        f'<header><p class="eyebrow">Runs side by side</p><h1>{len(runs)} runs</h1>'
        f'<p class="meta">{"".join(_key(run) for run in runs)}</p></header>{notes}'
    )


def _key(run: LabelledRun) -> str:
    dashed = "dashed" if run.dashed else ""
    return f'<span class="key c{run.color}"><i class="{dashed}"></i>{escape(run.label)}</span>'


def _figures(runs: Sequence[LabelledRun]) -> str:
    rows = "".join(
        f"<tr><th>{escape(title)}</th>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for title, cells in figures(runs)
    )
    return _framed(runs, "", rows)


def _differences(runs: Sequence[LabelledRun]) -> str:
    found = differences(runs)
    parts = []
    if found.values:
        rows = [_difference_row(key, values) for key, values in found.values.items()]
        parts.append(_framed(runs, "key", "".join(rows), "settings"))
    elif all(run.settings for run in runs):
        parts.append('<p class="hint">Nothing but where the runs are written.</p>')
    if found.lacking:
        parts.append(f'<p class="hint">{escape(_lacking_text(found))}</p>')
    return "".join(parts)


def _lacking_text(found: Differences) -> str:
    return (
        "Not in all of the configurations, because other versions wrote them: "
        f"{', '.join(found.lacking)}."
    )


def _difference_row(key: str, values: Sequence[object]) -> str:
    cells = "".join(f"<td><code>{escape(setting_text(value))}</code></td>" for value in values)
    return f"<tr><th><code>{escape(key)}</code></th>{cells}</tr>"


def _framed(runs: Sequence[LabelledRun], corner: str, rows: str, kind: str = "") -> str:
    """A table with a column for each run."""
    head = "".join(f"<td>{_key(run)}</td>" for run in runs)
    table = f"<thead><tr><th>{corner}</th>{head}</tr></thead><tbody>{rows}</tbody>"
    return f'<div class="wide-table"><table class="runs {kind}">{table}</table></div>'


def _cards(
    runs: Sequence[LabelledRun], phase: str, wanted: Sequence[tuple[str, str, bool, bool]]
) -> list[str]:
    label = "RL step" if phase == "rl" else "pretraining step"
    cards = [
        card(
            title,
            [Panel(_overlaid(runs, phase, name), percent=percent, include_zero=zero)],
            x_label=label,
        )
        for title, name, percent, zero in wanted
    ]
    return [text for text in cards if text]


def _accuracy_card(runs: Sequence[LabelledRun]) -> str:
    series = [
        _line(run, run.data.points("validation", run.data.accuracy_metric), smoothed=False)
        for run in runs
        if run.data.accuracy_metric
    ]
    names = sorted({run.data.accuracy_metric or "" for run in runs} - {""})
    hint = f"{' or '.join(names)} on held-out problems."
    return card("Sampled pass@1", [Panel(_finite(series), percent=True)], hint, wide=True)


def _lambda_cards(runs: Sequence[LabelledRun]) -> list[str]:
    depths = sorted({k for run in runs for k in run.data.depths("rl", "lambda/mtp_")})
    cards = [
        card(f"Lambda of depth {k}", [Panel(_overlaid(runs, "rl", f"lambda/mtp_{k}"))])
        for k in depths
    ]
    return [text for text in cards if text]


def _overlaid(runs: Sequence[LabelledRun], phase: str, name: str) -> list[Series]:
    return _finite([_line(run, run.data.points(phase, name)) for run in runs])


def _line(run: LabelledRun, points: list[tuple[float, float]], *, smoothed: bool = True) -> Series:
    return Series(run.label, points, run.color, run.dashed, smoothed)


def _finite(series: Sequence[Series]) -> list[Series]:
    return [s for s in series if any(math.isfinite(y) for _, y in s.points)]
