"""``megatron-occ audit``: whether MTP's gradient points where RL's does, on a checkpoint."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from pathlib import Path

from megatron_occ.commands.configuration import add_config_options, checked_config
from megatron_occ.commands.running import running
from megatron_occ.config import Config, ConfigError, help_text, limits
from megatron_occ.config.schema_mtp import HeadConfig, TrunkConfig
from megatron_occ.config.sources import read_override

HELP = "measure how well MTP's gradient aligns with RL's at a checkpoint"
RECORD_FILE, SUMMARY_FILE, PAGE_FILE = "record.json", "audit.json", "audit.html"
# of which a jackknife can leave one out
MIN_MINI_BATCHES = 4


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
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--window",
        type=_at_least_one,
        default=8,
        metavar="N",
        help="mini-batches of earlier rounds that each is paired with, whose gradients are kept "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where audit.html and audit.json go (default: audit/PHASE_STEP in run_dir)",
    )


def _at_least_one(text: str) -> int:
    number = int(text)
    if not 1 <= number <= limits.STEPS:
        raise argparse.ArgumentTypeError(f"{text}: give 1 or more, at most {limits.STEPS:,}")
    return number


def run(options: argparse.Namespace) -> None:
    """Measure, print the table, and write page and figures."""
    _check_overrides(options.overrides)
    config = checked_config(options, change=audit_config)
    if config is None:
        return
    _check_pairs(options.rounds, config.rl.mini_batches, options.window)
    checkpoint = options.checkpoint
    name = f"{checkpoint.parent.name}_{checkpoint.name}"
    folder = options.out or Path(config.run_dir) / "audit" / name
    with running(config) as run:
        # imported late: these bring torch
        from megatron_occ.audit.page import write_audit_page
        from megatron_occ.audit.summary import summarize
        from megatron_occ.audit.text import audit_text
        from megatron_occ.phases.audit import audit
        from megatron_occ.phases.start import check_checkpoint, checked_inputs

        check_checkpoint(run, checkpoint)
        inputs = checked_inputs(run, trains=True)
        record = audit(run, inputs, checkpoint, rounds=options.rounds, window=options.window)
        if not run.layout.is_main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD_FILE).write_text(json.dumps(record, allow_nan=False))
        summary = summarize(record)
        (folder / SUMMARY_FILE).write_text(json.dumps(summary, indent=1, allow_nan=False))
        write_audit_page(folder / PAGE_FILE, summary)
        print(audit_text(summary))
        print(f"\npage: {folder / PAGE_FILE}")


def _check_overrides(overrides: Sequence[str]) -> None:
    """Refuse what an audit would not read; in files it may stand, since a run reads it.

    Raises:
        ConfigError: see above.
    """
    for word in overrides:
        keys = [given.key for given in read_override(word)]
        if any(key.startswith("mtp.trunk.") or key == "mtp.preset" for key in keys):
            raise ConfigError(
                f"{word}: an audit measures its own signals one by one, whatever MTP sends into "
                "the trunk. Leave it out"
            )


def _check_pairs(rounds: int, mini_batches: int, window: int) -> None:
    """Refuse before anything is measured what would have no standard error.

    Pairs are of different rounds. With two rounds and a window of 1 the last mini-batch of the
    first is in every pair.

    Raises:
        ConfigError: see above.
    """
    enough = max(2, -(-MIN_MINI_BATCHES // mini_batches))
    if rounds < enough:
        raise ConfigError(
            f"--rounds {rounds}: {rounds * mini_batches} mini-batches, of which those of different "
            f"rounds are paired, give no standard error. Give --rounds {enough} or more"
        )
    if rounds == 2 and window == 1:
        raise ConfigError(
            "--window 1: with --rounds 2 one mini-batch would be in every pair. Give --rounds 3 or "
            "more, or --window 2"
        )


def audit_config(config: Config) -> Config:
    """The configuration of an audit: what MTP sends into the trunk is measured, not applied.

    Gradients are taken one by one, which an overlapped reduction does not allow, and the
    overlapped gathering needs that; neither changes a number.
    """
    config = copy.deepcopy(config)
    config.mtp.preset = None
    config.mtp.trunk = TrunkConfig(signal="none", coefficient="fixed")
    if config.mtp.head.signal in ("none", "same_as_trunk"):
        config.mtp.head = HeadConfig(signal="ce")
    config.mtp.head.states = "training"
    config.rl.train_trunk = True
    # updates between measurements follow RL's gradient alone, which is what is measured
    config.rl.balance_loss = 0.0
    # the policy has to move for the paper's proxies, by as much as in the middle of a run
    config.rl.optimizer.warmup_steps = 0
    config.rl.optimizer.schedule = "constant"
    config.rl.optimizer.min_lr = 0.0
    config.parallel.overlap_grad_reduce = config.parallel.overlap_param_gather = False
    return config
