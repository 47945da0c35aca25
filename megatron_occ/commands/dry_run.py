"""``--dry-run``: what would run, where it would lie, and what is not there; nothing is started."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from megatron_occ.config import (
    Config,
    ConfigError,
    derive,
    files_not_found,
    pretrains_first,
    validate,
)
from megatron_occ.config.sizes import most_micro_batches, pipeline_bubble
from megatron_occ.observe.outlets import missing_packages


@dataclass(frozen=True)
class Machine:
    """What a dry run takes the machines to be.

    Args:
        world_size: ranks in all.
        rank: the one to show.
        node: ranks of a node.
        gpu_memory: of a rank, in GiB.
    """

    world_size: int
    rank: int
    node: int
    gpu_memory: float


def dry_run(config: Config, command: str, machine: Machine, window: int | None = None) -> None:
    """Print the plan of a run, its rank grid, and parameters and memory of some ranks.

    Shown are the chosen rank, the last stage of its pipeline, and the rank that needs the most
    memory of all.

    Args:
        config: checked here.
        command: that would run.
        machine: where.
        window: of an audit, where it is given.

    Raises:
        ConfigError: the configuration is refused, or there is no such rank.
        ValueError: a file of prompts that can't be read, or a verifier that can't be imported.
    """
    world_size, rank = machine.world_size, machine.rank
    validate(config, command=command, world_size=world_size)
    _check(machine)
    # counted by the local layers, on a machine with GPUs too; before torch looks for them
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from megatron_occ.mcore.estimate.largest import (
        GIB,
        changes_that_help,
        distinct_stage_ranks,
        largest,
    )
    from megatron_occ.mcore.estimate.nodes import crossing_warnings
    from megatron_occ.mcore.estimate.ranks import estimate, last_stage_rank
    from megatron_occ.mcore.estimate.text import fit_text, grid_text, ranks_text
    from megatron_occ.mcore.estimate.whole import model_parameters
    from megatron_occ.phases.prompt_files import FIRST_RECORDS, check_first_records
    from megatron_occ.rl.measuring import WINDOW

    check_first_records(config)
    vocabulary = _vocabulary(config)
    window = WINDOW if window is None else window
    kinds = distinct_stage_ranks(config, world_size, rank)
    shown = [rank, last_stage_rank(config, world_size, rank)]
    built = {
        one: estimate(config, vocabulary, world_size, one, command=command, window=window)
        for one in dict.fromkeys([*shown, *kinds])
    }
    every_kind = [built[one] for one in kinds]
    top, changes = largest(every_kind), []
    if top.memory.peak > machine.gpu_memory * GIB:
        limit = int(machine.gpu_memory * GIB)
        changes = changes_that_help(config, every_kind, command, window, limit)
    model = model_parameters(config, vocabulary)
    print(_plan(config, command, world_size))
    for warning in crossing_warnings(config, world_size, machine.node):
        print(f"warning            {warning}")
    print(f"\n{grid_text(config, built[rank], machine.node)}\n")
    columns = [built[one] for one in dict.fromkeys([*shown, top.rank])]
    print(ranks_text(config, columns, model, machine.gpu_memory))
    print(f"\n{fit_text(config, top, changes, machine.gpu_memory)}")
    print(f"\n{_unchecked(config, FIRST_RECORDS)}")


def _check(machine: Machine) -> None:
    if not 0 <= machine.rank < machine.world_size:
        raise ConfigError(
            f"--rank {machine.rank}: there are ranks 0 to {machine.world_size - 1}. Give one of "
            "them"
        )
    if machine.node < 1:
        raise ConfigError(f"--gpus-per-node {machine.node}: give 1 or more")
    if not 0 < machine.gpu_memory < math.inf:
        raise ConfigError(f"--gpu-memory {machine.gpu_memory:g}: give a number of GiB above 0")


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
    pretrains = pretrains_first(config) or command == "pretrain"
    if pretrains:
        lines.append(
            f"pretraining        {sizes.pretrain_updates} updates of {config.pretrain.batch_size} "
            f"sequences, {_micro_batches(sizes.pretrain_micro_batches)}"
        )
        lines += _bubble(config, sizes.pretrain_micro_batches)
    if command in ("rl", "demo"):
        most, budget = most_micro_batches(config, world_size), config.rl.micro_batch_tokens
        micro_batches = _micro_batches(most)
        if budget is not None:
            micro_batches = (
                f"micro-batches of at most {budget} tokens (as many as the lengths of the "
                f"responses make, at most {most} a rank)"
            )
        lines.append(
            f"RL                 {config.rl.steps} steps of {sizes.step_sequences} responses, "
            f"{config.rl.mini_batches} updates each, {micro_batches}"
        )
        lines += _bubble(config, most, at_least=budget is not None)
    return "\n".join(lines)


def _micro_batches(count: int) -> str:
    return f"{count} micro-batch{'es' * (count != 1)} a rank"


def _bubble(config: Config, micro_batches: int, *, at_least: bool = False) -> list[str]:
    """What a pipeline costs in waiting, for the line before."""
    parallel = config.parallel
    if parallel.pipeline == 1:
        return []
    bubble = pipeline_bubble(config, micro_batches)
    chunks = f" * {parallel.virtual_pipeline} chunks" if parallel.virtual_pipeline > 1 else ""
    return [
        f"  bubble           {'at least ' * at_least}{bubble:.1%} of the time that a stage works "
        f"({parallel.pipeline} - 1 stages / ({micro_batches} micro-batches{chunks}), "
        f"arXiv 2104.04473), or {bubble / (1 + bubble):.1%} of an update"
    ]
