"""What model, batch sizes and number of ranks must satisfy together."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_occ.config.schema import Config


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
    tensor = config.parallel.tensor
    yield from _model(config)
    if world_size < 1 or world_size % tensor:
        yield (
            f"parallel.tensor={tensor}: does not divide the {world_size} ranks of this run. Give "
            f"a divisor of {world_size}, or start a multiple of {tensor} ranks"
        )
        return
    ranks = world_size // tensor
    if pretrains:
        yield from _batch("pretrain", "pretrain.batch_size", config.pretrain.batch_size, ranks)
        yield from _micro_batch(
            "pretrain", config.pretrain.batch_size, config.pretrain.micro_batch_size, ranks
        )
    if trains:
        yield from _rollout_batch(config, ranks)


def _model(config: Config) -> Iterator[str]:
    model, tensor = config.model, config.parallel.tensor
    heads, groups = model.num_attention_heads, model.num_query_groups
    width = model.kv_channels
    if width is None and model.hidden_size % heads:
        yield (
            f"model.num_attention_heads={heads}: does not divide "
            f"model.hidden_size={model.hidden_size}. Change one, or set model.kv_channels"
        )
    elif (width or model.hidden_size // heads) % 2:
        yield (
            f"model.kv_channels={'null' if width is None else width}: a head is "
            f"{width or model.hidden_size // heads} wide, and the rotary embedding needs an even "
            "width. Change model.kv_channels, or model.hidden_size or model.num_attention_heads"
        )
    if groups is not None and heads % groups:
        yield (
            f"model.num_query_groups={groups}: does not divide "
            f"model.num_attention_heads={heads}. Give a divisor of {heads}"
        )
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        size = getattr(model, name)
        if size is not None and size % tensor:
            yield (
                f"model.{name}={size}: is not divisible by parallel.tensor={tensor}. Change "
                "one of them"
            )


def _rollout_batch(config: Config, ranks: int) -> Iterator[str]:
    rl = config.rl
    yield from _batch("RL", "rl.prompts_per_step", rl.prompts_per_step, ranks)
    sequences = rl.prompts_per_step * rl.samples_per_prompt
    if sequences % (rl.mini_batches * ranks):
        yield (
            f"rl.mini_batches={rl.mini_batches}: rl.prompts_per_step * rl.samples_per_prompt = "
            f"{sequences} sequences are not divisible by {rl.mini_batches} mini-batches * {ranks} "
            "data-parallel ranks. Change one of the three"
        )
        return
    yield from _micro_batch("rl", sequences // rl.mini_batches, rl.micro_batch_size, ranks)


def _batch(phase: str, key: str, size: int, ranks: int) -> Iterator[str]:
    if size % ranks:
        yield (
            f"{key}={size}: {phase} has {ranks} data-parallel ranks, which do not divide it. "
            f"Give a multiple of {ranks}"
        )


def _micro_batch(phase: str, batch: int, micro_batch: int, ranks: int) -> Iterator[str]:
    if batch % ranks:
        return  # reported with the batch
    share = batch // ranks
    if share % micro_batch == 0:
        return
    best = max(size for size in range(1, min(micro_batch, share) + 1) if share % size == 0)
    yield (
        f"{phase}.micro_batch_size={micro_batch}: does not divide the {share} sequences that a "
        f"data-parallel rank has in an update ({batch} over {ranks}). "
        f"Give {phase}.micro_batch_size={best}"
    )
