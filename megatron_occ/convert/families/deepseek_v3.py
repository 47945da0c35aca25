"""DeepSeek-V3 and -R1 (arXiv 2412.19437): latent attention, experts, fp8 weights, MTP layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_occ.config.schema_model import ModelConfig, YarnConfig
from megatron_occ.convert.families.common import (
    DENSE_MLP,
    EXPERT_MLP,
    LATENT_ATTENTION,
    MTP,
    MTP_DUPLICATES,
    ROTARY_TABLES,
    TOP,
    accept,
    dense_settings,
    describe_dense,
    describe_experts,
    expert_settings,
    need,
    rotary_base,
    rotary_scaling,
)
from megatron_occ.convert.table import Family


def _settings(hf: Mapping[str, Any]) -> dict[str, Any]:
    accept(hf, "attention_bias", False)
    # Megatron-Core's latent attention turns neighbouring channels, as this entry says
    accept(hf, "rope_interleave", True)
    # that of the latents' norms, whatever the entry says; Megatron-Core has one for all norms
    accept(hf, "rms_norm_eps", 1e-6)
    return (
        dense_settings(hf, _rotary)
        | expert_settings(hf)
        | {
            "qk_layernorm": True,
            "mla.enabled": True,
            "mla.q_lora_rank": hf.get("q_lora_rank"),
            "mla.kv_lora_rank": need(hf, "kv_lora_rank"),
            "mla.qk_head_dim": need(hf, "qk_nope_head_dim"),
            "mla.qk_rope_head_dim": need(hf, "qk_rope_head_dim"),
            "mla.v_head_dim": need(hf, "v_head_dim"),
        }
    )


def _rotary(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Base, and YaRN's entries."""
    kind, scaling = rotary_scaling(hf)
    if kind == "default":
        return rotary_base(hf)
    if kind != "yarn":
        raise ValueError(f"rope_scaling has the type {kind!r}: only 'yarn' can be converted")
    scale = scaling.get("mscale", 1.0)
    if scaling.get("mscale_all_dim") != scale:
        raise ValueError(
            f"rope_scaling has mscale={scale} and mscale_all_dim={scaling.get('mscale_all_dim')}: "
            "only equal ones can be converted, as DeepSeek-V3 has them"
        )
    accept(scaling, "truncate", True)
    accept(scaling, "attention_factor", 1.0)
    return {
        **rotary_base(hf),
        "mla.yarn.factor": float(need(scaling, "factor")),
        "mla.yarn.original_max_position_embeddings": need(
            scaling, "original_max_position_embeddings"
        ),
        "mla.yarn.beta_fast": float(scaling.get("beta_fast", 32)),
        "mla.yarn.beta_slow": float(scaling.get("beta_slow", 1)),
        "mla.yarn.mscale": float(scale),
    }


def _describe_rotary(yarn: YarnConfig) -> dict[str, Any]:
    if yarn.factor is None:
        return {}
    scaling = {
        "type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_max_position_embeddings,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale,
    }
    return {"rope_scaling": scaling}


def _describe(model: ModelConfig) -> dict[str, Any]:
    mla = model.mla
    return (
        describe_dense(model)
        | describe_experts(model)
        | {
            "num_key_value_heads": model.num_attention_heads,
            "attention_bias": False,
            "rope_interleave": True,
            "topk_method": "noaux_tc",
            "q_lora_rank": mla.q_lora_rank,
            "kv_lora_rank": mla.kv_lora_rank,
            "qk_nope_head_dim": mla.qk_head_dim,
            "qk_rope_head_dim": mla.qk_rope_head_dim,
            "v_head_dim": mla.v_head_dim,
            **_describe_rotary(mla.yarn),
        }
    )


DEEPSEEK_V3 = Family(
    "DeepseekV3ForCausalLM",
    "deepseek_v3",
    _settings,
    _describe,
    depths_key="num_nextn_predict_layers",
    top=TOP,
    layer=LATENT_ATTENTION + DENSE_MLP + EXPERT_MLP,
    mtp=MTP,
    duplicates=MTP_DUPLICATES,
    ignored=ROTARY_TABLES,
    writes_duplicates=True,
)
