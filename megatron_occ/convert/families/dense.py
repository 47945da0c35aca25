"""Dense models: Llama, Qwen2, Qwen3, and MiMo, which is Qwen2 with MTP layers (arXiv 2505.07608).

MiMo's MTP layer, with h the trunk's state and e the embedding of the next token, is

    final_layernorm(Block(input_proj [hidden_layernorm(h); token_layernorm(e)]))

after ``mimo_mtp.py`` in vLLM; Megatron-Core's projection reads [e; h]. h is the state before the
trunk's final norm: the vLLM fork of its authors returns it for nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_occ.config.schema_model import ModelConfig
from megatron_occ.convert.families.common import (
    ATTENTION,
    DENSE_MLP,
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
from megatron_occ.convert.families.rotary import whole_heads
from megatron_occ.convert.table import Family, Rule
from megatron_occ.convert.transforms import SWAP_HALVES


def _whole_heads(hf: Mapping[str, Any], biased: bool) -> dict[str, Any]:
    accept(hf, "attention_bias", biased)
    whole_heads(hf)
    return dense_settings(hf) | head_settings(hf) | {"qkv_bias": biased}


def _llama_settings(hf: Mapping[str, Any]) -> dict[str, Any]:
    accept(hf, "rope_interleaved", False)
    return _whole_heads(hf, False)


def _qwen2_settings(hf: Mapping[str, Any]) -> dict[str, Any]:
    accept(hf, "use_mrope", False)
    full_attention(hf)
    return _whole_heads(hf, True)


def _mimo_settings(hf: Mapping[str, Any]) -> dict[str, Any]:
    # the key is our own, in folders for SGLang
    return _qwen2_settings(hf) | {"mtp_reads": hf.get("mtp_reads", "before")}


def _qwen3_settings(hf: Mapping[str, Any]) -> dict[str, Any]:
    # transformers has numbers of its own where these are missing
    for key in ("head_dim", "num_key_value_heads"):
        need(hf, key)
    full_attention(hf)
    return _whole_heads(hf, False) | {"qk_layernorm": True}


def _describe(model: ModelConfig) -> dict[str, Any]:
    return describe_dense(model) | describe_heads(model) | {"attention_bias": model.qkv_bias}


def _dense(architecture: str, model_type: str, settings: Any, **more: Any) -> Family:
    return Family(
        architecture,
        model_type,
        settings,
        _describe,
        **{"mtp": MTP_BESIDE, "ignored": ROTARY_TABLES, **more},
        depths_key="num_nextn_predict_layers",
        top=TOP,
        layer=ATTENTION + DENSE_MLP,
        mtp_prefix="model.mtp_layers.{k}.",
    )


LLAMA = _dense("LlamaForCausalLM", "llama", _llama_settings, mtp_beside=True)
QWEN2 = _dense("Qwen2ForCausalLM", "qwen2", _qwen2_settings, always_biased=True, mtp_beside=True)
QWEN3 = _dense("Qwen3ForCausalLM", "qwen3", _qwen3_settings, mtp_beside=True)
MIMO = _dense(
    "MiMoForCausalLM",
    # whose settings it has: transformers and servers then need no code from the folder
    "qwen2",
    _mimo_settings,
    always_biased=True,
    # MTP layers of servers read an output layer of their own
    always_untied=True,
    mtp=(
        Rule("enorm.weight", "token_layernorm.weight"),
        Rule("hnorm.weight", "hidden_layernorm.weight"),
        Rule("eh_proj.weight", "input_proj.weight", SWAP_HALVES),
        Rule("final_layernorm.weight", "final_layernorm.weight"),
    ),
)
