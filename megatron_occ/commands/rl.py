"""``megatron-occ rl``: reinforcement learning, after pretraining where there is nothing else."""

from __future__ import annotations

import argparse

from megatron_occ.commands.configuration import add_config_options, add_resume, checked_config
from megatron_occ.commands.running import training
from megatron_occ.config import Config, help_text, pretrains_first

HELP = "run RL; pretrain first if no model or checkpoint is given"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of a configuration, and ``--resume``."""
    parser.epilog = help_text()
    add_config_options(parser)
    add_resume(parser)


def run(options: argparse.Namespace) -> None:
    """Train to the last step and write the report."""
    config = checked_config(options)
    if config is not None:
        train(config, resume=options.resume)


def train(config: Config, *, resume: bool) -> None:
    """The whole pipeline of a checked configuration.

    Raises:
        ValueError: something does not fit; told before the run folder is touched where possible.
    """
    with training(config, resume=resume) as run:
        from megatron_occ.phases.fingerprints import check_same_files, keep_fingerprints
        from megatron_occ.phases.rl import check_first_weights, first_weights, reinforce
        from megatron_occ.phases.start import checked_inputs

        check_first_weights(run)
        inputs = checked_inputs(
            run,
            pretrains=pretrains_first(config),
            trains=True,
            validates=True,
            evaluates=config.eval.after_rl,
        )
        check_same_files(run, inputs)
        run.open_folder()
        keep_fingerprints(run, inputs)
        reinforce(run, inputs, first_weights(run, inputs))
        run.finish("rl")
