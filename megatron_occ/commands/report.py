"""``megatron-occ report``: the page of a run folder, or of several side by side."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_occ.config import ConfigError

HELP = "rewrite report.html of a run; put several runs on one page"
_SETTINGS_SHOWN = 12


def add_options(parser: argparse.ArgumentParser) -> None:
    """The folders, and where the page of several goes."""
    parser.add_argument("run_dir", type=Path, nargs="+", help="run folder, or several to compare")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.html",
        help="page of several runs (default: side_by_side.html in the folder that holds them all)",
    )


def run(options: argparse.Namespace) -> None:
    """Write the report and print the summary.

    Raises:
        ConfigError: a folder is missing or no run, or the page can't be written.
    """
    folders, output = options.run_dir, options.output
    if len(folders) > 1:
        _report_several(folders, output)
        return
    if output is not None:
        raise ConfigError(
            f"--output {output}: is for several run folders; the page of one is its report.html. "
            "Leave --output out"
        )
    _report_one(folders[0])


def _report_one(folder: Path) -> None:
    from megatron_occ.observe import print_summary, write_report

    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder: name the run_dir of a run")
    write_report(folder)
    print_summary(folder)


def _report_several(folders: Sequence[Path], output: Path | None) -> None:
    from megatron_occ.observe.several import differences, load_several, remarks
    from megatron_occ.observe.several_figures import figures, settings_table, terminal_table
    from megatron_occ.observe.several_page import SIDE_BY_SIDE_FILE, write_side_by_side

    common = Path(os.path.commonpath([folder.resolve() for folder in folders]))
    path = output or common / SIDE_BY_SIDE_FILE
    if path.suffix != ".html" or path.is_dir():
        raise ConfigError(f"--output {path}: must be a file that ends in .html")
    runs = load_several(folders)
    try:
        write_side_by_side(runs, path)
    except OSError as error:
        raise ConfigError(
            f"{path}: can't be written: {error.strerror}. Name another file with --output"
        ) from error
    print(terminal_table([each.label for each in runs], figures(runs)))
    found = differences(runs)
    if found.values:
        print(f"\n{settings_table(found, _SETTINGS_SHOWN)}")
    for remark in remarks(runs):
        print(f"\n{remark}")
    print(f"\npage  {path}")
