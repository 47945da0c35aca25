"""``megatron-occ report``: the page of a run folder, from its logs."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_occ.config import ConfigError

HELP = "rewrite report.html of a run folder"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The folder."""
    parser.add_argument("run_dir", type=Path, help="run folder")


def run(options: argparse.Namespace) -> None:
    """Write the report and print the summary.

    Raises:
        ConfigError: there is no such folder.
    """
    from megatron_occ.observe import print_summary, write_report

    folder = options.run_dir
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder: name the run_dir of a run")
    write_report(folder)
    print_summary(folder)
