"""Settings from ``config.json`` as the published checkpoints have it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_occ.config import flat_values, load_config
from megatron_occ.convert.errors import FolderError
from megatron_occ.convert.families import FAMILIES, REFUSED, family_of
from megatron_occ.convert.plan import model_config
from megatron_occ.convert.settings import LEARNING_RATES, choice_for, folder_settings

CONF = Path(__file__).parents[2] / "conf" / "model"
MIMO_7B = {
    "architectures": ["MiMoForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 32768,
    "max_window_layers": 36,
    "model_type": "mimo",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 640000,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151680,
}
GLM_45_AIR = {
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": [151329, 151336, 151338],
    "first_k_dense_replace": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "max_position_embeddings": 131072,
    "model_type": "glm4_moe",
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 46,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "use_qk_norm": False,
    "vocab_size": 151552,
}
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def folder_of(tmp_path, content):
    (tmp_path / "config.json").write_text(json.dumps(content))
    return tmp_path


@pytest.mark.parametrize(
    ("content", "name"), [(MIMO_7B, "mimo_7b"), (GLM_45_AIR, "glm45_air")], ids=["mimo", "glm"]
)
def test_a_folder_gives_the_model_that_ships_as_yaml(tmp_path, content, name):
    shipped = load_config([CONF / f"{name}.yaml"])
    folder = folder_settings(folder_of(tmp_path, content))
    found = load_config([], [f"model.from_hf={tmp_path}"], folder=folder)
    found.model.from_hf = None
    assert flat_values(found) == flat_values(shipped) | LEARNING_RATES
    given = load_config([], [f"model.from_hf={tmp_path}", "rl.optimizer.lr=3e-6"], folder=folder)
    assert given.rl.optimizer.lr == 3e-6


def test_deepseek_v3(tmp_path):
    values = folder_settings(folder_of(tmp_path, DEEPSEEK_V3))
    expected = {
        "model.mla.q_lora_rank": 1536,
        "model.mla.yarn.factor": 40.0,
        "model.mla.yarn.mscale": 1.0,
        "model.moe.num_experts": 256,
        "model.moe.groups": 8,
        "model.moe.top_groups": 4,
        "model.moe.first_dense_layers": 3,
        "model.moe.shared_ffn_hidden_size": 2048,
        "model.moe.scaling_factor": 2.5,
        "model.moe.expert_bias": True,
        "model.vocab_size": 129280,
        "mtp.num_layers": 1,
    }
    assert {key: values[key] for key in expected} == expected
    assert "tokenizer.kind" not in values


@pytest.mark.parametrize(
    "content", [MIMO_7B, GLM_45_AIR, DEEPSEEK_V3], ids=lambda c: c["model_type"]
)
def test_what_is_described_reads_the_same(content):
    family = family_of(content)
    model = model_config(family.read(content)).model
    again = family.describe(model) | {"vocab_size": model.vocab_size}
    assert model_config(family.read(again)).model == model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"routed_scaling_factor": None}, "routed_scaling_factor is missing"),
        ({"first_k_dense_replace": None}, "first_k_dense_replace is missing"),
        ({"n_group": None}, "n_group is missing"),
        ({"topk_group": 2}, "topk_group=2 with num_experts_per_tok=8: a group's score is"),
        ({"topk_group": 1}, "topk_group=1 with num_experts_per_tok=8: a group's score is"),
        ({"rope_scaling": {"factor": 8.0}}, "rope_scaling has the type 'not given'"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax': only 'sigmoid'"),
        ({"norm_topk_prob": False}, "norm_topk_prob=False: only True"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2: only 1"),
        ({"rope_interleave": False}, "rope_interleave=False: only True"),
        ({"rope_theta": 0.5}, "rope_theta=0.5: is no whole number"),
    ],
)
def test_what_would_change_the_numbers_is_refused(changes, message):
    content = DEEPSEEK_V3 | changes
    with pytest.raises(ValueError, match=re.escape(message)):
        family_of(content).read(content)


def test_entries_of_null_are_as_if_they_were_not_there():
    content = GLM_45_AIR | {"partial_rotary_factor": None}
    assert family_of(content).read(content)["rotary_percent"] == 0.5
    content = MIMO_7B | {"partial_rotary_factor": None, "head_dim": None}
    assert family_of(content).read(content)["rotary_percent"] == 1.0


@pytest.mark.parametrize("depths", range(4))
def test_the_depths_that_are_asked_for(tmp_path, depths):
    one, none = tmp_path / "one", tmp_path / "none"
    for folder, there in ((one, 1), (none, 0)):
        folder.mkdir()
        folder_of(folder, MIMO_7B | {"num_nextn_predict_layers": there})
    kinds = ["drop", "keep", "expand", "expand"], ["keep", "init", "init", "init"]
    assert choice_for(one, depths).kind == kinds[0][depths]
    assert choice_for(none, depths).kind == kinds[1][depths]
    folder_of(one, MIMO_7B | {"num_nextn_predict_layers": 3})
    if depths in (1, 2):
        with pytest.raises(FolderError, match=f"mtp.num_layers={depths}: .* has 3 MTP layers"):
            choice_for(one, depths)


@pytest.mark.parametrize("beginning", REFUSED)
def test_a_family_that_does_not_fit_is_refused_with_the_reason(beginning):
    name = f"{beginning}ForCausalLM"
    with pytest.raises(ValueError, match=f"{name} can't be converted: ") as caught:
        family_of({"architectures": [name]})
    assert REFUSED[beginning] in str(caught.value)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_table_names_each_parameter_and_each_tensor_once(name):
    family = FAMILIES[name]
    for rules in (family.top, family.layer, family.mtp):
        ours = [rule.ours for rule in rules]
        assert len(set(ours)) == len(ours)
    dense = [n for rule in family.layer for n in rule.names if "experts" not in n]
    repeated = {n for n in dense if dense.count(n) > 1}
    # the norm before the MLP is a dense layer's or a layer's with experts
    assert repeated <= {"post_attention_layernorm.weight"}
