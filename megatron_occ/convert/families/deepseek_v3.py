"""DeepSeek-V3 and -R1 (arXiv 2412.19437): latent attention, experts, fp8 weights, MTP layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_occ.config.schema_model import ModelConfig
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
)
from megatron_occ.convert.table import Family


def _settings(hf: Mapping[str, Any]) -> dict[str, Any]:
    accept(hf, "attention_bias", False)
    # Megatron-Core's latent attention turns neighbouring channels, as this entry says
    accept(hf, "rope_interleave", True)
    # that of the latents' norms, whatever the entry says; Megatron-Core has one for all norms
    accept(hf, "rms_norm_eps", 1e-6)
    return (
        dense_settings(hf)
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
