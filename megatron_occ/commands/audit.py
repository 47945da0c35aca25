"""``megatron-occ audit``: whether MTP's gradient points where RL's does, on a checkpoint."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatron_occ.commands.configuration import add_config_options, checked_config
from megatron_occ.commands.running import running
from megatron_occ.config import ConfigError, help_text

HELP = "measure how MTP's gradient lies to RL's on a checkpoint"
RAW_FILE, SUMMARY_FILE, PAGE_FILE = "raw.json", "audit.json", "audit.html"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of a configuration, the checkpoint, and how long to measure."""
    parser.epilog = help_text()
    add_config_options(parser)
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint folder")
    parser.add_argument(
        "--rounds",
        type=_at_least_one,
        default=16,
        metavar="N",
        help="RL steps' worth of fresh responses, rl.mini_batches measured mini-batches each "
        "(default: 16)",
    )
    parser.add_argument(
        "--window",
        type=_at_least_one,
        default=8,
        metavar="N",
        help="earlier mini-batches that each is paired with; their gradients are kept (default: 8)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where audit.html and audit.json go (default: audit/PHASE_STEP in run_dir)",
    )


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: give 1 or more")
    return number


def run(options: argparse.Namespace) -> None:
    """Measure, print the table, and write page and figures."""
    config = checked_config(options)
    if config is None:
        return
    mini_batches = options.rounds * config.rl.mini_batches
    if mini_batches < 3:
        raise ConfigError(
            f"--rounds {options.rounds}: {mini_batches} mini-batches give no standard error. "
            "Give more rounds"
        )
    checkpoint = options.checkpoint
    name = f"{checkpoint.parent.name}_{checkpoint.name}"
    folder = options.out or Path(config.run_dir) / "audit" / name
    # imported late: it brings torch
    from megatron_occ.audit.page import render_page
    from megatron_occ.audit.summary import summarise
    from megatron_occ.audit.text import table
    from megatron_occ.phases.audit import audit, audit_config
    from megatron_occ.phases.start import check_checkpoint, checked_inputs

    with running(audit_config(config)) as run:
        check_checkpoint(run, checkpoint)
        inputs = checked_inputs(run, trains=True)
        raw = audit(run, inputs, checkpoint, rounds=options.rounds, window=options.window)
        if not run.layout.is_main:
            return
        summary = summarise(raw)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RAW_FILE).write_text(json.dumps(raw))
        (folder / SUMMARY_FILE).write_text(json.dumps(summary, indent=1))
        (folder / PAGE_FILE).write_text(render_page(summary), encoding="utf-8")
        print(table(summary))
        print(f"\npage: {folder / PAGE_FILE}")
