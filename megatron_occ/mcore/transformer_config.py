"""From our configuration to Megatron-Core's transformer configuration."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.enums import AttnBackend
from torch.nn import functional

from megatron_occ.config.pipeline import model_chunks, parse_layout
from megatron_occ.config.schema import Config
from megatron_occ.config.schema_model import YarnConfig
from megatron_occ.mcore.capabilities import (
    ENGINE_MODULES,
    token_dispatcher,
    uses_transformer_engine,
)
from megatron_occ.mcore.fusions import megatron_fusions

_FP8_RECIPES = {"delayed": "delayed", "current": "tensorwise", "block": "blockwise"}


def transformer_config(config: Config, *, draws: bool = True) -> TransformerConfig:
    """Megatron's configuration of model, layout and precision.

    Args:
        config: of the run.
        draws: initial weights are drawn; False: matrices are left as their memory was.
    """
    settings = {
        **_architecture(config),
        **_initialization(config, draws),
        **_experts(config),
        **_layout(config),
        **_precision(config),
        **_recompute(config),
        **megatron_fusions(config),
        "attention_backend": _attention_backend(config),
    }
    kind = MLATransformerConfig if config.model.mla.enabled else TransformerConfig
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        megatron = kind(**settings)
    if _sends_two_states(config):
        # so messages say their shape, as they do where Megatron finds MTP layers on a stage alone
        megatron.mtp_standalone = True
    return megatron


def _sends_two_states(config: Config) -> bool:
    """Whether MTP layers get the states on both sides of the final norm from another stage."""
    apart = any("m" in chunk and "t" not in chunk for chunk in model_chunks(config))
    return config.model.mtp_reads == "before" and apart


def _architecture(config: Config) -> dict[str, Any]:
    model = config.model
    settings = dict(
        num_layers=model.num_layers,
        mtp_num_layers=config.mtp.num_layers or None,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        layernorm_epsilon=model.norm_epsilon,
        qk_layernorm=model.qk_layernorm,
        add_qkv_bias=model.qkv_bias,
        add_bias_linear=False,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    if not model.mla.enabled:
        return settings
    return settings | dict(
        multi_latent_attention=True,
        q_lora_rank=model.mla.q_lora_rank,
        kv_lora_rank=model.mla.kv_lora_rank,
        qk_head_dim=model.mla.qk_head_dim,
        qk_pos_emb_head_dim=model.mla.qk_rope_head_dim,
        v_head_dim=model.mla.v_head_dim,
        rotary_base=model.rotary_base,
        **_rotary(model.mla.yarn),
    )


def _rotary(yarn: YarnConfig) -> dict[str, Any]:
    if yarn.factor is None:
        return dict(rope_type="rope")
    return dict(
        rope_type="yarn",
        rotary_scaling_factor=yarn.factor,
        original_max_position_embeddings=yarn.original_max_position_embeddings,
        beta_fast=yarn.beta_fast,
        beta_slow=yarn.beta_slow,
        # equal: sines and cosines are not scaled, scores are
        mscale=yarn.mscale,
        mscale_all_dim=yarn.mscale,
    )


def _initialization(config: Config, draws: bool) -> dict[str, Any]:
    """How matrices get their first values, and where.

    Not by ``perform_initialization``: with it 0.16.1 leaves out the marks that tell a parameter
    which is split over ranks from its copies, and gradient norms would lack most of the parts.
    """
    if draws:
        on_cpu = config.model.init_device == "cpu" or not torch.cuda.is_available()
        return dict(init_method_std=config.model.init_std, use_cpu_initialization=on_cpu)
    methods = ("init_method", "output_layer_init_method", "embedding_init_method")
    # on the host Megatron would make a whole matrix to cut the rank's share from
    return {"use_cpu_initialization": False, **dict.fromkeys(methods, _leave)}


def _leave(weight: torch.Tensor) -> None:
    """An initial value for what a checkpoint overwrites: none."""


def _experts(config: Config) -> dict[str, Any]:
    moe, model = config.model.moe, config.model
    if moe.num_experts is None:
        return {}
    dense = moe.first_dense_layers
    return dict(
        num_moe_experts=moe.num_experts,
        moe_router_topk=moe.top_k,
        moe_ffn_hidden_size=moe.ffn_hidden_size or model.ffn_hidden_size,
        moe_shared_expert_intermediate_size=moe.shared_ffn_hidden_size,
        moe_layer_freq=[0] * dense + [1] * (model.num_layers - dense),
        moe_router_score_function=moe.score_function,
        # as every family with experts computes it: in bf16 a token in ten would go elsewhere
        moe_router_dtype="fp32",
        moe_router_enable_expert_bias=moe.expert_bias,
        moe_router_bias_update_rate=moe.bias_update_rate,
        moe_router_topk_scaling_factor=moe.scaling_factor,
        moe_router_num_groups=moe.groups,
        moe_router_group_topk=moe.top_groups,
        # Megatron's balancing loss is a mean over a micro-batch and a rank: it would depend on the
        # layout. Ours is in balance.py
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        moe_token_dispatcher_type=token_dispatcher(config),
        moe_grouped_gemm=uses_transformer_engine(),
    )


def _layout(config: Config) -> dict[str, Any]:
    parallel = config.parallel
    virtual, layout = parallel.virtual_pipeline, parallel.pipeline_layout
    return dict(
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        pipeline_model_parallel_layout="|".join(parse_layout(layout)) if layout else None,
        # batched messages of the interleaved schedule are taken for each other between two stages,
        # which are each other's next and previous one
        overlap_p2p_comm=virtual > 1,
        batch_p2p_comm=virtual == 1,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        # our losses are normalised by global counts: no division anywhere else
        calculate_per_token_loss=True,
    )


def _recompute(config: Config) -> dict[str, Any]:
    if config.recompute == "none":
        return {}
    if config.recompute == "selective":
        return dict(recompute_granularity="selective", recompute_modules=_modules(config))
    some = config.recompute_layers
    return dict(
        recompute_granularity="full",
        recompute_method="block" if some else "uniform",
        recompute_num_layers=some or 1,
    )


def _attention_backend(config: Config) -> AttnBackend:
    """Elsewhere there is nothing to choose, and Megatron would set variables of the environment."""
    return AttnBackend[config.attention_backend if uses_transformer_engine() else "auto"]


def _modules(config: Config) -> list[str]:
    """Modules that are computed again; in a dry run those that Megatron accepts here."""
    if uses_transformer_engine():
        return list(config.recompute_modules)
    return [module for module in config.recompute_modules if module not in ENGINE_MODULES]


def _precision(config: Config) -> dict[str, Any]:
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    fp8 = config.fp8
    settings = dict(params_dtype=dtype, pipeline_dtype=dtype, bf16=dtype == torch.bfloat16)
    if fp8.format != "none":
        settings |= dict(
            fp8=fp8.format,
            fp8_recipe=_FP8_RECIPES[fp8.scaling],
            first_last_layers_bf16=fp8.first_layers_bf16 + fp8.last_layers_bf16 > 0,
            num_layers_at_start_in_bf16=fp8.first_layers_bf16,
            num_layers_at_end_in_bf16=fp8.last_layers_bf16,
        )
    return settings
