"""The few lines that a run prints when it ends."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from megatron_occ.observe.report import REPORT_FILE
from megatron_occ.observe.run_data import (
    RunData,
    acceptance_lengths,
    accuracy_basis,
    accuracy_change,
    load_run,
)
from megatron_occ.observe.text import (
    format_duration,
    format_number,
    format_percent,
    format_points,
)
from megatron_occ.observe.trunk_effect import trunk_verdict


def print_summary(
    run_dir: str | Path, parts: Sequence[str | Path] | None = None, stream: TextIO | None = None
) -> None:
    """Print what came out of a run: pass@1 before and after, reward, time, path of the report.

    `parts` as in `write_report`. Raises FileNotFoundError for a folder that does not exist, and
    ValueError if there are no metrics.
    """
    stream = stream if stream is not None else sys.stdout
    run = load_run(run_dir, parts)
    report = Path(run_dir) / REPORT_FILE
    rows = _rows(run)
    if report.is_file():
        rows.append(("report", str(report)))
    width = max(len(label) for label, _ in rows)
    print(f"{run.name}: {run.status}", file=stream)
    for label, text in rows:
        print(f"  {label:<{width}}  {text}", file=stream)


def _rows(run: RunData) -> list[tuple[str, str]]:
    rows = []
    change = accuracy_change(run)
    if change is not None:
        before, after = change
        basis = accuracy_basis(run)
        text = f"{format_percent(before)} -> {format_percent(after)}"
        text += f"  ({format_points(after - before)} points{'; ' + basis if basis else ''})"
        rows.append(("sampled pass@1", text))
    if run.score_metric is not None:
        scores = [score for _, score in run.points("validation", run.score_metric)]
        text = f"{format_number(scores[0])} -> {format_number(scores[-1])}"
        rows.append(("mean score", f"{text}  ({run.score_metric})"))
    for label, phase, name, form in (
        ("reward", "rl", "reward/mean", format_number),
        ("MTP agreement", "rl", "agreement/mtp_1", format_percent),
        ("pretraining loss", "pretrain", "loss/main", format_number),
    ):
        level = run.level(phase, name)
        if level is not None:
            rows.append((label, f"{form(level.first)} -> {form(level.last)}  ({level.basis})"))
    lengths = acceptance_lengths(run)
    if lengths:
        text = f"{lengths[0][1]:.2f} -> {lengths[-1][1]:.2f}"
        rows.append(("acceptance length", f"{text}  (tokens a trunk pass, validation problems)"))
    verdict = trunk_verdict(run)
    if verdict is not None:
        rows.append(("MTP -> trunk", f"{verdict.answer}: {verdict.sentence}"))
    steps = [(run.last_step("pretrain"), "pretraining"), (run.last_step("rl"), "RL")]
    counts = [f"{count:,} {name}" for count, name in steps if count is not None]
    rows.append(("steps", ", ".join(counts)))
    rows.append(("wall time", format_duration(run.wall_seconds)))
    return rows
