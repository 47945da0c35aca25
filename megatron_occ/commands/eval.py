"""``megatron-occ eval``: pass rates of a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_occ.commands.configuration import add_config_options, checked_config
from megatron_occ.commands.running import running
from megatron_occ.config import help_text

HELP = "validate a checkpoint on held-out problems"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of a configuration, and the checkpoint."""
    parser.epilog = help_text()
    add_config_options(parser)
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint folder")


def run(options: argparse.Namespace) -> None:
    """Print the metrics of validation, one a line."""
    config = checked_config(options)
    if config is None:
        return
    with running(config) as run:
        from megatron_occ.phases.evaluation import evaluate_checkpoint
        from megatron_occ.phases.start import checked_inputs

        inputs = checked_inputs(run, validates=True)
        results = evaluate_checkpoint(run, inputs, options.checkpoint)
        if run.layout.is_main:
            print("\n".join(f"{name} {value:g}" for name, value in results.items()))
