"""Settings of the tiny models of each family, as transformers knows them."""

from __future__ import annotations

from transformers import (
    DeepseekV3Config,
    Glm4MoeConfig,
    Glm4MoeLiteConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCABULARY, WIDTH, LAYERS = 23, 32, 3
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=WIDTH,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    max_position_embeddings=64,
    rms_norm_eps=1e-4,
    rope_theta=500.0,
    tie_word_embeddings=False,
    eos_token_id=1,
)
EPSILON = dict(rms_norm_eps=1e-6)
YARN = dict(
    type="yarn",
    factor=4.0,
    original_max_position_embeddings=16,
    beta_fast=4.0,
    beta_slow=0.05,
    mscale=1.0,
    mscale_all_dim=1.0,
)
# waves of 6, 30, 140 and 660 positions: one is left, one on the ramp, two are scaled
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
HEADS = dict(num_key_value_heads=2, head_dim=8)
EXPERTS = dict(
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    n_shared_experts=2,
    first_k_dense_replace=1,
    routed_scaling_factor=1.5,
)
LATENT = dict(q_lora_rank=12, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6)


SOFTMAX = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True)


def _flash_experts():
    return {key: value for key, value in EXPERTS.items() if key != "first_k_dense_replace"}


def _groups():
    return EXPERTS | dict(n_group=2, topk_group=1)


CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES, **HEADS),
    "llama 3.1": lambda: LlamaConfig(**SIZES, **HEADS, rope_scaling=LLAMA3),
    "llama 3.1 other ramp": lambda: LlamaConfig(
        **SIZES, **HEADS, rope_scaling=LLAMA3 | dict(low_freq_factor=0.3, high_freq_factor=20.0)
    ),
    "llama tied": lambda: LlamaConfig(**SIZES | {"tie_word_embeddings": True}, **HEADS),
    "qwen2": lambda: Qwen2Config(**SIZES, num_key_value_heads=2),
    "qwen3": lambda: Qwen3Config(**SIZES, **HEADS | {"head_dim": 16}),
    "qwen3 llama3": lambda: Qwen3Config(**SIZES, **HEADS, rope_scaling=LLAMA3),
    "qwen3 moe": lambda: Qwen3MoeConfig(**SIZES, **HEADS, **SOFTMAX, mlp_only_layers=[0]),
    "mimo": lambda: Qwen2Config(**SIZES, num_key_value_heads=2),
    "deepseek": lambda: DeepseekV3Config(**SIZES | EPSILON, **_groups(), **LATENT),
    # an epsilon so large that it would be noticed in the norms of the latents
    "deepseek epsilon": lambda: DeepseekV3Config(
        **SIZES | {"rms_norm_eps": 0.05}, **_groups(), **LATENT
    ),
    "deepseek kimi": lambda: DeepseekV3Config(
        **SIZES | EPSILON | dict(rope_theta=50000.0),
        **EXPERTS | dict(n_group=1, topk_group=1),
        **LATENT | dict(qk_rope_head_dim=16),
        rope_scaling=YARN | dict(beta_fast=1.0, beta_slow=1.0),
    ),
    "deepseek whole queries": lambda: DeepseekV3Config(
        **SIZES | EPSILON,
        **EXPERTS | dict(n_group=1, topk_group=1),
        **LATENT | {"q_lora_rank": None},
    ),
    "deepseek yarn": lambda: DeepseekV3Config(
        **SIZES | EPSILON | dict(rope_theta=10000.0),
        **_groups(),
        **LATENT | dict(qk_rope_head_dim=16),
        rope_scaling=YARN,
    ),
    "glm": lambda: Glm4MoeConfig(
        **SIZES, **HEADS, **EXPERTS, attention_bias=True, use_qk_norm=True
    ),
    "glm groups": lambda: Glm4MoeConfig(**SIZES, **HEADS, **_groups(), use_qk_norm=True),
    "glm air": lambda: Glm4MoeConfig(**SIZES, **HEADS, **EXPERTS, attention_bias=True),
    "glm flash": lambda: Glm4MoeLiteConfig(
        **SIZES | {"rms_norm_eps": 0.05}, **_flash_experts(), **LATENT
    ),
}
FAMILIES_WITH_MTP = {
    "mimo": (1, 2),
    "deepseek": (1, 2),
    "glm": (1, 2),
    "glm air": (1,),
    "glm flash": (1, 2),
}
