"""Key figures of several runs, a line each, for the page and for the terminal."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from megatron_occ.observe.run_data import RunData, seconds_per_step
from megatron_occ.observe.several import NOTHING, Differences, LabelledRun, setting_text
from megatron_occ.observe.text import format_duration, format_number, format_percent

Figure = tuple[str, list[str]]


def figures(runs: Sequence[LabelledRun]) -> list[Figure]:
    """(title, a text for each run) of every figure that at least one of the runs has."""
    wanted: list[tuple[str, Callable[[RunData], str]]] = [
        ("RL steps", lambda run: _steps(run, "rl")),
        ("pass@1 first", lambda run: _pass_rate(run, 0)),
        ("pass@1 final", lambda run: _pass_rate(run, -1)),
        ("pass@1 best (step)", _best_pass_rate),
        ("reward", lambda run: _course(run, "reward/mean")),
        ("entropy", lambda run: _course(run, "entropy")),
        ("acceptance length", lambda run: _course(run, "draft/acceptance_length")),
        *_lambda_figures(runs),
        ("seconds a step", _seconds_a_step),
        ("pretraining steps", lambda run: _steps(run, "pretrain")),
        ("pretraining loss", lambda run: _course(run, "loss/main", "pretrain")),
        ("wall time", lambda run: format_duration(run.wall_seconds)),
        ("alerts", _alerts),
    ]
    found = [(title, [figure(run.data) for run in runs]) for title, figure in wanted]
    return [(title, cells) for title, cells in found if any(cell != NOTHING for cell in cells)]


DEFINITIONS = (
    "pass@1: sampled, of the first, the last and the highest validation; the highest is too high "
    "by what chance gave it. Reward, entropy, acceptance length (tokens a trunk pass of the "
    "rollouts) and pretraining loss: mean over the first and over the last lines of the log, ten "
    "or fewer. Lambda: mean over all steps. Seconds a step: median over RL steps, without "
    "validation and saving, and only as comparable as machine, layout and load were."
)


def _lambda_figures(runs: Sequence[LabelledRun]) -> list[tuple[str, Callable[[RunData], str]]]:
    depths = sorted({k for run in runs for k in run.data.depths("rl", "lambda/mtp_")})
    names = {k: f"lambda/mtp_{k}" for k in depths}
    titles = {k: "lambda" if depths == [1] else f"lambda of depth {k}" for k in depths}
    return [(titles[k], lambda run, name=names[k]: _mean(run, name)) for k in depths]


def _steps(run: RunData, phase: str) -> str:
    step = run.last_step(phase)
    return NOTHING if step is None else f"{step:,}"


def _pass_rates(run: RunData) -> list[tuple[float, float]]:
    points = run.points("validation", run.accuracy_metric) if run.accuracy_metric else []
    return [(x, y) for x, y in points if math.isfinite(y)]


def _pass_rate(run: RunData, place: int) -> str:
    points = _pass_rates(run)
    return format_percent(points[place][1]) if points else NOTHING


def _best_pass_rate(run: RunData) -> str:
    points = _pass_rates(run)
    if not points:
        return NOTHING
    # of equal ones the first
    step, value = max(points, key=lambda point: (point[1], -point[0]))
    return f"{format_percent(value)} ({step:g})"


def _course(run: RunData, name: str, phase: str = "rl") -> str:
    level = run.level(phase, name)
    if level is None:
        return NOTHING
    return f"{format_number(level.first)} → {format_number(level.last)}"


def _mean(run: RunData, name: str) -> str:
    values = [y for _, y in run.points("rl", name) if math.isfinite(y)]
    return format_number(statistics.fmean(values)) if values else NOTHING


def _seconds_a_step(run: RunData) -> str:
    seconds = seconds_per_step(run)
    return format_number(seconds) if math.isfinite(seconds) else NOTHING


def _alerts(run: RunData) -> str:
    count = sum(event.get("kind") == "alert" for event in run.events)
    return str(count) if count else NOTHING


def terminal_table(labels: Sequence[str], shown: Sequence[Figure]) -> str:
    """A line for each figure, a column for each run: few runs fit a terminal's width that way."""
    rows = [("", *labels), *((title, *cells) for title, cells in shown)]
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = []
    for title, *cells in rows:
        padded = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([f"{title:<{widths[0]}}", *padded]).rstrip())
    return "\n".join(lines)


def settings_table(found: Differences, most: int) -> str:
    """The keys in which configurations differ, at most `most` of them, below the runs' columns."""
    shown = list(found.values.items())[:most]
    cells = [(key, [setting_text(value, 24) for value in values]) for key, values in shown]
    table = terminal_table([""] * len(shown[0][1]), cells).partition("\n")[2]
    hidden = len(found.values) - len(shown)
    return f"{table}\n{hidden} more keys differ: see the page" if hidden > 0 else table
