"""What model, batch sizes and number of ranks must satisfy together."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_occ.config import limits
from megatron_occ.config.pipeline import pipeline_problems
from megatron_occ.config.schema import Config
from megatron_occ.config.sizes import (
    fp8_multiple,
    model_parallel_size,
    round_up,
    sequence_multiple,
)
from megatron_occ.config.validate_exact import measures_gradients
from megatron_occ.config.words import counted


def layout_problems(
    config: Config, world_size: int, *, pretrains: bool, trains: bool
) -> Iterator[str]:
    """Problems of the layout, one message each.

    Args:
        config: a configuration whose single values are in range.
        world_size: ranks in all.
        pretrains: whether the command runs pretraining.
        trains: whether the command runs reinforcement learning.
    """
    yield from _splits(config)
    yield from _experts(config, world_size)
    yield from pipeline_problems(config)
    parallel = config.parallel
    if parallel.sequence and parallel.tensor == 1:
        yield (
            "parallel.sequence=true: parallel.tensor=1 has nothing to split the sequence over. "
            "Give parallel.tensor=2 or more, or parallel.sequence=false"
        )
    share = model_parallel_size(config)
    if world_size < 1 or world_size % share:
        yield (
            f"{_factors(config)}: does not divide the {counted(world_size, 'rank')} of this run (a "
            f"sequence is shared by {counted(share, 'rank')}). Give sizes whose product divides "
            f"{world_size}, or start a multiple of {counted(share, 'rank')}"
        )
        return
    if world_size > limits.RANKS:
        yield f"{world_size} ranks: at most {limits.RANKS:,} are counted with. Give fewer"
        return
    ranks = world_size // share
    if pretrains:
        yield from _batch("pretrain", "pretrain.batch_size", config.pretrain.batch_size, ranks)
        yield from _micro_batch(
            config,
            "pretrain",
            config.pretrain.batch_size,
            config.pretrain.micro_batch_size,
            ranks,
        )
    if trains:
        yield from _rollout_batch(config, ranks)


def _factors(config: Config) -> str:
    names = ("tensor", "pipeline", "context")
    given = [name for name in names if getattr(config.parallel, name) > 1] or ["tensor"]
    return ", ".join(f"parallel.{name}={getattr(config.parallel, name)}" for name in given)


def _splits(config: Config) -> Iterator[str]:
    """What is cut over tensor-parallel ranks."""
    model, tensor = config.model, config.parallel.tensor
    names = ["num_attention_heads", "num_query_groups", "ffn_hidden_size"]
    if config.mtp.num_layers:
        names.append("hidden_size")  # rows of the MTP layers' projection
    sizes = {f"model.{name}": getattr(model, name) for name in names}
    if model.moe.num_experts is not None:
        key = "model.moe.shared_ffn_hidden_size"
        sizes[key] = model.moe.shared_ffn_hidden_size
    for key, size in sizes.items():
        if size is not None and size % tensor:
            yield (
                f"{key}={size}: is not divisible by parallel.tensor={tensor}. Change one of them"
            )
    if config.fp8.format != "none":
        yield from _fp8_widths(config)
        yield from _fp8_layers(config)


def _fp8_widths(config: Config) -> Iterator[str]:
    """Columns of the matrices that a rank multiplies in FP8."""
    model, tensor, multiple = config.model, config.parallel.tensor, fp8_multiple(config)
    parts = {"hidden_size": 1, "ffn_hidden_size": tensor}
    for name, ranks in parts.items():
        size = getattr(model, name)
        if size % (multiple * ranks):
            yield (
                f"model.{name}={size}: over {ranks} ranks is not a multiple of {multiple}, which "
                f"fp8.scaling={config.fp8.scaling} needs. Give a multiple of "
                f"{multiple * ranks}, or fp8.format=none"
            )


def _fp8_layers(config: Config) -> Iterator[str]:
    """Layers of the trunk that stay in bf16."""
    fp8, layers = config.fp8, config.model.num_layers
    stage = layers // config.parallel.pipeline
    kept = {f"fp8.{n}": getattr(fp8, n) for n in ("first_layers_bf16", "last_layers_bf16")}
    if sum(kept.values()) >= layers:
        given = " and ".join(f"{key}={count}" for key, count in kept.items())
        yield f"{given}: leave no layer of {layers} for FP8. Give fewer, or fp8.format=none"
        return
    for key, count in kept.items():
        if count > stage:
            yield (
                f"{key}={count}: Megatron-Core takes at most {stage}, model.num_layers={layers} "
                f"over parallel.pipeline={config.parallel.pipeline}. Give fewer, or fewer stages"
            )


def _experts(config: Config, world_size: int) -> Iterator[str]:
    moe, parallel = config.model.moe, config.parallel
    if moe.num_experts is not None:
        yield from _expert_ranks(config, moe.num_experts, world_size)
        return
    for name in ("expert", "expert_tensor"):
        size = getattr(parallel, name)
        if (size or 1) > 1:
            yield (
                f"parallel.{name}={size}: model.moe.num_experts=null has no experts to share. Give "
                f"model.moe.num_experts, or leave parallel.{name} out"
            )


def _expert_ranks(config: Config, experts: int, world_size: int) -> Iterator[str]:
    moe, parallel = config.model.moe, config.parallel
    if experts % parallel.expert:
        yield (
            f"model.moe.num_experts={experts}: is not divisible by "
            f"parallel.expert={parallel.expert}. Change one of them"
        )
    if parallel.tensor > 1 and not parallel.sequence:
        yield (
            f"parallel.sequence=false: Megatron-Core trains MoE layers under parallel.tensor="
            f"{parallel.tensor} with sequence parallelism alone. Give parallel.sequence=true"
        )
    given = moe.ffn_hidden_size is not None
    width = moe.ffn_hidden_size if given else config.model.ffn_hidden_size
    expert_tensor = parallel.expert_tensor or parallel.tensor
    if parallel.expert == 1 and expert_tensor != parallel.tensor:
        yield (
            f"parallel.expert_tensor={expert_tensor}: with parallel.expert=1 Megatron-Core adds up "
            f"the gradients of experts over the same ranks as those of dense layers, which are "
            f"split over parallel.tensor={parallel.tensor}. Leave it out, or raise parallel.expert"
        )
    if width % expert_tensor:
        yield (
            f"model.{'moe.' if given else ''}ffn_hidden_size={width}: is not divisible by the "
            f"{expert_tensor} ranks that share an expert. Change it, or parallel.expert_tensor"
        )
    stage, share = world_size // parallel.pipeline, parallel.expert * expert_tensor
    if stage % share and world_size % model_parallel_size(config) == 0:
        yield (
            f"parallel.expert={parallel.expert}: times the ranks of one expert, {expert_tensor}, "
            f"is {share}, which does not divide the {counted(stage, 'rank')} of a pipeline stage. "
            "Change parallel.expert or parallel.expert_tensor"
        )


def _rollout_batch(config: Config, ranks: int) -> Iterator[str]:
    rl = config.rl
    yield from _batch("RL", "rl.prompts_per_step", rl.prompts_per_step, ranks)
    sequences = rl.prompts_per_step * rl.samples_per_prompt
    if sequences % (rl.mini_batches * ranks):
        yield (
            f"rl.mini_batches={rl.mini_batches}: rl.prompts_per_step * rl.samples_per_prompt = "
            f"{counted(sequences, 'sequence')} can't be cut into "
            f"{counted(rl.mini_batches, 'mini-batch')} * {counted(ranks, 'data-parallel rank')}. "
            "Change one of the three"
        )
        return
    if rl.micro_batch_tokens is not None:
        yield from _token_budget(config, rl.micro_batch_tokens)
        yield from _packed_counts(config, sequences // rl.mini_batches, ranks)
    else:
        size = rl.micro_batch_size
        yield from _micro_batch(config, "rl", sequences // rl.mini_batches, size, ranks)
    if measures_gradients(config.mtp) and config.mtp.trunk.exact.pairs == "cross":
        yield from _parts(config, sequences // rl.mini_batches, ranks)


def _parts(config: Config, sequences: int, ranks: int) -> Iterator[str]:
    """What cutting the sequences of a mini-batch into parts asks for beyond their own cut."""
    rl, exact, stages = config.rl, config.mtp.trunk.exact, config.parallel.pipeline
    if sequences % (exact.parts * ranks):
        yield (
            f"mtp.trunk.exact.parts={exact.parts}: the {sequences} sequences of a mini-batch are "
            f"not divisible by so many parts * {counted(ranks, 'data-parallel rank')}. Change "
            "rl.samples_per_prompt or rl.prompts_per_step, or set mtp.trunk.exact.pairs=same"
        )
        return
    share = sequences // (exact.parts * ranks)
    if rl.micro_batch_tokens is not None:
        who = (
            f"a part of an update (mtp.trunk.exact.parts={exact.parts}; "
            "mtp.trunk.exact.pairs=same has none)"
        )
        yield from _packed_counts(config, share * ranks, ranks, who)
    elif stages > 1 and share > rl.micro_batch_size and share % rl.micro_batch_size:
        best = max(size for size in range(1, rl.micro_batch_size) if share % size == 0)
        yield (
            f"rl.micro_batch_size={rl.micro_batch_size}: does not divide the "
            f"{counted(share, 'sequence')} that a rank has in a part of a mini-batch "
            f"(mtp.trunk.exact.parts={exact.parts}), and a pipeline sends micro-batches of one "
            f"size. Give rl.micro_batch_size={best}, or mtp.trunk.exact.pairs=same"
        )


def _token_budget(config: Config, budget: int) -> Iterator[str]:
    longest, multiple = config.model.max_position_embeddings, sequence_multiple(config)
    aligned = round_up(longest, multiple)
    if budget < aligned:
        yield (
            f"rl.micro_batch_tokens={budget}: a sequence may have model.max_position_embeddings="
            f"{longest} tokens, padded to a multiple of {multiple}. Give at least {aligned}"
        )


def _packed_counts(
    config: Config, sequences: int, ranks: int, who: str = "an update"
) -> Iterator[str]:
    parallel = config.parallel
    step = ranks * parallel.pipeline
    if parallel.virtual_pipeline > 1 and sequences % step:
        yield (
            f"parallel.virtual_pipeline={parallel.virtual_pipeline}: {who} has {sequences} "
            f"sequences, which can't always be packed into a multiple of {step} micro-batches "
            f"({counted(ranks, 'data-parallel rank')}, parallel.pipeline={parallel.pipeline}). "
            "Make them a multiple of it (rl.prompts_per_step, rl.samples_per_prompt, "
            "rl.mini_batches), or give parallel.virtual_pipeline=1"
        )


def _batch(phase: str, key: str, size: int, ranks: int) -> Iterator[str]:
    if size % ranks:
        yield (
            f"{key}={size}: {phase} has {ranks} data-parallel ranks, which do not divide it. "
            f"Give a multiple of {ranks}"
        )


def _micro_batch(
    config: Config, phase: str, batch: int, micro_batch: int, ranks: int
) -> Iterator[str]:
    if batch % ranks:
        return  # reported with the batch
    share = batch // ranks
    if share % micro_batch:
        best = max(size for size in range(1, min(micro_batch, share) + 1) if share % size == 0)
        yield (
            f"{phase}.micro_batch_size={micro_batch}: does not divide the "
            f"{counted(share, 'sequence')} that a data-parallel rank has in an update ({batch} "
            f"over {ranks}). Give {phase}.micro_batch_size={best}"
        )
        return
    stages, count = config.parallel.pipeline, share // micro_batch
    if config.parallel.virtual_pipeline > 1 and count % stages:
        yield (
            f"{phase}.micro_batch_size={micro_batch}: makes {counted(count, 'micro-batch')} a "
            f"rank, and the interleaved schedule needs a multiple of parallel.pipeline={stages}. "
            f"Give another {phase}.micro_batch_size, or parallel.virtual_pipeline=1"
        )
