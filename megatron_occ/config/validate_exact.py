"""What the keys of ``mtp.trunk.exact`` must satisfy together with others."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_occ.config.schema import Config

# Below this effective number of samples a standard error says little: the gate stays shut.
MIN_SAMPLES = 8.0


def effective_samples(ema: float) -> float:
    """Effective number of samples of an exponential average, in the long run."""
    return (1 + ema) / (1 - ema)


def exact_problems(config: Config) -> Iterator[str]:
    """Problems of lambda from the gradients themselves, one message each.

    Args:
        config: a configuration whose single values are in range.
    """
    trunk, exact = config.mtp.trunk, config.mtp.trunk.exact
    if not measures(config):
        return
    if exact.pairs == "same" and trunk.lambda_plus is None:
        yield (
            "mtp.trunk.lambda_plus=null: the scale comes from RL's own signal, which "
            "mtp.trunk.exact.pairs=same does not measure. Give a number, or "
            "mtp.trunk.exact.pairs=cross"
        )
    if exact.pairs == "same" and exact.kept > 1:
        yield (
            f"mtp.trunk.exact.kept={exact.kept}: mtp.trunk.exact.pairs=same keeps no gradients. "
            "Leave mtp.trunk.exact.kept=1, or set mtp.trunk.exact.pairs=cross"
        )
    if exact.gate > 0 and effective_samples(trunk.ema) < MIN_SAMPLES:
        yield (
            f"mtp.trunk.ema={trunk.ema}: an average over {effective_samples(trunk.ema):.1f} "
            f"mini-batches has no standard error that mtp.trunk.exact.gate={exact.gate} could "
            "go by. Give mtp.trunk.ema=0.8 or more (0.98 is usual), or mtp.trunk.exact.gate=0"
        )
    if exact.pairs == "cross":
        yield from _shared_groups(config, "mtp.trunk.exact.pairs=cross multiplies")
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
    yield from _shared_groups(config, "an audit multiplies")


def _shared_groups(config: Config, who: str) -> Iterator[str]:
    """Advantages of a group add up to 0: its halves are no independent samples."""
    rl = config.rl
    if rl.prompts_per_step % rl.mini_batches:
        yield (
            f"rl.mini_batches={rl.mini_batches}: cuts the samples of a prompt "
            f"(rl.prompts_per_step={rl.prompts_per_step}) into two mini-batches, and {who} "
            "gradients of different ones as independent. Let rl.mini_batches divide "
            "rl.prompts_per_step"
        )


def measures(config: Config) -> bool:
    """Whether lambda comes from the gradients themselves."""
    trunk = config.mtp.trunk
    return trunk.signal != "none" and trunk.coefficient == "occ" and trunk.estimator == "exact"


def _random(config: Config) -> Iterator[str]:
    """The random numbers of a direction are not split over ranks."""
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
    if exact.every > 1:
        yield (
            f"mtp.trunk.exact.every={exact.every}: with mtp.trunk.exact.per=layer the gradients "
            "are weighed apart from the loss, so each mini-batch needs them. Set "
            "mtp.trunk.exact.every=1, or mtp.trunk.exact.per=trunk"
        )
    if head.signal == "same_as_trunk":
        yield (
            "mtp.trunk.exact.per=layer: a head that shares the trunk's loss "
            "(mtp.head.signal=same_as_trunk) has no layer's coefficient. Give it a loss of its "
            "own, for example mtp.head.signal=ce, or set mtp.trunk.exact.per=trunk"
        )
