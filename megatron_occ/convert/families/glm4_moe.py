"""GLM-4.5 and GLM-4.5-Air (arXiv 2508.06471): grouped-query attention, experts, MTP layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_occ.config.schema_model import ModelConfig
from megatron_occ.convert.families.common import (
    ATTENTION,
    DENSE_MLP,
    EXPERT_MLP,
    MTP,
    MTP_DUPLICATES,
    ROTARY_TABLES,
    TOP,
    dense_settings,
    describe_dense,
    describe_heads,
    head_settings,
)
from megatron_occ.convert.families.experts import describe_experts, expert_settings
from megatron_occ.convert.families.rotary import rotary_settings
from megatron_occ.convert.table import Family


def _settings(hf: Mapping[str, Any]) -> dict[str, Any]:
    return (
        # transformers turns half of a head where nothing is said
        dense_settings(hf, lambda hf: rotary_settings(hf, 0.5))
        | head_settings(hf)
        | expert_settings(hf)
        | {
            "qkv_bias": bool(hf.get("attention_bias", False)),
            "qk_layernorm": bool(hf.get("use_qk_norm", False)),
        }
    )


def _describe(model: ModelConfig) -> dict[str, Any]:
    return (
        describe_dense(model)
        | describe_heads(model)
        | describe_experts(model)
        | {
            "attention_bias": model.qkv_bias,
            "use_qk_norm": model.qk_layernorm,
            # transformers' own default is another one
            "partial_rotary_factor": model.rotary_percent,
        }
    )


GLM4_MOE = Family(
    "Glm4MoeForCausalLM",
    "glm4_moe",
    _settings,
    _describe,
    depths_key="num_nextn_predict_layers",
    top=TOP,
    layer=ATTENTION + DENSE_MLP + EXPERT_MLP,
    mtp=MTP,
    duplicates=MTP_DUPLICATES,
    ignored=ROTARY_TABLES,
    writes_duplicates=True,
    repeats_tied=True,
)
