"""Settings of latent attention, with YaRN, as DeepSeek-V3 and who follows it have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_occ.config.schema_model import ModelConfig, YarnConfig
from megatron_occ.convert.families.common import (
    accept,
    dense_settings,
    describe_dense,
    idle,
    need,
)
from megatron_occ.convert.families.rotary import (
    check_entries,
    rotary_base,
    rotary_entries,
    whole_heads,
)

# of the norms of the latents in transformers and in the authors' code, whatever rms_norm_eps says
LATENT_EPSILON = 1e-6
_YARN = (
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "attention_factor",
)


def latent_settings(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Latent attention, and what all families have.

    Raises:
        ValueError: an entry that is missing, or that Megatron-Core's latent attention has not.
    """
    accept(hf, "attention_bias", False)
    # Megatron-Core's latent attention turns neighbouring channels, as this entry says
    accept(hf, "rope_interleave", True)
    plain, turned = need(hf, "qk_nope_head_dim"), need(hf, "qk_rope_head_dim")
    accept(hf, "head_dim", turned)
    accept(hf, "qk_head_dim", plain + turned)
    # keys and values are unfolded for each head
    idle(hf, "num_key_value_heads")
    whole_heads(hf)
    own = need(hf, "rms_norm_eps") != LATENT_EPSILON
    return dense_settings(hf, _rotary) | {
        "qk_layernorm": True,
        "mla.enabled": True,
        "mla.q_lora_rank": hf.get("q_lora_rank"),
        "mla.kv_lora_rank": need(hf, "kv_lora_rank"),
        "mla.qk_head_dim": plain,
        "mla.qk_rope_head_dim": turned,
        "mla.v_head_dim": need(hf, "v_head_dim"),
        "mla.norm_epsilon": LATENT_EPSILON if own else None,
    }


def describe_latent(model: ModelConfig) -> dict[str, Any]:
    """Entries of latent attention, and those that all families have."""
    mla = model.mla
    return describe_dense(model) | {
        "num_key_value_heads": model.num_attention_heads,
        "attention_bias": False,
        "rope_interleave": True,
        "q_lora_rank": mla.q_lora_rank,
        "kv_lora_rank": mla.kv_lora_rank,
        "qk_nope_head_dim": mla.qk_head_dim,
        "qk_rope_head_dim": mla.qk_rope_head_dim,
        "v_head_dim": mla.v_head_dim,
        **_describe_rotary(mla.yarn),
    }


def _rotary(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Base, and YaRN's entries."""
    kind, scaling = rotary_entries(hf)
    if kind == "default":
        check_entries(scaling, ())
        return {"rotary_base": rotary_base(hf, scaling)}
    if kind != "yarn":
        raise ValueError(f"rope_scaling has the type {kind!r}: only 'yarn' can be converted")
    check_entries(scaling, _YARN)
    scale, everywhere = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if scale != everywhere or not scale:
        # with one of them missing or 0 transformers scales sines and cosines by factors that
        # Megatron-Core's latent attention does not have
        raise ValueError(
            f"rope_scaling has mscale={scale} and mscale_all_dim={everywhere}: only equal ones "
            "above 0 can be converted, as DeepSeek-V3 has them"
        )
    accept(scaling, "truncate", True)
    accept(scaling, "attention_factor", 1.0)
    return {
        "rotary_base": rotary_base(hf, scaling),
        "mla.yarn.factor": float(need(scaling, "factor")),
        "mla.yarn.original_max_position_embeddings": need(
            scaling, "original_max_position_embeddings"
        ),
        "mla.yarn.beta_fast": float(scaling.get("beta_fast") or 32),
        "mla.yarn.beta_slow": float(scaling.get("beta_slow") or 1),
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
