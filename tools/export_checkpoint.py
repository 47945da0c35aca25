"""A checkpoint as a Hugging Face folder that a rollout server can be started with.

    python tools/export_checkpoint.py --config my_rl.yaml --checkpoint FOLDER --output FOLDER

The configuration is that of the RL run: ``rl.rollout.engine`` names the server. One process on the
CPU, which holds all weights in memory twice.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_occ.config import Config, ConfigError, load_config
from megatron_occ.config.validate_servers import architecture_problems


def main(arguments: Sequence[str] | None = None) -> None:
    """Exits with a message where the checkpoint does not fit."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", action="append", type=Path, default=[], help="yaml file")
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder step_NNNNNN")
    parser.add_argument("--output", type=Path, required=True, help="folder to write, not there yet")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args(arguments)
    try:
        config = load_config(options.config, options.overrides)
        _check(config, options.output)
        export(config, options.checkpoint, options.output)
    except ValueError as error:
        sys.exit(f"error: {error}")


def export(config: Config, checkpoint: Path, output: Path) -> None:
    """Write ``checkpoint``'s weights to ``output``.

    Raises:
        ValueError: the checkpoint is another model's.
    """
    # imported late: these bring torch and Megatron-Core
    from megatron_occ.convert import write_folder
    from megatron_occ.data.tasks import build_task
    from megatron_occ.inputs import read_tokenizer
    from megatron_occ.mcore.checkpoint import check_weights, describe, read_plain

    name, params = config.data.task.name, config.data.task.params
    tokenizer = read_tokenizer(config, build_task(name, **params) if name else None)
    check_weights(checkpoint, describe(config, tokenizer.state(), {}))
    output.mkdir(parents=True)
    write_folder(output, read_plain(checkpoint), config, tokenizer)


def _check(config: Config, output: Path) -> None:
    if config.rl.rollout.engine == "megatron":
        raise ConfigError(
            "rl.rollout.engine=megatron: has no server to start. Give rl.rollout.engine=vllm or "
            "sglang"
        )
    problems = list(architecture_problems(config))
    if problems:
        raise ConfigError(problems)
    if output.exists():
        raise ConfigError(f"--output {output} is there already: name another folder")


if __name__ == "__main__":
    main()
