"""Small models of every kind, built with the CPU back end's specs."""

from __future__ import annotations

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from torch.nn import functional

from megatron_occ.mcore.cpu.specs import cpu_block_spec, cpu_mtp_spec

HIDDEN, HEADS, VOCABULARY, LENGTH = 32, 4, 24, 8
MOE = {
    "num_moe_experts": 4,
    "moe_ffn_hidden_size": 16,
    "moe_layer_freq": [0, 1],
    "moe_router_load_balancing_type": "none",
}
SIGMOID = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_topk_scaling_factor": 1.5,
    "moe_router_dtype": "fp32",
}
SHARED = {"moe_shared_expert_intermediate_size": 24}
MLA = {
    "multi_latent_attention": True,
    "qk_layernorm": True,
    "q_lora_rank": None,
    "kv_lora_rank": 12,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 6,
    "rope_type": "rope",
}
KINDS = {
    "dense": {},
    "qk_norm": {"qk_layernorm": True},
    "moe": MOE,
    "sigmoid": MOE | SIGMOID,
    "shared_expert": MOE | SHARED,
    "mla": MLA,
    "mla_q_lora": MLA | {"q_lora_rank": 10},
    "mla_moe": MLA | MOE | SIGMOID | SHARED,
}


def build(kind, depths=1, **options):
    """Two layers, the second of the kind, and MTP layers of the kind."""
    latent = "mla" in kind
    config = (MLATransformerConfig if latent else TransformerConfig)(
        **{
            "num_layers": 2,
            "mtp_num_layers": depths,
            "hidden_size": HIDDEN,
            "ffn_hidden_size": 48,
            "num_attention_heads": HEADS,
            "num_query_groups": HEADS if latent else 2,
            "normalization": "RMSNorm",
            "add_bias_linear": False,
            "gated_linear_unit": True,
            "activation_func": functional.silu,
            "init_method_std": 0.2,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "calculate_per_token_loss": True,
            "use_cpu_initialization": True,
            "gradient_accumulation_fusion": False,
            "persist_layer_norm": False,
            "bias_dropout_fusion": False,
            "bias_activation_fusion": False,
            "masked_softmax_fusion": False,
            "apply_rope_fusion": False,
            **KINDS[kind],
            **options,
        }
    )
    torch.manual_seed(0)
    return GPTModel(
        config=config,
        transformer_layer_spec=cpu_block_spec(config),
        mtp_block_spec=cpu_mtp_spec(config),
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )


def token_ids(rows=2):
    return torch.randint(0, VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(1))


def backward(model, ids=None, packed=None, places=None):
    """Loss of a batch, Megatron's own MTP loss included; gradients are left in the model."""
    ids = token_ids() if ids is None else ids
    places = torch.arange(LENGTH).expand_as(ids) if places is None else places
    mask = torch.ones(ids.shape)
    loss = model(ids, places, None, labels=ids, loss_mask=mask, packed_seq_params=packed).sum()
    loss.backward()
    return loss.item()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def inner_layer(mtp_layer):
    """The transformer layer of an MTP layer: Megatron 0.17 renamed it."""
    return getattr(mtp_layer, "transformer_layer", None) or mtp_layer.mtp_model_layer
