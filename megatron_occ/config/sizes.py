"""Batch and update counts that follow from a configuration and the number of ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_occ.config.schema import Config

# positions that a row of rollouts has behind its longest sequence and the drafts of it
BEHIND_DRAFTS = 2


@dataclass(frozen=True)
class Sizes:
    """Counts in sequences, unless the name says otherwise.

    Attributes:
        data_parallel: data-parallel ranks.
        rank_prompts: prompts a data-parallel rank rolls out in a step.
        step_sequences: sequences of a rollout step, over all ranks.
        rank_step_sequences: sequences of a rollout step on a data-parallel rank.
        mini_batch: sequences of an update, over all ranks.
        rank_mini_batch: sequences of an update on a data-parallel rank.
        micro_batches: padded micro-batches of an RL update on a data-parallel rank.
        rl_updates: optimizer updates of the whole RL run.
        rank_pretrain_batch: sequences of a pretraining update on a data-parallel rank.
        pretrain_micro_batches: micro-batches of a pretraining update on a data-parallel rank.
        pretrain_updates: optimizer updates of the whole pretraining.
    """

    data_parallel: int
    rank_prompts: int
    step_sequences: int
    rank_step_sequences: int
    mini_batch: int
    rank_mini_batch: int
    micro_batches: int
    rl_updates: int
    rank_pretrain_batch: int
    pretrain_micro_batches: int
    pretrain_updates: int


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is not below ``value``."""
    return -(-value // multiple) * multiple


def model_parallel_size(config: Config) -> int:
    """Ranks that work on the same sequences: tensor, pipeline and context parallel."""
    parallel = config.parallel
    return parallel.tensor * parallel.pipeline * parallel.context


def sequence_multiple(config: Config) -> int:
    """What the length of a sequence in the model is a multiple of.

    Context parallelism cuts it into two chunks a rank, sequence parallelism over the
    tensor-parallel ranks, and FP8 products need rows in multiples of :func:`fp8_multiple`.
    """
    parallel = config.parallel
    multiple = 2 * parallel.context if parallel.context > 1 else 1
    if parallel.sequence:
        multiple *= parallel.tensor
    if config.fp8.format == "none":
        return multiple
    # a rank's own part must have that many rows
    parts = parallel.context * (parallel.tensor if parallel.sequence else 1)
    return math.lcm(multiple, fp8_multiple(config) * parts)


def fp8_multiple(config: Config) -> int:
    """What rows and columns of TransformerEngine's FP8 matrices are a multiple of."""
    return 128 if config.fp8.scaling == "block" else 16


def fp8_layers(config: Config) -> range:
    """Numbers of the trunk's layers, from 1, that ``fp8`` does not leave in bf16."""
    last = config.model.num_layers - config.fp8.last_layers_bf16
    return range(config.fp8.first_layers_bf16 + 1, last + 1)


def derive(config: Config, world_size: int = 1) -> Sizes:
    """The sizes of a configuration, for the phases in which ``validate`` accepts it.

    Args:
        config: a configuration; counts of a phase that does not divide evenly are rounded down.
        world_size: ranks in all, a multiple of :func:`model_parallel_size`.
    """
    rl, pretrain = config.rl, config.pretrain
    data_parallel = world_size // model_parallel_size(config)
    assert data_parallel >= 1, "validate refuses a world smaller than one model"
    step_sequences = rl.prompts_per_step * rl.samples_per_prompt
    mini_batch = step_sequences // rl.mini_batches
    rank_mini_batch = mini_batch // data_parallel
    rank_pretrain_batch = pretrain.batch_size // data_parallel
    return Sizes(
        data_parallel=data_parallel,
        rank_prompts=rl.prompts_per_step // data_parallel,
        step_sequences=step_sequences,
        rank_step_sequences=step_sequences // data_parallel,
        mini_batch=mini_batch,
        rank_mini_batch=rank_mini_batch,
        micro_batches=rank_mini_batch // rl.micro_batch_size,
        rl_updates=rl.steps * rl.mini_batches,
        rank_pretrain_batch=rank_pretrain_batch,
        pretrain_micro_batches=rank_pretrain_batch // pretrain.micro_batch_size,
        pretrain_updates=pretrain.steps,
    )


def most_micro_batches(config: Config, world_size: int) -> int:
    """Most micro-batches of an RL update on a data-parallel rank; the number, where it is fixed.

    Packed ones (``rl.micro_batch_tokens``) depend on the lengths of the responses. ``budget //
    longest`` sequences always fit into one, so that ``plan_micro_batches`` needs no more than for
    sequences that are all of the longest length: a micro-batch into which the next sequence does
    not fit holds that many already.

    Args:
        config: a configuration that ``validate`` accepts.
        world_size: ranks in all.
    """
    sizes, budget = derive(config, world_size), config.rl.micro_batch_tokens
    if budget is None:
        return sizes.micro_batches
    longest = round_up(config.model.max_position_embeddings, sequence_multiple(config))
    step = config.parallel.pipeline if config.parallel.virtual_pipeline > 1 else 1
    in_one = (budget // longest) * sizes.data_parallel
    return round_up(-(-sizes.mini_batch // in_one), step)


def pipeline_bubble(config: Config, micro_batches: int) -> float:
    """Time that a stage waits in an update, in units of the time that it works.

    (p - 1) / (m v) with p stages, m micro-batches and v chunks a stage: Narayanan et al., arXiv
    2104.04473, section 2.2 (1F1B, and interleaved). All chunks are taken to last equally long, and
    messages to take no time.

    Args:
        config: its pipeline.
        micro_batches: of an update on a data-parallel rank.
    """
    parallel = config.parallel
    return (parallel.pipeline - 1) / (micro_batches * parallel.virtual_pipeline)
