"""What keys of the optimizer's memory must satisfy."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_occ.config.schema import Config, OptimizerConfig

# bf16 has 8 bits: a change by less than half of the last one, 2**-9 to 2**-8 of a number, is lost.
# With this decay a second moment that has to fall stops at twice what it should be at the latest
LARGEST_DECAY = 1 - 2**-7


def optimizer_problems(config: Config, *, pretrains: bool, trains: bool) -> Iterator[str]:
    """Problems of these keys, one message each.

    Args:
        config: the configuration.
        pretrains: whether the command runs pretraining.
        trains: whether the command runs reinforcement learning.
    """
    parallel = config.parallel
    low, offloads = parallel.moments_dtype == "bf16", parallel.optimizer_offload > 0
    if low and not parallel.distributed_optimizer:
        yield (
            "parallel.moments_dtype=bf16: Megatron-Core has it in its distributed optimizer alone. "
            "Give parallel.distributed_optimizer=true, or parallel.moments_dtype=fp32"
        )
    if offloads and not parallel.distributed_optimizer:
        yield (
            f"parallel.optimizer_offload={parallel.optimizer_offload:g}: the ranks would each "
            "update the whole model on the host. Give parallel.distributed_optimizer=true, or "
            "parallel.optimizer_offload=0"
        )
    if offloads and config.precision == "fp32":
        yield (
            f"parallel.optimizer_offload={parallel.optimizer_offload:g}: Megatron-Core takes main "
            "weights of 16-bit parameters alone to the host. Give precision=bf16, or "
            "parallel.optimizer_offload=0"
        )
    if low and offloads:
        yield (
            f"parallel.moments_dtype=bf16: with parallel.optimizer_offload="
            f"{parallel.optimizer_offload:g} torch's Adam updates on the host, whose moments are "
            "fp32. Give parallel.moments_dtype=fp32, or parallel.optimizer_offload=0"
        )
    if low and pretrains:
        yield from _decays("pretrain.optimizer", config.pretrain.optimizer)
    if low and trains:
        yield from _decays("rl.optimizer", config.rl.optimizer)


def _decays(key: str, optimizer: OptimizerConfig) -> Iterator[str]:
    for name in ("beta1", "beta2"):
        value = getattr(optimizer, name)
        if value > LARGEST_DECAY:
            yield (
                f"{key}.{name}={value:g}: in bf16 rounding undoes such a decay, and a moment "
                "that rose stays far too large. Give at most 0.992, or parallel.moments_dtype=fp32"
            )
