"""DeepSeek-V3 and -R1 (arXiv 2412.19437): latent attention, experts, fp8 weights, MTP layers.

Kimi K2 (arXiv 2507.20534) is the same architecture without MTP layers. GLM-4.7-Flash is it with
another entry for the layers without experts.
"""

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
    need,
)
from megatron_occ.convert.families.experts import describe_experts, expert_settings
from megatron_occ.convert.families.latent import describe_latent, latent_settings
from megatron_occ.convert.table import Family


def _settings(hf: Mapping[str, Any]) -> dict[str, Any]:
    return latent_settings(hf) | expert_settings(hf)


def _describe(model: ModelConfig) -> dict[str, Any]:
    return describe_latent(model) | describe_experts(model) | {"topk_method": "noaux_tc"}


def _lite_settings(hf: Mapping[str, Any]) -> dict[str, Any]:
    kinds = hf.get("mlp_layer_types")
    if kinds is None:
        # transformers makes the first layer dense, others read the number: so it has to be one
        accept(hf, "first_k_dense_replace", 1)
        return latent_settings(hf) | expert_settings(hf, dense=1)
    dense = kinds.count("dense")
    layers = need(hf, "num_hidden_layers")
    if kinds != ["dense"] * dense + ["sparse"] * (layers - dense):
        raise ValueError(
            f"mlp_layer_types={kinds!r}: only 'dense' first and 'sparse' behind it, "
            f"{layers} in all, can be converted"
        )
    accept(hf, "first_k_dense_replace", dense)
    return latent_settings(hf) | expert_settings(hf, dense=dense)


def _describe_lite(model: ModelConfig) -> dict[str, Any]:
    dense = model.moe.first_dense_layers
    kinds = ["dense"] * dense + ["sparse"] * (model.num_layers - dense)
    return _describe(model) | {"mlp_layer_types": kinds}


def _family(architecture: str, model_type: str, settings: Any, describe: Any) -> Family:
    return Family(
        architecture,
        model_type,
        settings,
        describe,
        depths_key="num_nextn_predict_layers",
        top=TOP,
        layer=LATENT_ATTENTION + DENSE_MLP + EXPERT_MLP,
        mtp=MTP,
        duplicates=MTP_DUPLICATES,
        ignored=ROTARY_TABLES,
        writes_duplicates=True,
        repeats_tied=True,
    )


DEEPSEEK_V3 = _family("DeepseekV3ForCausalLM", "deepseek_v3", _settings, _describe)
GLM4_MOE_LITE = _family("Glm4MoeLiteForCausalLM", "glm4_moe_lite", _lite_settings, _describe_lite)
