"""The configuration as Megatron-Core's settings of its optimizer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig

from megatron_occ.config.schema import OptimizerConfig, ParallelConfig

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class _Settings(MegatronOptimizerConfig):
    """Those of an optimizer that reads fp32 gradients in ``grad`` and updates fp32 main weights.

    Megatron calls moments in less than fp32 "precision-aware", and has two ways for the rest. One
    reads gradients in the buffers, as ``decoupled_grad``, and has TransformerEngine keep the main
    weights (``master_param``). The other, which it takes for FP8 parameters, leaves both as they
    are with moments in fp32: as clips, the exact estimator and checkpoints read them.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        assert hasattr(self, "use_precision_aware_optimizer_no_fp8_or_ds_fp8")
        self.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = False


def optimizer_settings(
    config: OptimizerConfig, parallel: ParallelConfig, *, bf16: bool
) -> MegatronOptimizerConfig:
    """Megatron's settings of Adam.

    Gradients are clipped elsewhere. Copies to and from the host overlap with updates there.

    Args:
        config: section ``pretrain.optimizer`` or ``rl.optimizer``.
        parallel: section ``parallel``.
        bf16: parameters are bf16 with fp32 main copies.
    """
    moments = _DTYPES[parallel.moments_dtype]
    return _Settings(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=parallel.distributed_optimizer,
        use_precision_aware_optimizer=moments != torch.float32,
        exp_avg_dtype=moments,
        exp_avg_sq_dtype=moments,
        optimizer_cpu_offload=parallel.optimizer_offload > 0,
        optimizer_offload_fraction=parallel.optimizer_offload,
        overlap_cpu_optimizer_d2h_h2d=parallel.optimizer_offload > 0,
        clip_grad=0.0,
    )
