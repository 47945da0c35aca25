"""The command line: the parser around ``commands/``, and how a command ends.

Help, ``--print-config`` and refused configurations answer without importing torch.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from megatron_occ import __version__
from megatron_occ.commands import COMMANDS, convert
from megatron_occ.commands.configuration import take_words
from megatron_occ.config import ConfigError
from megatron_occ.rl.stopping import belong_to_parent

belong_to_parent()

_DESCRIPTION = (
    "Pretraining and reinforcement learning with verifiable rewards for language models with "
    "multi-token prediction heads, on Megatron-Core."
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script; exits with 1 on a configuration or data error.

    Ctrl-C exits with 130, as shells expect of a command that SIGINT ended.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["convert"]:
        convert.main(given[1:])
        return
    options = _parse(given)
    quiet = _rank() != 0 or getattr(options, "dry_run", False)
    logging.basicConfig(level=logging.ERROR if quiet else logging.INFO, format="%(message)s")
    try:
        COMMANDS[options.command].run(options)
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
    except OSError as error:
        # of all others the place in the code says more than the sentence
        if options.debug or error.errno != errno.ENAMETOOLONG:
            raise
        sys.exit(f"megatron-occ: error: {error.strerror}: {error.filename!s:.100}... Shorten it")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    if not arguments:
        parser.print_help(sys.stderr)
        sys.exit(2)
    options, words = parser.parse_known_args(arguments)
    take_words(parser, options, words)
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
    parsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in COMMANDS.items():
        own = parsers.add_parser(
            name,
            help=command.HELP,
            description=command.HELP,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        own.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.add_options(own)
    parsers.add_parser("convert", help=convert.HELP, add_help=False)
    return parser


def _versions() -> str:
    """Of the package and of what its results depend on, without an import of either."""
    found = [f"megatron-occ {__version__}"]
    for name in ("megatron-core", "torch"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed as a package")
    return ", ".join(found)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
