"""Builds `report.html`: one file without scripts that needs no network, from what a run logged."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from megatron_occ.observe import report_plots, report_tables
from megatron_occ.observe.plot import plot_style
from megatron_occ.observe.run_data import RunData, load_run, started_text
from megatron_occ.observe.text import escape

REPORT_FILE = "report.html"
# Model output is shown in this page. It is escaped; this also forbids the browser to run or to
# fetch anything, should one escape ever be missing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def write_report(run_dir: str | Path, parts: Sequence[str | Path] | None = None) -> Path:
    """Write `<run_dir>/report.html` and return its path.

    `parts` are the folders that hold the logs, e.g. one for pretraining and one for RL; by default
    `run_dir` itself and its sub-folders `pretrain` and `rl`. What a run did not log is left out.

    Raises FileNotFoundError for a folder that does not exist, and ValueError if none of the parts
    holds any metrics.
    """
    page = render_report(load_run(run_dir, parts))
    path = Path(run_dir) / REPORT_FILE
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)
    return path


def render_report(run: RunData) -> str:
    """Return the whole page."""
    css = resources.files("megatron_occ.observe").joinpath("report.css").read_text("utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escape(run.name)}: run report</title>"
        f"<style>{plot_style()}{css}</style></head><body><main>"
        f"{_head(run)}{report_tables.tiles(run)}{_sections(run)}"
        "<footer>Written by megatron_occ from metrics.jsonl, rollouts.jsonl and config.yaml. "
        "Faint lines are raw values, solid ones running medians; legends give the last value."
        "</footer></main></body></html>\n"
    )


def _head(run: RunData) -> str:
    kind = "done" if run.finished else "open"
    return (
        f'<header><p class="eyebrow">Run report</p><h1>{escape(run.name)}</h1>'
        f'<p class="meta"><span class="status {kind}">{escape(run.status)}</span>'
        f"started {escape(started_text(run))}</p></header>"
    )


def _sections(run: RunData) -> str:
    events = report_tables.events_section(run)
    parts = [
        _section("Events", events),
        _section("Reinforcement learning", _grid(report_plots.rl_cards(run))),
        _section("Time", report_plots.time_card(run)),
        _section("Pretraining", _grid(report_plots.pretrain_cards(run))),
        _section(
            "Sample responses",
            report_tables.samples_section(run),
            "From the rollouts of a few steps, first to last: up to two right and two wrong ones.",
        ),
        _section("Details", _details(run)),
    ]
    return "".join(parts)


def _section(title: str, content: str, hint: str = "") -> str:
    if not content:
        return ""
    note = f'<p class="hint">{escape(hint)}</p>' if hint else ""
    return f"<section><h2>{escape(title)}</h2>{note}{content}</section>"


def _grid(cards: list[str]) -> str:
    return f'<div class="grid">{"".join(cards)}</div>' if cards else ""


def _details(run: RunData) -> str:
    blocks = [("All logged metrics", report_tables.metrics_section(run))]
    blocks += [(name, report_tables.config_block(text)) for name, text in run.configs]
    return "".join(
        f"<details><summary>{escape(title)}</summary>{body}</details>" for title, body in blocks
    )
