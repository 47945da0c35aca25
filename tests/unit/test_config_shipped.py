"""The shipped cluster configurations fit their layout, and ask for what is the user's."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_occ.config import Config, derive, load_config, validate

CONF = Path(__file__).parents[2] / "conf" / "rl"
RUNS = {
    "dapo_mimo_7b": 128,
    "gspo_mimo_7b": 128,
    "dapo_glm45_air": 128,
    "dapo_glm45_air_512": 512,
}


def load(name: str, *overrides: str) -> Config:
    return load_config([CONF / f"{name}.yaml"], list(overrides))


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("preset", ["detach", "ce", "policy", "occ", "occ_decoupled", "none"])
def test_every_regime_is_accepted_at_the_size_of_the_layout(name, preset):
    config = load(name, f"mtp.preset={preset}")
    validate(config, command="rl", world_size=RUNS[name])
    validate(config, command="eval", world_size=RUNS[name])
    parallel = config.parallel
    assert (parallel.tensor, parallel.context) == (2, 2)
    assert parallel.pipeline == (4 if RUNS[name] == 512 else 2)
    assert derive(config, RUNS[name]).data_parallel == RUNS[name] // (4 * parallel.pipeline)


@pytest.mark.parametrize("name", RUNS)
def test_what_is_the_users_names_its_own_key(name):
    config = load(name)
    given = {
        "rl.init_from": config.rl.init_from,
        "tokenizer.path": config.tokenizer.path,
        "data.prompts": config.data.prompts,
        "data.validation_prompts": config.data.validation_prompts,
    }
    assert given == {key: f"GIVE/{key}" for key in given}


def test_sizes_of_the_models():
    """As the public configurations have them (see the model cards)."""
    mimo, glm = load("dapo_mimo_7b").model, load("dapo_glm45_air").model
    shape = lambda model: (  # noqa: E731
        model.num_layers,
        model.hidden_size,
        model.ffn_hidden_size,
        model.num_attention_heads,
        model.num_query_groups,
        model.kv_channels,
        model.rotary_base,
        model.rotary_percent,
        model.vocab_size,
    )
    assert shape(mimo) == (36, 4096, 11008, 32, 8, 128, 640000, 1.0, 151680)
    assert shape(glm) == (46, 4096, 10944, 96, 8, 128, 1000000, 0.5, 151552)
    assert mimo.qkv_bias and glm.qkv_bias and not (mimo.tie_embeddings or glm.tie_embeddings)
    moe = glm.moe
    assert (moe.num_experts, moe.top_k, moe.ffn_hidden_size) == (128, 8, 1408)
    assert (moe.shared_ffn_hidden_size, moe.first_dense_layers) == (1408, 1)
    assert (moe.score_function, moe.expert_bias, moe.scaling_factor) == ("sigmoid", True, 1.0)
