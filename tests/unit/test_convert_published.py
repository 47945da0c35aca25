"""``config.json`` of published models: each is read, and an entry that nobody knows is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from megatron_occ.config import load_config
from megatron_occ.config.validate_model import model_problems
from megatron_occ.convert.families import family_of
from megatron_occ.convert.plan import model_config
from megatron_occ.convert.settings import folder_settings
from megatron_occ.convert.transforms import head_sizes
from tests.unit.published_configs import (
    GLM_47_FLASH,
    KIMI_K2,
    LING_MINI,
    LLAMA_31_8B,
    LLAMA_32_1B,
    PUBLISHED,
    QWEN3_8B,
    QWEN3_30B,
    SMOLLM2,
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_is_read_and_described_alike(name):
    content = PUBLISHED[name]
    family = family_of(content)
    model = model_config(family.read(content)).model
    again = family.describe(model) | {"vocab_size": model.vocab_size}
    assert with_heads(model_config(family.read(again)).model) == with_heads(model)


def with_heads(model):
    """The width of a head written out, where the model leaves it to other settings."""
    if model.mla.enabled:
        return model
    return replace(model, kv_channels=head_sizes(model)[2])


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_entry_that_nobody_looks_at_is_refused_by_name(name):
    content = PUBLISHED[name] | {"logit_softcap": 30.0}
    with pytest.raises(ValueError, match=r"logit_softcap=30\.0: not known for this architecture"):
        family_of(content).read(content)
    content["logit_softcap"] = None
    family_of(content).read(content)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_run_takes_its_model_from_the_folder(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    folder = folder_settings(tmp_path)
    config = load_config([], [f"model.from_hf={tmp_path}"], folder=folder)
    assert replace(config.model, from_hf=None) == read(PUBLISHED[name])
    assert list(model_problems(config)) == []
    assert config.mtp.num_layers == PUBLISHED[name].get("num_nextn_predict_layers", 0)


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
    (QWEN3_30B, {"num_experts_per_tok": 1}, "num_experts_per_tok=1: the weight of a single"),
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
