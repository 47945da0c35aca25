"""Settings of mixtures of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_occ.config.schema_model import ModelConfig
from megatron_occ.convert.families.common import accept, need


def expert_settings(
    hf: Mapping[str, Any], experts: str = "n_routed_experts", dense: int | None = None
) -> dict[str, Any]:
    """Experts of DeepSeek-V3's kind: sigmoid scores with a bias, shared experts, groups.

    Args:
        hf: content of ``config.json``.
        experts: entry with their number.
        dense: layers before the first with experts; None: ``first_k_dense_replace`` says it.

    Raises:
        ValueError: an entry that is missing, or that Megatron-Core's router has not.
    """
    accept(hf, "scoring_func", "sigmoid")
    accept(hf, "score_function", "sigmoid")
    accept(hf, "topk_method", "noaux_tc")
    accept(hf, "norm_topk_prob", True)
    accept(hf, "moe_layer_freq", 1)
    width, groups = need(hf, "moe_intermediate_size"), need(hf, "n_group")
    chosen, top_k = need(hf, "topk_group"), need(hf, "num_experts_per_tok")
    if top_k == 1:
        raise ValueError(
            "num_experts_per_tok=1: the weight of a single expert is 1 in this architecture, in "
            "Megatron-Core its score. Only more than one can be converted"
        )
    if chosen < groups and top_k != 2 * chosen:
        raise ValueError(
            f"topk_group={chosen} with num_experts_per_tok={top_k}: a group's score is that of its "
            "best two experts in this architecture, in Megatron-Core of its best "
            "num_experts_per_tok / topk_group. Only where that is two it can be converted"
        )
    shared, number = shared_experts(hf), need(hf, experts)
    accept(hf, "num_local_experts", number)
    return {
        "moe.num_experts": number,
        "moe.top_k": top_k,
        "moe.ffn_hidden_size": width,
        "moe.shared_ffn_hidden_size": shared * width or None,
        "moe.first_dense_layers": need(hf, "first_k_dense_replace") if dense is None else dense,
        "moe.score_function": "sigmoid",
        "moe.expert_bias": True,
        "moe.scaling_factor": need(hf, "routed_scaling_factor"),
        "moe.groups": groups if groups > 1 else None,
        "moe.top_groups": chosen if groups > 1 else None,
    }


def shared_experts(hf: Mapping[str, Any]) -> int:
    """Number of experts that every token goes to."""
    return hf.get("n_shared_experts") or hf.get("num_shared_experts") or 0


def softmax_settings(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Experts of Qwen3's kind: softmax scores, normalised over the chosen ones, none shared.

    Softmax over all and division by the sum of the chosen is softmax over the chosen, which is what
    Megatron-Core's router does.

    Raises:
        ValueError: an entry that is missing, or that Megatron-Core's router has not.
    """
    if hf.get("norm_topk_prob") is not True:
        raise ValueError(
            f"norm_topk_prob={hf.get('norm_topk_prob')!r}: the weights of the chosen experts do "
            "not sum to 1. Only True can be converted"
        )
    top_k = need(hf, "num_experts_per_tok")
    if top_k == 1:
        raise ValueError(
            "num_experts_per_tok=1: the weight of a single expert is 1 in this architecture, and "
            "its router would not learn. Only more than one can be converted"
        )
    accept(hf, "decoder_sparse_step", 1)
    accept(hf, "shared_expert_intermediate_size", 0)
    number = hf.get("num_experts")
    if number is None:
        number = need(hf, "num_local_experts")
    accept(hf, "num_local_experts", number)
    dense = hf.get("mlp_only_layers") or []
    if sorted(dense) != list(range(len(dense))):
        raise ValueError(
            f"mlp_only_layers={dense!r}: layers without experts can only be the first ones"
        )
    return {
        "moe.num_experts": number,
        "moe.top_k": top_k,
        "moe.ffn_hidden_size": need(hf, "moe_intermediate_size"),
        "moe.first_dense_layers": len(dense),
        "moe.score_function": "softmax",
    }


def describe_softmax(model: ModelConfig) -> dict[str, Any]:
    """Entries of Qwen3's experts."""
    moe = model.moe
    return {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.ffn_hidden_size or model.ffn_hidden_size,
        "mlp_only_layers": list(range(moe.first_dense_layers)),
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
    }


def describe_experts(model: ModelConfig) -> dict[str, Any]:
    """Entries of DeepSeek-V3's experts.

    Raises:
        ValueError: experts of another kind.
    """
    moe = model.moe
    if moe.score_function != "sigmoid" or not moe.expert_bias:
        raise ValueError(
            f"model.moe.score_function={moe.score_function}, model.moe.expert_bias="
            f"{str(moe.expert_bias).lower()}: this architecture has sigmoid scores with a bias"
        )
    width = moe.ffn_hidden_size or model.ffn_hidden_size
    shared = moe.shared_ffn_hidden_size or 0
    if shared % width:
        raise ValueError(
            f"model.moe.shared_ffn_hidden_size={shared}: is no multiple of the experts' width, "
            f"{width}, which this architecture has"
        )
    return {
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": width,
        "n_shared_experts": shared // width,
        "first_k_dense_replace": moe.first_dense_layers,
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": moe.scaling_factor or 1.0,
        "n_group": moe.groups or 1,
        "topk_group": moe.top_groups or 1,
    }
