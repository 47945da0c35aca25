"""Modules whose activations can be computed again on their own."""

from __future__ import annotations

from megatron_occ.config.schema_model import ModelConfig

# those that all tested versions of Megatron-Core know
MODULES = ("core_attn", "mla_up_proj", "layernorm", "mlp", "moe", "moe_act", "shared_experts")


def what_lacks(module: str, model: ModelConfig) -> str:
    """What a model would need to have a module of ``MODULES``; empty where it has it.

    Norms count where they are modules of their own: TransformerEngine computes those before a
    query/key/value projection and before a dense MLP as a part of these.

    Args:
        module: one of ``MODULES``.
        model: section ``model``.
    """
    moe, latent = model.moe, model.mla.enabled
    if module == "mla_up_proj":
        return "" if latent else "model.mla.enabled=true"
    if module == "layernorm":
        has_own = latent or moe.num_experts is not None
        return "" if has_own else "model.moe.num_experts or model.mla.enabled=true"
    if module == "mlp":
        has_dense = moe.num_experts is None or moe.first_dense_layers > 0
        return "" if has_dense else "model.moe.first_dense_layers above 0"
    if module in ("moe", "moe_act"):
        return "model.moe.num_experts" if moe.num_experts is None else ""
    if module == "shared_experts":
        return "" if moe.shared_ffn_hidden_size else "model.moe.shared_ffn_hidden_size"
    return ""
