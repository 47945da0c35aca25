"""What the keys of ``mtp.trunk.exact`` must satisfy together with others."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_occ.config.schema import Config
from megatron_occ.config.schema_mtp import ExactConfig, MTPConfig, TrunkConfig

# Below this effective number of samples a standard error says little: the gate stays shut.
MIN_SAMPLES = 8.0


def effective_samples(ema: float) -> float:
    """Effective number of samples of an exponential average, in the long run."""
    return (1 + ema) / (1 - ema)


def measures_gradients(config: MTPConfig) -> bool:
    """Whether lambda comes from the gradients themselves."""
    trunk = config.trunk
    return trunk.signal != "none" and trunk.coefficient == "occ" and trunk.estimator == "exact"


def exact_problems(config: Config) -> Iterator[str]:
    """Problems of lambda from the gradients themselves, one message each.

    Args:
        config: a configuration whose single values are in range.
    """
    trunk, exact = config.mtp.trunk, config.mtp.trunk.exact
    if not measures_gradients(config.mtp):
        return
    if exact.pairs == "same" and trunk.lambda_plus is None:
        yield (
            "mtp.trunk.lambda_plus=null: the scale comes from RL's own signal, which "
            "mtp.trunk.exact.pairs=same does not measure. Give a number, or "
            "mtp.trunk.exact.pairs=cross"
        )
    if exact.pairs == "same" and exact.parts != ExactConfig().parts:
        yield (
            f"mtp.trunk.exact.parts={exact.parts}: mtp.trunk.exact.pairs=same does not cut "
            "mini-batches. Leave it out, or set mtp.trunk.exact.pairs=cross"
        )
    if exact.gate > 0 and effective_samples(trunk.ema) < MIN_SAMPLES:
        yield (
            f"mtp.trunk.ema={trunk.ema}: an average over {effective_samples(trunk.ema):.1f} "
            f"mini-batches has no standard error that mtp.trunk.exact.gate={exact.gate} could "
            "go by. Give mtp.trunk.ema=0.8 or more (0.98 is usual), or mtp.trunk.exact.gate=0"
        )
    if exact.pairs == "cross":
        yield from _parts(config)
    if not config.mtp.head.cut_output_layer:
        yield (
            "mtp.head.cut_output_layer=false: the head's loss would be part of RL's gradient, "
            "which mtp.trunk.estimator=exact measures. Set it to true, or another estimator"
        )
    yield from _share(config)
    yield from _per_layer(config)
    if exact.control == "random":
        yield from _random(config)


def audit_problems(config: Config) -> Iterator[str]:
    """Problems of the command ``audit``, one message each.

    Args:
        config: a configuration whose single values are in range.
    """
    if config.mtp.num_layers == 0:
        yield "mtp.num_layers=0: an audit measures MTP layers. Give the model's mtp.num_layers"
    rl = config.rl
    if rl.prompts_per_step % rl.mini_batches:
        yield (
            f"rl.mini_batches={rl.mini_batches}: cuts the samples of a prompt "
            f"(rl.prompts_per_step={rl.prompts_per_step}) into two mini-batches, and an audit "
            "multiplies gradients of different ones as independent. Let rl.mini_batches divide "
            "rl.prompts_per_step"
        )


def _parts(config: Config) -> Iterator[str]:
    """Advantages of a group add up to 0: its halves are no independent samples."""
    rl, parts = config.rl, config.mtp.trunk.exact.parts
    if rl.prompts_per_step % (rl.mini_batches * parts):
        yield (
            f"mtp.trunk.exact.parts={parts}: rl.mini_batches={rl.mini_batches} of so many parts "
            f"do not divide rl.prompts_per_step={rl.prompts_per_step}: samples of a prompt would "
            "be in two of them. Give rl.prompts_per_step a multiple of "
            f"{rl.mini_batches * parts}, or mtp.trunk.exact.pairs=same"
        )
    if rl.micro_batch_tokens is None and config.parallel.virtual_pipeline > 1:
        yield (
            "mtp.trunk.exact.pairs=cross: an interleaved pipeline "
            f"(parallel.virtual_pipeline={config.parallel.virtual_pipeline}) asks for a multiple "
            "of micro-batches in each part, which padded ones may not make. Give "
            "rl.micro_batch_tokens, or mtp.trunk.exact.pairs=same"
        )


def _share(config: Config) -> Iterator[str]:
    trunk, exact = config.mtp.trunk, config.mtp.trunk.exact
    if exact.share is None:
        return
    if exact.share_cap is not None and exact.share_cap < exact.share:
        yield (
            f"mtp.trunk.exact.share={exact.share}: is above "
            f"mtp.trunk.exact.share_cap={exact.share_cap}. Raise the cap, or set it to null"
        )
    if trunk.lambda_plus not in (None, TrunkConfig().lambda_plus):
        yield (
            f"mtp.trunk.lambda_plus={trunk.lambda_plus}: mtp.trunk.exact.share={exact.share} is "
            "the scale of lambda. Drop one of the two"
        )


def _random(config: Config) -> Iterator[str]:
    """Where a random direction would be no control, or can't be drawn."""
    head = config.mtp.head
    if head.signal == "same_as_trunk":
        yield (
            "mtp.trunk.exact.control=random: a head that shares the trunk's loss "
            "(mtp.head.signal=same_as_trunk) would differ from what is compared. Give it a loss of "
            "its own, for example mtp.head.signal=ce"
        )
    for name in ("tensor", "pipeline", "context", "expert"):
        size = getattr(config.parallel, name)
        if size > 1:
            yield (
                f"mtp.trunk.exact.control=random: draws a direction on one process, with "
                f"parallel.{name}={size} its parts would not fit. Set parallel.{name}=1"
            )
    if config.parallel.distributed_optimizer:
        yield (
            "mtp.trunk.exact.control=random: draws a direction on one process, and "
            "parallel.distributed_optimizer=true splits it. Set it to false"
        )


def _per_layer(config: Config) -> Iterator[str]:
    exact, head = config.mtp.trunk.exact, config.mtp.head
    if exact.per != "layer":
        return
    if head.signal == "same_as_trunk":
        yield (
            "mtp.trunk.exact.per=layer: a head that shares the trunk's loss "
            "(mtp.head.signal=same_as_trunk) has no layer's coefficient. Give it a loss of its "
            "own, for example mtp.head.signal=ce, or set mtp.trunk.exact.per=trunk"
        )
