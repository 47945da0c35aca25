"""The section ``pretrain`` of the configuration, and the optimizer's, which RL has too."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_occ.config import limits
from megatron_occ.config.options import option, section


@dataclass
class OptimizerConfig:
    lr: float = option(1e-3, "peak learning rate", above=0, maximum=limits.LEARNING_RATE)
    min_lr: float = option(
        0.0, "learning rate at the end of the decay", minimum=0, maximum=limits.LEARNING_RATE
    )
    schedule: str = option(
        "constant", "decay after the warm-up", choices=("constant", "cosine", "linear")
    )
    warmup_steps: int = option(0, "updates of linear warm-up", minimum=0, maximum=limits.STEPS)
    weight_decay: float = option(0.0, "decoupled weight decay", minimum=0, maximum=limits.FACTOR)
    beta1: float = option(0.9, "Adam's first decay", minimum=0, below=1)
    beta2: float = option(0.95, "Adam's second decay", minimum=0, below=1)
    eps: float = option(1e-8, "Adam's epsilon", above=0, maximum=1)
    clip_grad: float = option(
        1.0,
        "gradient norm of trunk and shared parameters is clipped to this (0: no clipping)",
        minimum=0,
        maximum=limits.NORM,
    )


@dataclass
class PretrainConfig:
    steps: int = option(750, "updates", minimum=0, maximum=limits.STEPS)
    batch_size: int = option(
        128, "sequences per update, over all ranks", minimum=1, maximum=limits.SEQUENCES
    )
    micro_batch_size: int = option(
        128, "sequences per forward pass", minimum=1, maximum=limits.SEQUENCES
    )
    sequence_length: int = option(48, "tokens per sequence", minimum=2, maximum=limits.TOKENS)
    label_noise: float = option(
        0.0,
        "share of the tokens of generated solutions that are replaced at random",
        minimum=0,
        below=1,
    )
    mtp_weight: float = option(
        0.1,
        "weight of the MTP cross-entropy, averaged over depths",
        minimum=0,
        maximum=limits.FACTOR,
    )
    balance_loss: float = option(
        0.0,
        "coefficient of the balance loss of experts (DeepSeek-V3: 1e-4; 0: off)",
        minimum=0,
        maximum=limits.FACTOR,
    )
    optimizer: OptimizerConfig = section(OptimizerConfig, "optimizer of pretraining")
    save_every: int = option(250, "updates between checkpoints", minimum=1, maximum=limits.STEPS)
    log_every: int = option(10, "updates between lines of metrics", minimum=1, maximum=limits.STEPS)
    validate_every: int = option(
        0,
        "updates between measurements of pass@1, as in rl.validation on other problems (0: never)",
        minimum=0,
        maximum=limits.STEPS,
    )
    stop_at_pass_rate: float | None = option(
        None, "end pretraining at this pass@1, for RL to start from", above=0, maximum=1
    )
