"""Norms, linear layers and latent attention for machines without a CUDA device."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from megatron_occ.mcore.cpu.fused import rms_norm


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm with the constructor that Megatron's specs call.

    Args:
        config: Megatron's configuration; ``sequence_parallel`` marks the weight's gradient for
            the all-reduce over tensor-parallel ranks.
        hidden_size: width of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, values: Tensor) -> Tensor:
        """[..., hidden_size] normed."""
        return rms_norm(values, self.weight, self.eps)


class NormColumnParallelLinear(ColumnParallelLinear):
    """RMSNorm and a column-parallel layer in one module, as TransformerEngine has it.

    Latent attention needs this form. Megatron sums the gradient of anything named ``q_layernorm``
    over tensor-parallel ranks: right for a norm on the heads of a rank, and wrong by the number of
    ranks for the norm on the compressed query, whose gradient is complete on every rank.
    """

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, **options: Any
    ) -> None:
        super().__init__(input_size, output_size, config=config, **options)
        self.eps = config.layernorm_epsilon
        self.layer_norm_weight = torch.nn.Parameter(
            torch.ones(input_size, dtype=config.params_dtype)
        )
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel

    def forward(self, input_: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Any]:
        """[..., input_size] to [..., output_size / tensor-parallel size], and no bias."""
        normed = rms_norm(input_, self.layer_norm_weight, self.eps)
        return super().forward(normed, *arguments, **options)


class LatentDownProjection(torch.nn.Module):
    """Compressed key/value and the key's rotary part, whole on every tensor-parallel rank.

    Megatron's column-parallel form gathers both and cuts the gradient again. A rank's gradient of
    the rotary part comes from its own heads only, so what the others contribute would be lost.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.rotary = config.qk_pos_emb_head_dim
        self.sequence_parallel = config.sequence_parallel
        rows = config.kv_lora_rank + self.rotary
        weight = torch.empty(rows, config.hidden_size, dtype=config.params_dtype)
        config.init_method(weight)
        self.weight = torch.nn.Parameter(weight)
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        """[s, b, h] to [s, b, kv_lora_rank + rotary]; a rank's share of s if that is split."""
        combined = functional.linear(hidden, self.weight)
        if self.sequence_parallel:
            return combined, None  # Megatron gathers the sequence and sums the gradient
        compressed, rotary = combined.split([combined.size(-1) - self.rotary, self.rotary], dim=-1)
        return torch.cat([compressed, _SumGradient.apply(rotary)], dim=-1), None


class _SumGradient(torch.autograd.Function):
    """Identity whose gradient is summed over tensor-parallel ranks.

    Megatron's own drops the sum where the gradient is not contiguous, as that of a slice is.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
        return total


class LatentSelfAttention(MLASelfAttention):
    """Megatron's latent attention with :class:`LatentDownProjection`."""

    def __init__(self, config: TransformerConfig, *arguments: Any, **options: Any) -> None:
        super().__init__(config, *arguments, **options)
        self.linear_kv_down_proj = LatentDownProjection(config)

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, type]:
        """The spec's parts as they are; Megatron 0.19 asks, and would fuse TransformerEngine's."""
        linear = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj")
        norms = ("q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in (*linear, *norms)}
