"""``megatron-occ eval``: checkpoints on sets of held-out problems, with a table to read."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_occ.commands.configuration import add_config_options, checked_config
from megatron_occ.commands.running import running
from megatron_occ.config import ConfigError, help_text

HELP = "evaluate checkpoints on held-out sets: avg@k, pass@k, maj@k"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of a configuration, the checkpoints, and where the results go."""
    parser.epilog = help_text()
    add_config_options(parser)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        action="append",
        metavar="FOLDER",
        help="checkpoint folder; given several times, a row of the table each",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where evaluation.html, results.json and responses.jsonl go, in place of what is "
        "there of these (default: eval/PHASE_STEP in run_dir)",
    )


def run(options: argparse.Namespace) -> None:
    """Evaluate, write page, figures and responses, and print the table."""
    config = checked_config(options)
    if config is None:
        return
    _check_once(options.checkpoint)
    with running(config) as run:
        from megatron_occ.phases.evaluation import default_folder, evaluate_checkpoints
        from megatron_occ.phases.start import checked_inputs

        inputs = checked_inputs(run, evaluates=True)
        folder = options.out or default_folder(Path(config.run_dir), options.checkpoint)
        text = evaluate_checkpoints(run, inputs, options.checkpoint, folder)
        if run.layout.is_main:
            print(text)


def _check_once(checkpoints: list[Path]) -> None:
    """Refuse a checkpoint that is given twice.

    Raises:
        ConfigError: see above.
    """
    places = [path.absolute() for path in checkpoints]
    twice = next((path for path in places if places.count(path) > 1), None)
    if twice is not None:
        raise ConfigError(f"--checkpoint {twice}: is given twice. Leave one out")
