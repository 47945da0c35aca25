"""The commands, a file for each, and what they share. Imported, they bring no torch.

A command's ``run`` imports what works with torch or Megatron-Core when it needs it. ``convert``
stands beside the table: it has commands of its own, and reads its words itself.
"""

from __future__ import annotations

import argparse
from typing import Protocol

from megatron_occ.commands import audit, compare, demo, eval, pretrain, report, rl


class Command(Protocol):
    """What a command's file has."""

    HELP: str
    """What the command does; with its name it fits a line of 80 columns."""

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's own options to its parser, and an epilog if it has one."""

    def run(self, options: argparse.Namespace) -> None:
        """Do the work.

        Raises:
            ValueError: what the user gave does not fit; told without a traceback.
        """


COMMANDS: dict[str, Command] = {
    "demo": demo,
    "pretrain": pretrain,
    "rl": rl,
    "eval": eval,
    "audit": audit,
    "report": report,
    "compare": compare,
}
