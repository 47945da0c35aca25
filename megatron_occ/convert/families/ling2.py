"""Ling 2.0 (Ling-mini, -flash and -1T): grouped-query attention, experts, MTP layers.

Names as in ``modeling_bailing_moe_v2.py``, which comes with the checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_occ.config.schema_model import ModelConfig
from megatron_occ.convert.families.common import (
    DENSE_MLP,
    EXPERT_MLP,
    MTP,
    TOP,
    accept,
    dense_settings,
    describe_dense,
    describe_heads,
    full_attention,
    head_settings,
    need,
    with_lines,
)
from megatron_occ.convert.families.experts import (
    describe_experts,
    expert_settings,
    shared_experts,
)
from megatron_occ.convert.families.rotary import rotary_settings
from megatron_occ.convert.table import Family, Rule
from megatron_occ.convert.transforms import PLAIN_QKV


def _settings(hf: Mapping[str, Any]) -> dict[str, Any]:
    accept(hf, "use_qkv_bias", False)
    accept(hf, "router_dtype", "fp32")
    accept(hf, "moe_router_enable_expert_bias", True)
    accept(hf, "norm_head", False)
    accept(hf, "use_rmsnorm", True)
    for key in ("norm_softmax", "using_split_qkv_in_self_attention"):
        accept(hf, key, False)
    for key in ("embedding_dropout", "output_dropout"):
        accept(hf, key, 0.0)
    shared = shared_experts(hf) * (hf.get("moe_intermediate_size") or 0)
    accept(hf, "moe_shared_expert_intermediate_size", shared)
    accept(hf, "moe_router_topk_scaling_factor", hf.get("routed_scaling_factor"))
    full_attention(hf)
    return (
        dense_settings(hf, _rotary)
        | head_settings(hf)
        | expert_settings(hf, "num_experts")
        | {"qk_layernorm": bool(need(hf, "use_qk_norm"))}
    )


def _rotary(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Its code reads the part of a head that is turned from either of two entries."""
    if hf.get("rotary_dim") is None:
        return rotary_settings(hf)
    part = hf["rotary_dim"] / need(hf, "head_dim")
    accept(hf, "partial_rotary_factor", part)
    return rotary_settings(hf, part)


def _describe(model: ModelConfig) -> dict[str, Any]:
    experts = describe_experts(model)
    experts["num_experts"] = experts.pop("n_routed_experts")
    experts["num_shared_experts"] = experts.pop("n_shared_experts")
    experts["score_function"] = experts.pop("scoring_func")
    return (
        describe_dense(model)
        | describe_heads(model)
        | experts
        | {
            "use_qkv_bias": False,
            "use_qk_norm": model.qk_layernorm,
            "moe_router_enable_expert_bias": True,
            "router_dtype": "fp32",
        }
    )


LING2 = Family(
    "BailingMoeV2ForCausalLM",
    "bailing_moe",
    _settings,
    _describe,
    depths_key="num_nextn_predict_layers",
    top=with_lines(TOP, Rule("embedding.word_embeddings.weight", "model.word_embeddings.weight")),
    layer=(
        Rule("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
        Rule("self_attention.linear_qkv.weight", "attention.query_key_value.weight", PLAIN_QKV),
        Rule("self_attention.q_layernorm.weight", "attention.query_layernorm.weight"),
        Rule("self_attention.k_layernorm.weight", "attention.key_layernorm.weight"),
        Rule("self_attention.linear_proj.weight", "attention.dense.weight"),
        *DENSE_MLP,
        *with_lines(EXPERT_MLP, Rule("mlp.router.expert_bias", "mlp.gate.expert_bias")),
    ),
    mtp=with_lines(MTP, Rule("final_layernorm.weight", "final_layernorm.weight")),
)
