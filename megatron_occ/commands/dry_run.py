"""``--dry-run``: what would run, where it would lie, and what is not there; nothing is started."""

from __future__ import annotations

import os

from megatron_occ.config import (
    Config,
    ConfigError,
    derive,
    files_not_found,
    pretrains_first,
    validate,
)
from megatron_occ.observe.outlets import missing_packages


def dry_run(
    config: Config, command: str, world_size: int, rank: int, window: int | None = None
) -> None:
    """Print the plan of a run, its rank grid, and parameters and memory of a rank.

    Args:
        config: checked here.
        command: that would run.
        world_size: ranks.
        rank: the one to build, on the meta device, and the last stage of its pipeline.
        window: of an audit, where it is given.

    Raises:
        ConfigError: the configuration is refused, or there is no such rank.
        ValueError: a file of prompts that can't be read, or a verifier that can't be imported.
    """
    validate(config, command=command, world_size=world_size)
    if not 0 <= rank < world_size:
        raise ConfigError(f"--rank {rank}: there are ranks 0 to {world_size - 1}. Give one of them")
    # counted by the local layers, on a machine with GPUs too; before torch looks for them
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from megatron_occ.mcore.estimate.ranks import estimate, last_stage_rank
    from megatron_occ.mcore.estimate.text import grid_text, ranks_text
    from megatron_occ.phases.prompt_files import FIRST_RECORDS, check_first_records

    check_first_records(config)
    vocabulary = _vocabulary(config)
    ranks = dict.fromkeys((rank, last_stage_rank(config, world_size, rank)))
    kept = {"command": command} | ({} if window is None else {"window": window})
    estimates = [estimate(config, vocabulary, world_size, one, **kept) for one in ranks]
    print(_plan(config, command, world_size))
    print(f"\n{grid_text(config, estimates[0])}\n\n{ranks_text(config, estimates)}")
    print(f"\n{_unchecked(config, FIRST_RECORDS)}")


def _vocabulary(config: Config) -> int:
    """Rows of embedding and output layer; a tokenizer is read only if it alone knows.

    Raises:
        ValueError: there is no such task, or no such tokenizer.
    """
    from megatron_occ.data.from_config import read_task, read_tokenizer

    task = read_task(config)
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    try:
        return read_tokenizer(config, task).vocab_size
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"model.vocab_size=null: the vocabulary has to come from the tokenizer: {error}. "
            "Give model.vocab_size to count without it"
        ) from error


def _unchecked(config: Config, read: int) -> str:
    """What a run may still stumble over."""
    missing = "".join(f"not found          {text}\n" for text in files_not_found(config))
    missing += "".join(f"not installed      {text}\n" for text in missing_packages(config.log))
    return f"{missing}not checked        prompts after the first {read}, weights, servers"


def _plan(config: Config, command: str, world_size: int) -> str:
    sizes, parallel = derive(config, world_size), config.parallel
    lines = [
        f"command            {command}",
        f"run_dir            {config.run_dir}",
        f"ranks              {world_size} (tensor {parallel.tensor}, context {parallel.context}, "
        f"data {sizes.data_parallel}, pipeline {parallel.pipeline})",
    ]
    if pretrains_first(config) or command == "pretrain":
        lines.append(
            f"pretraining        {sizes.pretrain_updates} updates of {config.pretrain.batch_size} "
            f"sequences, {sizes.pretrain_micro_batches} micro-batches a rank"
        )
    if command in ("rl", "demo"):
        micro_batches = f"{sizes.micro_batches} micro-batches a rank"
        if config.rl.micro_batch_tokens is not None:
            micro_batches = (
                f"micro-batches of at most {config.rl.micro_batch_tokens} tokens (as many as the "
                "lengths of the responses make)"
            )
        lines.append(
            f"RL                 {config.rl.steps} steps of {sizes.step_sequences} responses, "
            f"{config.rl.mini_batches} updates each, {micro_batches}"
        )
    return "\n".join(lines)
