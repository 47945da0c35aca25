"""Rules and settings that several families share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron_occ.config.schema_model import ModelConfig
from megatron_occ.convert.families.rotary import describe_rotary_scaling, rotary_settings
from megatron_occ.convert.table import Rule
from megatron_occ.convert.transforms import GATE_UP, QKV, head_sizes

TOP = (
    Rule("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
    Rule("decoder.final_layernorm.weight", "model.norm.weight"),
    Rule("output_layer.weight", "lm_head.weight"),
)
ATTENTION = (
    Rule("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
    Rule(
        "self_attention.linear_qkv.weight",
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        QKV,
    ),
    Rule(
        "self_attention.linear_qkv.bias",
        ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
        QKV,
    ),
    Rule("self_attention.q_layernorm.weight", "self_attn.q_norm.weight"),
    Rule("self_attention.k_layernorm.weight", "self_attn.k_norm.weight"),
    Rule("self_attention.linear_proj.weight", "self_attn.o_proj.weight"),
)
LATENT_ATTENTION = (
    Rule("input_layernorm.weight", "input_layernorm.weight"),
    Rule("self_attention.linear_q_proj.weight", "self_attn.q_proj.weight"),
    Rule("self_attention.linear_q_down_proj.weight", "self_attn.q_a_proj.weight"),
    Rule("self_attention.linear_q_up_proj.layer_norm_weight", "self_attn.q_a_layernorm.weight"),
    Rule("self_attention.linear_q_up_proj.weight", "self_attn.q_b_proj.weight"),
    Rule("self_attention.linear_kv_down_proj.weight", "self_attn.kv_a_proj_with_mqa.weight"),
    Rule("self_attention.linear_kv_up_proj.layer_norm_weight", "self_attn.kv_a_layernorm.weight"),
    Rule("self_attention.linear_kv_up_proj.weight", "self_attn.kv_b_proj.weight"),
    Rule("self_attention.linear_proj.weight", "self_attn.o_proj.weight"),
)
DENSE_MLP = (
    Rule("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight"),
    Rule("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), GATE_UP),
    Rule("mlp.linear_fc2.weight", "mlp.down_proj.weight"),
)
EXPERT_MLP = (
    Rule("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
    Rule("mlp.router.weight", "mlp.gate.weight"),
    Rule("mlp.router.expert_bias", "mlp.gate.e_score_correction_bias"),
    Rule(
        "mlp.experts.{e}.linear_fc1.weight",
        ("mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight"),
        GATE_UP,
    ),
    Rule("mlp.experts.{e}.linear_fc2.weight", "mlp.experts.{e}.down_proj.weight"),
    Rule(
        "mlp.shared_experts.linear_fc1.weight",
        ("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"),
        GATE_UP,
    ),
    Rule("mlp.shared_experts.linear_fc2.weight", "mlp.shared_experts.down_proj.weight"),
)
# DeepSeek-V3 (arXiv 2412.19437, section 2.2) and who follows it
MTP = (
    Rule("enorm.weight", "enorm.weight"),
    Rule("hnorm.weight", "hnorm.weight"),
    Rule("eh_proj.weight", "eh_proj.weight"),
    Rule("final_layernorm.weight", "shared_head.norm.weight"),
)
# in a file of its own beside a model whose authors gave it none, after Megatron-Core's names
MTP_BESIDE = (
    Rule("enorm.weight", "enorm.weight"),
    Rule("hnorm.weight", "hnorm.weight"),
    Rule("eh_proj.weight", "eh_proj.weight"),
    Rule("final_layernorm.weight", "final_layernorm.weight"),
)
# embedding and output layer, which the layers of MTP share with the trunk
MTP_DUPLICATES = (
    ("model.layers.{n}.embed_tokens.weight", "model.embed_tokens.weight"),
    ("model.layers.{n}.shared_head.head.weight", "lm_head.weight"),
)
ROTARY_TABLES = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)


def with_lines(rules: tuple[Rule, ...], *others: Rule) -> tuple[Rule, ...]:
    """A table with other lines for some parameters."""
    changed = {rule.ours: rule for rule in others}
    return tuple(changed.get(rule.ours, rule) for rule in rules)


def dense_settings(
    hf: Mapping[str, Any], rotary: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Settings of the kind that all families have.

    Args:
        hf: content of ``config.json``.
        rotary: reads the rotary embedding; None: unscaled ones, and those of Llama 3.1.

    Raises:
        ValueError: an entry that is missing, or that Megatron-Core's GPT as built here has not.
    """
    for key, allowed in (
        ("hidden_act", ("silu",)),
        ("mlp_bias", (False,)),
        ("use_bias", (False,)),
        ("add_cross_attention", (False,)),
        ("is_encoder_decoder", (False,)),
        ("attention_dropout", (0, 0.0)),
    ):
        accept(hf, key, *allowed)
    return {
        "num_layers": need(hf, "num_hidden_layers"),
        "hidden_size": need(hf, "hidden_size"),
        "ffn_hidden_size": need(hf, "intermediate_size"),
        "num_attention_heads": need(hf, "num_attention_heads"),
        "max_position_embeddings": need(hf, "max_position_embeddings"),
        "vocab_size": need(hf, "vocab_size"),
        "norm_epsilon": need(hf, "rms_norm_eps"),
        "tie_embeddings": bool(hf.get("tie_word_embeddings", False)),
        "init_std": hf.get("initializer_range", 0.02),
        **(rotary or rotary_settings)(hf),
    }


def head_settings(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Heads of grouped-query attention."""
    return {
        "num_query_groups": hf.get("num_key_value_heads"),
        "kv_channels": hf.get("head_dim"),
    }


def full_attention(hf: Mapping[str, Any]) -> None:
    """Refuse layers of sliding-window attention; the other entries of one are then idle.

    Raises:
        ValueError: names entry and value.
    """
    accept(hf, "use_sliding_window", False)
    kinds = hf.get("layer_types")
    if kinds is not None and set(kinds) != {"full_attention"}:
        raise ValueError(f"layer_types={kinds!r}: only 'full_attention' can be converted")
    idle(hf, "sliding_window", "max_window_layers")


def idle(hf: Mapping[str, Any], *keys: str) -> None:
    """Look at entries that change nothing where the others are as they were accepted."""
    for key in keys:
        hf.get(key)


def need(hf: Mapping[str, Any], key: str) -> Any:
    """An entry that must be there.

    Raises:
        ValueError: it is not.
    """
    if hf.get(key) is None:
        raise ValueError(f"{key} is missing")
    return hf[key]


def accept(hf: Mapping[str, Any], key: str, *allowed: Any) -> None:
    """Refuse an entry that asks for something else; one that is missing asks for the first value.

    Raises:
        ValueError: names entry, value and what is allowed.
    """
    value = hf.get(key)
    if value is not None and value not in allowed:
        raise ValueError(f"{key}={value!r}: only {', '.join(map(repr, allowed))} can be converted")


def describe_dense(model: ModelConfig) -> dict[str, Any]:
    """Entries of ``config.json`` that all families have."""
    content = {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": float(model.rotary_base),
        **describe_rotary_scaling(model.rotary_scaling),
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
        "attention_dropout": 0.0,
    }
    if model.rotary_percent != 1:
        content["partial_rotary_factor"] = model.rotary_percent
    return content


def describe_heads(model: ModelConfig) -> dict[str, Any]:
    """Entries of grouped-query attention."""
    heads, groups, channels = head_sizes(model)
    return {"num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": channels}
