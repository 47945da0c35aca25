"""The command line: the parser, and what each command calls.

Help, ``--print-config`` and refused configurations answer without importing torch.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_occ import __version__
from megatron_occ.compare import command as compare
from megatron_occ.config import (
    Config,
    ConfigError,
    help_text,
    load_config,
    to_yaml,
    validate,
)
from megatron_occ.convert_cli import main as convert
from megatron_occ.dry_run import dry_run

if TYPE_CHECKING:
    from megatron_occ.run import Run

_DESCRIPTION = (
    "Pretraining and reinforcement learning with verifiable rewards for language models with "
    "multi-token prediction heads, on Megatron-Core."
)
# each fits a line of 80 columns
_COMMANDS = {
    "demo": "pretrain a small model, improve it by RL, write a report",
    "pretrain": "pretrain a model with MTP layers",
    "rl": "RL; without rl.init_from or model.from_hf it pretrains first",
    "eval": "validate a checkpoint on held-out problems",
    "report": "write report.html of a run folder again",
    "compare": "regimes x seeds from one checkpoint, and a page: compare --help",
    "convert": "checkpoints from and to Hugging Face: convert --help",
}
_DEMO_VALUES = (
    "The values are those of conf/demo.yaml, and the defaults of all other keys:\n"
    "`megatron-occ demo --print-config` prints them, `megatron-occ rl --help` explains the keys."
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script; exits with 1 on a configuration or data error.

    Ctrl-C exits with 130, as shells expect of a command that SIGINT ended.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["convert"]:
        convert(given[1:])
        return
    options = _parse(given)
    quiet = _rank() != 0 or getattr(options, "dry_run", False)
    logging.basicConfig(level=logging.ERROR if quiet else logging.INFO, format="%(message)s")
    try:
        _dispatch(options)
    except (ConfigError, ValueError) as error:
        if options.debug:
            raise
        sys.exit(f"megatron-occ: error: {error}")
    except KeyboardInterrupt as interrupt:
        if _rank() == 0:
            print(": ".join(("megatron-occ: interrupted", *interrupt.args)), file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        # the reader has seen enough; without this Python complains when it flushes at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse with overrides anywhere: argparse alone stops taking them after the first option."""
    parser = _parser()
    if not arguments:
        parser.print_help(sys.stderr)
        sys.exit(2)
    options, rest = parser.parse_known_args(arguments)
    unknown = [word for word in rest if word.startswith("-") or options.command == "report"]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    for name in ("world_size", "rank"):
        if getattr(options, name, None) is not None and not options.dry_run:
            parser.error(f"--{name.replace('_', '-')} goes with --dry-run alone")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-occ",
        description=_DESCRIPTION,
        epilog="`megatron-occ COMMAND --help` shows the options of a command; that of rl shows "
        "every configuration key.",
    )
    parser.add_argument(
        "--version",
        action="version",
        version=_versions(),
        help="show the versions of megatron-occ, megatron-core and torch",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, text in _COMMANDS.items():
        if name == "convert":
            commands.add_parser(name, help=text, add_help=False)
            continue
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=_epilog(name),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if name == "compare":
            compare.add_options(command)
        elif name == "report":
            command.add_argument("run_dir", type=Path, help="run folder")
        else:
            _add_run_options(command, name)
    return parser


def _epilog(command: str) -> str | None:
    if command in ("report", "compare"):
        return None
    return _DEMO_VALUES if command == "demo" else help_text()


def _versions() -> str:
    """Of the package and of what its results depend on, without an import of either."""
    found = [f"megatron-occ {__version__}"]
    for name in ("megatron-core", "torch"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed as a package")
    return ", ".join(found)


def _add_run_options(command: argparse.ArgumentParser, name: str) -> None:
    instead = ", in place of conf/demo.yaml" if name == "demo" else ""
    command.add_argument(
        "--config",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help=f"yaml file{instead}; given several times, later files win",
    )
    command.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. rl.steps=10")
    command.add_argument("--print-config", action="store_true", help="print the configuration")
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="check the configuration; print what would run, rank grid, parameters and memory",
    )
    command.add_argument(
        "--world-size", type=int, metavar="N", help="with --dry-run: ranks (default: $WORLD_SIZE)"
    )
    command.add_argument(
        "--rank", type=int, metavar="N", help="with --dry-run: the rank to build (default: 0)"
    )
    if name == "eval":
        command.add_argument("--checkpoint", type=Path, required=True, help="checkpoint folder")
    else:
        command.add_argument(
            "--resume", action="store_true", help="continue from the run folder's last checkpoint"
        )


def _dispatch(options: argparse.Namespace) -> None:
    if options.command == "report":
        _report(options.run_dir)
        return
    if options.command == "compare":
        compare.run(options)
        return
    config = _load(options)
    if options.print_config:
        print(to_yaml(config), end="")
        return
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if options.dry_run:
        world_size = world_size if options.world_size is None else options.world_size
        dry_run(config, options.command, world_size, options.rank or 0)
        return
    validate(config, command=options.command, world_size=world_size)
    if options.command != "eval":
        _check_run_folder(Path(config.run_dir), options.resume)
    _run(options, config)


def _load(options: argparse.Namespace) -> Config:
    """The configuration, with the values of the folder in ``model.from_hf``."""
    given = _config_files(options), options.overrides
    config = load_config(*given)
    if config.model.from_hf is None:
        return config
    # imported late: it brings torch
    from megatron_occ.convert.settings import folder_settings

    return load_config(*given, folder=folder_settings(Path(config.model.from_hf)))


def _config_files(options: argparse.Namespace) -> list[Path]:
    if options.config or options.command != "demo":
        return options.config
    # from a checkout the demo needs no --config, wherever it is started
    return [Path(__file__).resolve().parent.parent / "conf" / "demo.yaml"]


def _check_run_folder(folder: Path, resume: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"run_dir={folder} is a file: name a folder with run_dir=...")
    used = folder.is_dir() and any(folder.iterdir())
    if used and not resume:
        raise ConfigError(
            f"run_dir={folder} is not empty: continue that run with --resume, or name another "
            "folder with run_dir=..."
        )
    if resume and not used:
        raise ConfigError(f"--resume: run_dir={folder} holds no run: leave --resume out to start")


def _run(options: argparse.Namespace, config: Config) -> None:
    # imported late: these bring torch and Megatron-Core
    from megatron_occ import run as runs
    from megatron_occ.mcore.startup import shutdown
    from megatron_occ.rollout import EngineError

    command = options.command
    run = runs.Run(config, resume=command != "eval" and options.resume)
    try:
        inputs = run.read_inputs(command)
        if command == "eval":
            results = runs.evaluate_checkpoint(run, inputs, options.checkpoint)
            if run.layout.is_main:
                print("\n".join(f"{name} {value:g}" for name, value in results.items()))
            return
        run.open_folder()
        if command == "pretrain":
            runs.pretrain(run, inputs)
            run.finish("pretrain")
            return
        runs.reinforce(run, inputs, runs.first_weights(run, inputs))
        run.finish("rl")
    except EngineError as error:
        # the kind that is told without a traceback, and known without torch
        raise ValueError(str(error)) from error
    except KeyboardInterrupt as interrupt:
        hint = () if command == "eval" else (_how_to_go_on(run),)
        raise KeyboardInterrupt(*hint) from interrupt
    finally:
        shutdown()


def _how_to_go_on(run: Run) -> str:
    """What --resume makes of an interrupted run."""
    newest = run.latest("rl") or run.latest("pretrain")
    if newest is not None:
        return f"the same command with --resume goes on from {newest}"
    if run.folder.is_dir():
        return "it has no checkpoint yet: the same command with --resume begins anew"
    return "nothing was written yet"


def _report(folder: Path) -> None:
    from megatron_occ.observe import print_summary, write_report

    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder: name the run_dir of a run")
    write_report(folder)
    print_summary(folder)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
