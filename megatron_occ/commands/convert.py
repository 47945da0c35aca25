"""``megatron-occ convert {import,export,inspect}``; the scripts in ``tools/`` call it too."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_occ.convert.errors import FolderError

HELP = "convert checkpoints from and to Hugging Face folders"
# of an export, by --mtp
_MOST_DEPTHS = {"keep": None, "first": 1, "drop": 0}
_DTYPES = ("float32", "bfloat16", "float16")
_UNITS = {"MB": 10**6, "GB": 10**9}


def main(arguments: Sequence[str] | None = None, *, prog: str = "megatron-occ convert") -> None:
    """Exits with 1 and a message where something does not fit."""
    options = make_parser(prog).parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError) as error:
        if options.debug:
            raise
        if not isinstance(error, FolderError):
            sys.exit(f"{prog}: error: {error}")
        lines = "\n".join(f"  {problem}" for problem in error.problems)
        sys.exit(f"{prog}: error:\n{lines}")
    except KeyboardInterrupt:
        sys.exit(f"{prog}: interrupted; the same command continues")


def make_parser(prog: str = "megatron-occ convert") -> argparse.ArgumentParser:
    """Of the three commands; ``run`` of what it returns does the work."""
    text = "Checkpoints from Hugging Face folders and back, every tensor accounted for."
    parser = argparse.ArgumentParser(prog=prog, description=text)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    _add_import(commands)
    _add_export(commands)
    _add_inspect(commands)
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_import(commands: argparse._SubParsersAction) -> None:
    text = "Hugging Face folder to a Megatron-Core checkpoint"
    command = commands.add_parser("import", help=text, description=text)
    command.add_argument("source", type=Path, help="folder with config.json and safetensors")
    command.add_argument("target", type=Path, help="checkpoint folder to write")
    command.add_argument(
        "--mtp",
        default="keep",
        help="keep (default), drop, init:K (fresh layers), expand:K (copies of the last one)",
    )
    command.add_argument(
        "--verify",
        action="store_true",
        help="compare logits of the result with transformers (whole model in memory, twice)",
    )
    _add_common(command)
    command.set_defaults(run=_import)


def _add_export(commands: argparse._SubParsersAction) -> None:
    text = "checkpoint of this project to a Hugging Face folder"
    command = commands.add_parser("export", help=text, description=text)
    command.add_argument("source", type=Path, help="checkpoint folder, e.g. .../step_000100")
    command.add_argument("target", type=Path, help="folder to write")
    command.add_argument(
        "--mtp", default="keep", choices=tuple(_MOST_DEPTHS), help="MTP layers (default: keep)"
    )
    command.add_argument(
        "--architecture", help="e.g. MiMoForCausalLM (default: where it came from, or what fits)"
    )
    command.add_argument(
        "--like",
        type=Path,
        help="folder whose config.json and tokenizer to keep (default: where it came from)",
    )
    command.add_argument("--shard-size", default="5GB", help="bytes of a file (default: 5GB)")
    command.add_argument(
        "--reader",
        choices=("sglang",),
        help="sglang: its MiMo reads the trunk's state after the final norm (docs/conversion.md)",
    )
    _add_common(command)
    command.set_defaults(run=_export)


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--dtype", choices=_DTYPES, help="of the weights (default: as they are)")
    command.add_argument("--force", action="store_true", help="replace the target")
    command.add_argument(
        "--dry-run", action="store_true", help="list mappings, dtypes, bytes and memory; write none"
    )


def _add_inspect(commands: argparse._SubParsersAction) -> None:
    text = "what a folder or checkpoint holds"
    command = commands.add_parser("inspect", help=text, description=text)
    command.add_argument("source", type=Path, help="Hugging Face folder or checkpoint")
    command.set_defaults(run=_inspect)


def _import(options: argparse.Namespace) -> None:
    # imported late: these bring torch
    import torch

    from megatron_occ.convert.importing import import_folder
    from megatron_occ.convert.plan import MTPChoice, open_source, plan_import
    from megatron_occ.convert.text import done_text, import_text
    from megatron_occ.mcore.versions import installed_version

    mtp = MTPChoice.parse(options.mtp)
    dtype = getattr(torch, options.dtype) if options.dtype else None
    if options.dry_run:
        source = open_source(options.source)
        print(import_text(source, plan_import(source, mtp, dtype)))
        return
    if options.verify:
        from megatron_occ.mcore.verify import check_reference, verify

        check_reference(options.source)
    done = import_folder(
        options.source,
        options.target,
        mtp=mtp,
        dtype=dtype,
        force=options.force,
        megatron_core=installed_version(),
    )
    print(done_text(done, options.target))
    if options.verify:
        print(verify(options.source, options.target))


def _export(options: argparse.Namespace) -> None:
    import torch

    from megatron_occ.convert.checkpoints import export_checkpoint
    from megatron_occ.convert.text import export_text, exported_text

    plan = export_checkpoint(
        options.source,
        options.target,
        architecture=options.architecture,
        like=options.like,
        most_depths=_MOST_DEPTHS[options.mtp],
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        shard=_bytes(options.shard_size),
        force=options.force,
        for_sglang=options.reader == "sglang",
        dry_run=options.dry_run,
    )
    print(export_text(plan) if options.dry_run else exported_text(plan, options.target))


def _inspect(options: argparse.Namespace) -> None:
    from megatron_occ.convert.text import inspect_text

    print(inspect_text(options.source))


def _bytes(text: str) -> int:
    for unit, size in _UNITS.items():
        number = text.upper().removesuffix(unit)
        if number != text.upper() and number.replace(".", "", 1).isdigit() and float(number) > 0:
            return int(float(number) * size)
    raise ValueError(f"--shard-size {text}: write a size such as 500MB or 5GB")
