"""``megatron-occ demo``: the command ``rl`` on conf/demo.yaml."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_occ.commands import rl
from megatron_occ.commands.configuration import add_config_options, add_resume, checked_config

HELP = "pretrain a small model, improve it by RL, write a report"

_VALUES = (
    "The values are those of conf/demo.yaml, and the defaults of all other keys:\n"
    "`megatron-occ demo --print-config` prints them, `megatron-occ rl --help` explains the keys."
)
# from a checkout the demo needs no --config, wherever it is started
_CONFIG = Path(__file__).resolve().parents[2] / "conf" / "demo.yaml"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of ``rl``."""
    parser.epilog = _VALUES
    add_config_options(parser, in_place_of="conf/demo.yaml")
    add_resume(parser)


def run(options: argparse.Namespace) -> None:
    """Pretrain, run RL, and write the report."""
    config = checked_config(options, default=_CONFIG)
    if config is not None:
        rl.train(config, resume=options.resume)
