"""Builds `report.html`: one file without scripts that needs no network, from what a run logged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_occ.observe import report_plots, report_tables
from megatron_occ.observe.html_page import grid, html_page, section, write_page
from megatron_occ.observe.run_data import RunData, load_run, started_text
from megatron_occ.observe.servers_section import servers_section
from megatron_occ.observe.text import escape
from megatron_occ.observe.trunk_section import trunk_section

REPORT_FILE = "report.html"


def write_report(run_dir: str | Path, parts: Sequence[str | Path] | None = None) -> Path:
    """Write `<run_dir>/report.html` and return its path.

    `parts` are the folders that hold the logs, e.g. one for pretraining and one for RL; by default
    `run_dir` itself and its sub-folders `pretrain` and `rl`. What a run did not log is left out.

    Raises FileNotFoundError for a folder that does not exist, and ValueError if none of the parts
    holds any metrics.
    """
    return write_page(Path(run_dir) / REPORT_FILE, render_report(load_run(run_dir, parts)))


def render_report(run: RunData) -> str:
    """Return the whole page."""
    body = (
        f"{_head(run)}{report_tables.tiles(run)}{_sections(run)}"
        "<footer>Written by megatron_occ from metrics.jsonl, rollouts.jsonl and config.yaml. "
        "Faint lines are raw values, solid ones running medians; legends give the last value."
        "</footer>"
    )
    return html_page(f"{run.name}: run report", body)


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
        section("Events", events),
        section("Reinforcement learning", grid(report_plots.rl_cards(run))),
        section("Does MTP move the trunk?", trunk_section(run)),
        section("Time", report_plots.time_card(run)),
        section("Rollout servers", servers_section(run)),
        section("Pretraining", grid(report_plots.pretrain_cards(run))),
        section(
            "Sample responses",
            report_tables.samples_section(run),
            "From the rollouts of a few steps, first to last: up to two right and two wrong ones.",
        ),
        section("Details", _details(run)),
    ]
    return "".join(parts)


def _details(run: RunData) -> str:
    blocks = [("All logged metrics", report_tables.metrics_section(run))]
    blocks += [(name, report_tables.config_block(text)) for name, text in run.configs]
    return "".join(
        f"<details><summary>{escape(title)}</summary>{body}</details>" for title, body in blocks
    )
