"""What the balance loss of experts must satisfy together with other keys."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_occ.config.schema import Config
from megatron_occ.config.validate_exact import measures_gradients


def balance_problems(config: Config, *, pretrains: bool, trains: bool) -> Iterator[str]:
    """Problems of these keys, one message each.

    Args:
        config: a configuration whose single values are in range.
        pretrains: whether the command runs pretraining.
        trains: whether the command runs reinforcement learning.
    """
    if pretrains:
        yield from _choice("pretrain.balance_loss", config.pretrain.balance_loss, config)
    if trains:
        yield from _choice("rl.balance_loss", config.rl.balance_loss, config)
        yield from _measured(config)


def _choice(key: str, coefficient: float, config: Config) -> Iterator[str]:
    moe = config.model.moe
    if coefficient > 0 and moe.top_k == moe.num_experts:
        yield (
            f"{key}={coefficient}: with model.moe.top_k={moe.top_k} every token goes to all "
            f"experts, and there is nothing to balance. Give {key}=0, or a smaller model.moe.top_k"
        )


def _measured(config: Config) -> Iterator[str]:
    coefficient = config.rl.balance_loss
    if coefficient > 0 and measures_gradients(config.mtp):
        yield (
            f"rl.balance_loss={coefficient}: would be part of RL's gradient, which "
            "mtp.trunk.estimator=exact measures. Give rl.balance_loss=0, or another estimator"
        )
