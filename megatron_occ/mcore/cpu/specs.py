"""Megatron's layer specs for machines without a CUDA device: dense, MoE, latent attention, MTP."""

from __future__ import annotations

import functools

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_mtp_block_spec_for_backend,
)
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_occ.mcore.cpu.attention import CoreAttention
from megatron_occ.mcore.cpu.fused import SwiGLU
from megatron_occ.mcore.cpu.modules import LatentSelfAttention, NormColumnParallelLinear, RMSNorm


class CPUSpecProvider(LocalSpecProvider):
    """Megatron's local back end with our norm and attention."""

    def layer_norm(
        self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False
    ) -> type:
        return RMSNorm

    def core_attention(self) -> type:
        return CoreAttention


def cpu_layer_spec(config: TransformerConfig, *, moe: bool = False) -> ModuleSpec:
    """Megatron's local transformer layer with our norm and attention in it.

    Args:
        config: says whether attention is latent and whether queries and keys are normed.
        moe: a mixture of experts (router, experts one after the other, shared experts) in place of
            the dense feed-forward layer.
    """
    latent = config.multi_latent_attention
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts if moe else None,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=latent,
        normalization="RMSNorm",
    )
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention.core_attention = CoreAttention
    if latent:
        layer.self_attention.module = LatentSelfAttention
        attention.q_layernorm = attention.kv_layernorm = IdentityOp
        if config.qk_layernorm:
            attention.linear_q_up_proj = attention.linear_kv_up_proj = NormColumnParallelLinear
    elif config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if config.use_te_activation_func:
        _mlp_parts(layer.mlp).activation_func = SwiGLU
    layer.sharded_state_dict_keys_map = _checkpoint_names(latent, moe)
    return spec


def _mlp_parts(mlp: ModuleSpec | functools.partial) -> MLPSubmodules:
    """Parts of a dense feed-forward layer: newer versions of Megatron-Core have a partial there."""
    return mlp.keywords["submodules"] if isinstance(mlp, functools.partial) else mlp.submodules


def _checkpoint_names(latent: bool, moe: bool) -> dict[str, str]:
    """Names that TransformerEngine's layers have in a checkpoint: it fuses norms into layers."""
    names = {}
    if not latent:
        names["input_layernorm."] = "self_attention.linear_qkv.layer_norm_"
    if not moe:
        names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return names


def cpu_block_spec(
    config: TransformerConfig, vp_stage: int | None = None, pp_rank: int | None = None
) -> TransformerBlockSubmodules:
    """Decoder layers of one pipeline stage.

    Args:
        config: ``moe_layer_freq`` says which layers are MoE layers, if there are experts.
        vp_stage: model chunk, with the interleaved schedule.
        pp_rank: pipeline stage; None: this rank's.
    """
    specs = {moe: cpu_layer_spec(config, moe=moe) for moe in set(moe_layers(config))}
    layers = [specs[moe] for moe in moe_layers(config)]
    layout = config.pipeline_model_parallel_layout
    if layout is not None:
        here = layout.get_layer_id_list(LayerType.decoder, vp_stage=vp_stage, pp_rank=pp_rank)
    else:
        first = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
        count = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
        here = range(first, first + count)
    return TransformerBlockSubmodules(
        layer_specs=[layers[index] for index in here], layer_norm=RMSNorm
    )


def cpu_mtp_spec(
    config: TransformerConfig, vp_stage: int | None = None, pp_rank: int | None = None
) -> MultiTokenPredictionBlockSubmodules | None:
    """MTP layers of one pipeline stage, of the kind of the last decoder layer.

    Returns:
        None where the stage has no MTP layer.
    """
    layer = cpu_layer_spec(config, moe=moe_layers(config)[-1])
    return get_gpt_mtp_block_spec_for_backend(
        config, layer, CPUSpecProvider(), vp_stage=vp_stage, pp_rank=pp_rank
    )


def moe_layers(config: TransformerConfig) -> list[bool]:
    """Which decoder layers are MoE layers: a list by layer, or every n-th, the first included."""
    frequency = config.moe_layer_freq
    if config.num_moe_experts is None:
        return [False] * config.num_layers
    if isinstance(frequency, int):
        return [index % frequency == 0 for index in range(config.num_layers)]
    assert len(frequency) == config.num_layers, (frequency, config.num_layers)
    return [bool(entry) for entry in frequency]
