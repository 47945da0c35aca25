"""``megatron-occ pretrain``: next-token and MTP cross-entropy over a corpus."""

from __future__ import annotations

import argparse

from megatron_occ.commands.configuration import add_config_options, add_resume, checked_config
from megatron_occ.commands.running import training
from megatron_occ.config import help_text

HELP = "pretrain a model with MTP layers"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of a configuration, and ``--resume``."""
    parser.epilog = help_text()
    add_config_options(parser)
    add_resume(parser)


def run(options: argparse.Namespace) -> None:
    """Train to the last step and write the report."""
    config = checked_config(options)
    if config is None:
        return
    with training(config, resume=options.resume) as run:
        from megatron_occ.phases.pretraining import pretrain
        from megatron_occ.phases.start import check_source, checked_inputs

        check_source(run)
        inputs = checked_inputs(run, pretrains=True)
        run.open_folder()
        pretrain(run, inputs)
        run.finish("pretrain")
