"""What commands with a configuration share: options, and what is checked before torch is there."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_occ.commands.dry_run import Machine, dry_run
from megatron_occ.config import Config, ConfigError, load_config, to_yaml, validate
from megatron_occ.observe.metrics import LOCK_FILE
from megatron_occ.observe.outlets import missing_packages


def add_config_options(parser: argparse.ArgumentParser, *, in_place_of: str | None = None) -> None:
    """Add the options of every command with a configuration.

    Args:
        parser: of the command.
        in_place_of: the file that is read if none is given.
    """
    instead = f", in place of {in_place_of}" if in_place_of else ""
    parser.add_argument(
        "--config",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help=f"yaml file{instead}; given several times, later files win",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. rl.steps=10")
    parser.add_argument("--print-config", action="store_true", help="print the configuration")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check the configuration; print what would run, rank grid, parameters and memory",
    )
    parser.add_argument(
        "--world-size", type=int, metavar="N", help="with --dry-run: ranks (default: $WORLD_SIZE)"
    )
    parser.add_argument(
        "--rank", type=int, metavar="N", help="with --dry-run: the rank to show (default: 0)"
    )
    parser.add_argument(
        "--gpus-per-node",
        type=int,
        metavar="N",
        help="with --dry-run: ranks of a node (default: $LOCAL_WORLD_SIZE, or 8)",
    )
    parser.add_argument(
        "--gpu-memory",
        type=float,
        metavar="GIB",
        help="with --dry-run: memory of a rank, which the largest rank is compared with "
        "(default: 80)",
    )


def add_resume(parser: argparse.ArgumentParser) -> None:
    """Add ``--resume``, which goes with :func:`check_run_folder`."""
    parser.add_argument(
        "--resume", action="store_true", help="continue from the run folder's last checkpoint"
    )


def take_words(
    parser: argparse.ArgumentParser, options: argparse.Namespace, words: Sequence[str]
) -> None:
    """Take the words that argparse left over as overrides, or end with a usage error.

    argparse alone stops taking overrides after the first option.
    """
    takes = hasattr(options, "overrides")
    unknown = [word for word in words if word.startswith("-") or not takes]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if not takes:
        return
    for name in ("world_size", "rank", "gpus_per_node", "gpu_memory"):
        if getattr(options, name, None) is not None and not options.dry_run:
            parser.error(f"--{name.replace('_', '-')} goes with --dry-run alone")
    options.overrides = [*options.overrides, *words]


def checked_config(
    options: argparse.Namespace,
    default: Path | None = None,
    change: Callable[[Config], Config] = lambda config: config,
) -> Config | None:
    """The configuration of a command, checked; None where printing something was all to do.

    Args:
        options: of :func:`add_config_options`, and the name of the command.
        default: the file that is read if none is given.
        change: to what the command makes of a run's configuration, which is what is checked.

    Raises:
        ConfigError: the configuration is refused.
    """
    files = options.config or ([] if default is None else [default])
    config = _load(files, options.overrides)
    if options.print_config:
        print(to_yaml(config), end="")
        return None
    config = change(config)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if options.dry_run:
        window = getattr(options, "window", None)
        dry_run(config, options.command, _machine(options, world_size), window)
        return None
    validate(config, command=options.command, world_size=world_size)
    return config


def _machine(options: argparse.Namespace, world_size: int) -> Machine:
    """What a dry run takes the machines to be; ``world_size`` is the environment's."""
    node = int(os.environ.get("LOCAL_WORLD_SIZE", "8"))
    return Machine(
        world_size=world_size if options.world_size is None else options.world_size,
        rank=options.rank or 0,
        node=node if options.gpus_per_node is None else options.gpus_per_node,
        gpu_memory=80.0 if options.gpu_memory is None else options.gpu_memory,
    )


def _load(files: list[Path], overrides: list[str]) -> Config:
    """The configuration, with the values of the folder in ``model.from_hf``."""
    config = load_config(files, overrides)
    if config.model.from_hf is None:
        return config
    # imported late: it brings torch
    from megatron_occ.convert.settings import folder_settings

    folder = folder_settings(Path(config.model.from_hf))
    return load_config(files, overrides, folder=folder)


def check_packages(config: Config) -> None:
    """Refuse to log to what is not installed.

    Raises:
        ConfigError: with what to install.
    """
    if missing := missing_packages(config.log):
        raise ConfigError(missing)


def check_run_folder(folder: Path, resume: bool) -> None:
    """Refuse a used folder for a new run, and none to resume.

    Raises:
        ConfigError: see above.
    """
    used = any(entry.name != LOCK_FILE for entry in folder.iterdir()) if folder.is_dir() else False
    if used and not resume:
        raise ConfigError(
            f"run_dir={folder} is not empty: continue that run with --resume, or name another "
            "folder with run_dir=..."
        )
    if resume and not used:
        raise ConfigError(f"--resume: run_dir={folder} holds no run: leave --resume out to start")
