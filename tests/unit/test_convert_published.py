"""``config.json`` of published models: each is read, and an entry that nobody knows is refused."""

from __future__ import annotations

import re

import pytest

from megatron_occ.convert.families import family_of
from megatron_occ.convert.plan import model_config

LLAMA_31_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
LLAMA_32_1B = LLAMA_31_8B | {
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "rope_scaling": LLAMA_31_8B["rope_scaling"] | {"factor": 32.0},
    "tie_word_embeddings": True,
}
SMOLLM2 = {
    **{key: value for key, value in LLAMA_32_1B.items() if key != "rope_scaling"},
    "is_llama_config": True,
    "rope_interleaved": False,
    "rope_scaling": None,
    "transformers.js_config": {"dtype": "q4"},
}
R1_DISTILL_QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.44.0",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN3_8B = {
    **{key: value for key, value in R1_DISTILL_QWEN.items() if key != "use_mrope"},
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "model_type": "qwen3",
    "rope_scaling": None,
    "sliding_window": None,
}
QWEN3_30B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_CODER = QWEN3_30B | {
    "qkv_bias": False,
    "shared_expert_intermediate_size": 0,
    "use_qk_norm": True,
}
GLM_47_FLASH = {
    "architectures": ["Glm4MoeLiteForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "dtype": "bfloat16",
    "eos_token_id": [154820, 154827, 154829],
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10240,
    "kv_lora_rank": 512,
    "max_position_embeddings": 202752,
    "model_type": "glm4_moe_lite",
    "moe_intermediate_size": 1536,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 20,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 47,
    "num_key_value_heads": 20,
    "num_nextn_predict_layers": 1,
    "pad_token_id": 154820,
    "partial_rotary_factor": 1.0,
    "q_lora_rank": 768,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.8,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "transformers_version": "5.0.0rc0",
    "v_head_dim": 256,
    "vocab_size": 154880,
}
KIMI_K2 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 131072,
    "model_type": "kimi_k2",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 384,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 163840,
}
LING_MINI = {
    "architectures": ["BailingMoeV2ForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_bailing_moe_v2.BailingMoeV2Config"},
    "embedding_dropout": 0.0,
    "eos_token_id": 156892,
    "first_k_dense_replace": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5120,
    "max_position_embeddings": 32768,
    "max_window_layers": 20,
    "model_type": "bailing_moe",
    "moe_intermediate_size": 512,
    "moe_router_enable_expert_bias": True,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_shared_expert_intermediate_size": 512,
    "mtp_loss_scaling_factor": 0,
    "n_group": 8,
    "norm_head": False,
    "norm_softmax": False,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 20,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 0,
    "num_shared_experts": 1,
    "output_dropout": 0.0,
    "output_router_logits": False,
    "pad_token_id": 156892,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 600000,
    "rotary_dim": 64,
    "routed_scaling_factor": 2.5,
    "router_dtype": "fp32",
    "score_function": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "torch_dtype": "bfloat16",
    "use_bias": False,
    "use_cache": True,
    "use_qk_norm": True,
    "use_qkv_bias": False,
    "use_rmsnorm": True,
    "vocab_size": 157184,
}
PUBLISHED = {
    "Llama 3.1": LLAMA_31_8B,
    "Llama 3.2": LLAMA_32_1B,
    "SmolLM2": SMOLLM2,
    "R1-Distill-Qwen": R1_DISTILL_QWEN,
    "Qwen3": QWEN3_8B,
    "Qwen3-30B-A3B": QWEN3_30B,
    "Qwen3-Coder": QWEN3_CODER,
    "GLM-4.7-Flash": GLM_47_FLASH,
    "Kimi K2": KIMI_K2,
    "Ling-mini-2.0": LING_MINI,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_is_read_and_described_alike(name):
    content = PUBLISHED[name]
    family = family_of(content)
    model = model_config(family.read(content)).model
    again = family.describe(model) | {"vocab_size": model.vocab_size}
    assert model_config(family.read(again)).model == model


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_entry_that_nobody_looks_at_is_refused_by_name(name):
    content = PUBLISHED[name] | {"logit_softcap": 30.0}
    with pytest.raises(ValueError, match=r"logit_softcap=30\.0: not known for this architecture"):
        family_of(content).read(content)
    content["logit_softcap"] = None
    family_of(content).read(content)


def read(content):
    return model_config(family_of(content).read(content)).model


def test_numbers_of_the_rotary_embeddings():
    scaling = read(LLAMA_32_1B).rotary_scaling
    assert (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor) == (32.0, 1.0, 4.0)
    assert scaling.original_max_position_embeddings == 8192
    yarn = read(KIMI_K2).mla.yarn
    assert (yarn.factor, yarn.beta_fast, yarn.beta_slow, yarn.mscale) == (32.0, 1.0, 1.0, 1.0)


def test_the_latents_of_glm_have_an_epsilon_of_their_own():
    model = read(GLM_47_FLASH)
    assert (model.norm_epsilon, model.mla.norm_epsilon) == (1e-5, 1e-6)
    assert read(KIMI_K2).mla.norm_epsilon is None


def test_experts_of_qwen3():
    moe = read(QWEN3_30B | {"mlp_only_layers": [1, 0]}).moe
    assert (moe.num_experts, moe.top_k, moe.first_dense_layers) == (128, 8, 2)
    assert (moe.score_function, moe.expert_bias) == ("softmax", False)
    # as transformers writes it
    content = {key: value for key, value in QWEN3_30B.items() if key != "num_experts"}
    assert read(content | {"num_local_experts": 64}).moe.num_experts == 64


def test_what_stands_beside_the_scaling_comes_first():
    nested = {"rope_type": "default", "rope_theta": 7000.0}
    assert read(SMOLLM2 | {"rope_scaling": nested}).rotary_base == 7000
    assert read(SMOLLM2 | {"rope_parameters": nested}).rotary_base == 7000
    old = {**LLAMA_31_8B["rope_scaling"], "type": "llama3"}
    del old["rope_type"]
    content = LLAMA_31_8B | {"rope_scaling": None, "rope_parameters": old}
    assert read(content).rotary_scaling == read(LLAMA_31_8B).rotary_scaling


LLAMA3, YARN = LLAMA_31_8B["rope_scaling"], KIMI_K2["rope_scaling"]
MISREAD = [
    (SMOLLM2, {"rope_parameters": {"type": "yarn", "factor": 4.0}}, "has the type 'yarn'"),
    (SMOLLM2, {"rope_parameters": {"type": "linear", "factor": 4.0}}, "has the type 'linear'"),
    (SMOLLM2, {"rope_parameters": {"type": "llama3", "factor": 4.0}}, "lacks low_freq_factor"),
    (SMOLLM2, {"rope_parameters": {"rope_theta": 1e4, "factor": 4.0}}, "type 'not given'"),
    (SMOLLM2, {"rope_scaling": LLAMA3 | {"type": "yarn"}}, "rope_type='llama3' and type='yarn'"),
    (SMOLLM2, {"rope_scaling": LLAMA3, "rope_parameters": YARN}, "they say different things"),
    (SMOLLM2, {"rope_scaling": LLAMA3 | {"attention_factor": 2.0}}, "has attention_factor=2.0"),
    (SMOLLM2, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
    (SMOLLM2, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    (SMOLLM2, {"sliding_window": 4096}, "sliding_window=4096: not known"),
    (SMOLLM2, {"rope_interleaved": True}, "rope_interleaved=True: only False"),
    (QWEN3_8B, {"use_sliding_window": True}, "use_sliding_window=True: only False"),
    (QWEN3_8B, {"layer_types": ["sliding_attention"]}, "only 'full_attention'"),
    (QWEN3_8B, {"head_dim": None}, "head_dim is missing"),
    (QWEN3_30B, {"norm_topk_prob": False}, "norm_topk_prob=False: the weights"),
    (QWEN3_30B, {"norm_topk_prob": None}, "norm_topk_prob=None: the weights"),
    (QWEN3_30B, {"decoder_sparse_step": 2}, "decoder_sparse_step=2: only 1"),
    (QWEN3_30B, {"mlp_only_layers": [3]}, "mlp_only_layers=[3]: layers without experts"),
    (GLM_47_FLASH, {"num_experts_per_tok": 1}, "num_experts_per_tok=1: the weight of a single"),
    (GLM_47_FLASH, {"first_k_dense_replace": 2}, "first_k_dense_replace=2: only 1"),
    (GLM_47_FLASH, {"mlp_layer_types": ["sparse", "dense"]}, "only 'dense' first"),
    (GLM_47_FLASH, {"head_dim": 128}, "head_dim=128: only 64"),
    (GLM_47_FLASH, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    (KIMI_K2, {"rope_scaling": YARN | {"mscale": 0, "mscale_all_dim": 0}}, "only equal ones above"),
    (KIMI_K2, {"rope_scaling": YARN | {"mscale": None}}, "mscale=None and mscale_all_dim=1.0"),
    (KIMI_K2, {"rope_scaling": YARN | {"low_freq_factor": 2}}, "has low_freq_factor=2"),
    (LING_MINI, {"moe_router_topk_scaling_factor": 1.0}, "_scaling_factor=1.0: only 2.5"),
    (LING_MINI, {"norm_softmax": True}, "norm_softmax=True: only False"),
]


@pytest.mark.parametrize(("content", "changes", "message"), MISREAD)
def test_what_transformers_reads_and_we_can_not_have_is_refused(content, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read(content | changes)
