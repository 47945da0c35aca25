"""Norm, attention and layer spec for machines without a CUDA device."""

from __future__ import annotations

import math

import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional


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


class CoreAttention(MegatronModule):
    """Scaled dot-product attention over torch's CPU kernels, causal by position.

    A query block shorter than the keys is the end of the sequence: decoding with a KV cache, one
    token or several at a time, needs no mask of its own.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: object | None = None,
    ) -> None:
        super().__init__(config=config)
        assert config.context_parallel_size == 1, "context parallelism is not available on CPU"
        assert attn_mask_type == AttnMaskType.causal, attn_mask_type
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [sq, b, heads, d]; key, value: [sk, b, groups, d] with sk >= sq.
            attention_mask: must be None, the mask is causal.

        Returns:
            [sq, b, heads * d].
        """
        assert attention_mask is None
        assert attention_bias is None
        assert packed_seq_params is None
        sq, sk = query.size(0), key.size(0)
        # [s, b, n, d] -> [b, n, s, d]
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        context = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=_suffix_mask(sq, sk, query.device) if 1 < sq < sk else None,
            is_causal=sq == sk and sq > 1,
            scale=self.softmax_scale,
            enable_gqa=query.size(1) != key.size(1),
        )
        return context.permute(2, 0, 1, 3).flatten(2)


def _suffix_mask(sq: int, sk: int, device: torch.device) -> Tensor:
    """Causal mask of the last ``sq`` of ``sk`` positions, True where attention is allowed."""
    return torch.ones(sq, sk, dtype=torch.bool, device=device).tril(sk - sq)


class CPUSpecProvider(LocalSpecProvider):
    """Megatron's local back end with our norm and attention."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return RMSNorm

    def core_attention(self) -> type:
        return CoreAttention


def cpu_layer_spec(config: TransformerConfig) -> ModuleSpec:
    """Megatron's local transformer layer with our norm and attention in it."""
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    provider = CPUSpecProvider()
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = provider.layer_norm()
    attention.core_attention = provider.core_attention()
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = provider.layer_norm(for_qk=True)
    return spec
