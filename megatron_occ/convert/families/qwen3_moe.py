"""Qwen3's mixtures of experts (arXiv 2505.09388), as Qwen3-30B-A3B; they have no MTP layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_occ.config.schema_model import ModelConfig
from megatron_occ.convert.families.common import (
    ATTENTION,
    DENSE_MLP,
    EXPERT_MLP,
    MTP_BESIDE,
    ROTARY_TABLES,
    TOP,
    accept,
    dense_settings,
    describe_dense,
    describe_heads,
    full_attention,
    head_settings,
    need,
)
from megatron_occ.convert.families.experts import describe_softmax, softmax_settings
from megatron_occ.convert.families.rotary import whole_heads
from megatron_occ.convert.table import Family


def _settings(hf: Mapping[str, Any]) -> dict[str, Any]:
    accept(hf, "attention_bias", False)
    accept(hf, "qkv_bias", False)
    accept(hf, "use_qk_norm", True)
    need(hf, "num_key_value_heads")
    full_attention(hf)
    whole_heads(hf)
    return dense_settings(hf) | head_settings(hf) | softmax_settings(hf) | {"qk_layernorm": True}


def _describe(model: ModelConfig) -> dict[str, Any]:
    return (
        describe_dense(model)
        | describe_heads(model)
        | describe_softmax(model)
        | {"attention_bias": False}
    )


QWEN3_MOE = Family(
    "Qwen3MoeForCausalLM",
    "qwen3_moe",
    _settings,
    _describe,
    depths_key="num_nextn_predict_layers",
    top=TOP,
    layer=ATTENTION + DENSE_MLP + EXPERT_MLP,
    mtp=MTP_BESIDE,
    mtp_prefix="model.mtp_layers.{k}.",
    mtp_beside=True,
    ignored=ROTARY_TABLES,
)
