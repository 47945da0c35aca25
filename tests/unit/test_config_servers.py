"""Rollouts by servers: what is refused before a server is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_occ.config import ConfigError, check_resumed, load_config, validate
from megatron_occ.config.served import architecture, served_depths, served_warnings
from megatron_occ.config.warnings import rl_warnings

TINY = Path(__file__).parents[2] / "conf" / "rl" / "tiny.yaml"
SERVED = [
    "rl.rollout.engine=vllm",
    "rl.rollout.batch_size=512",
    "rl.rollout.speculative={mode: auto, draft_length: 3}",
]
URL = "rl.rollout.server.urls=['http://a:1']"


def problems(*overrides, command="rl"):
    config = load_config([TINY], [*SERVED, *overrides])
    try:
        validate(config, command=command)
    except ConfigError as error:
        return error.problems
    return []


@pytest.mark.parametrize("command", ["rl", "demo", "eval"])
def test_a_server_without_a_url_is_refused_where_something_is_sampled(command):
    (message,) = problems(command=command)
    assert message == (
        "rl.rollout.server.urls=[]: rl.rollout.engine=vllm has no server to ask. Give "
        "rl.rollout.server.urls=['http://host:port'], or rl.rollout.engine=megatron"
    )
    assert problems(URL, command=command) == problems(command="pretrain") == []


@pytest.mark.parametrize(
    ("urls", "said"),
    [
        ("['http://a:1','http://b:1','http://a:1']", "http://a:1 is there twice"),
        ("['a:8000']", "'a:8000' is no base URL. Write http://host:port"),
        ("['http://me:word@a:1']", "is no base URL"),
    ],
)
def test_urls_that_could_not_be_used_are_refused(urls, said):
    (message,) = problems(f"rl.rollout.server.urls={urls}")
    assert message.startswith("rl.rollout.server.urls=[") and said in message


NO_HEAD = ("mtp.num_layers=0", "mtp.preset=none")
SIGMOID = ("model.moe.num_experts=4", "model.moe.score_function=sigmoid")
EXPERTS = (*SIGMOID, "model.moe.expert_bias=true")
LATENT = (
    "model.mla.enabled=true",
    "model.num_query_groups=null",
    "model.qk_layernorm=true",
    "model.norm_epsilon=1e-6",
)
DEEPSEEK = (*EXPERTS, *LATENT)
QWEN3_MOE = ("model.moe.num_experts=4", "model.qk_layernorm=true")
SERVABLE = {
    "llama": (NO_HEAD, "LlamaForCausalLM", 0),
    "llama, wide heads": ((*NO_HEAD, "model.kv_channels=6"), "LlamaForCausalLM", 0),
    "llama, wide heads and a head": (("model.kv_channels=6",), "LlamaForCausalLM", 0),
    "qwen2": ((*NO_HEAD, "model.qkv_bias=true"), "Qwen2ForCausalLM", 0),
    "mimo": ((), "MiMoForCausalLM", 1),
    "mimo, two depths": (("mtp.num_layers=2",), "MiMoForCausalLM", 1),
    "qwen3": (("model.qk_layernorm=true",), "Qwen3ForCausalLM", 0),
    "qwen3 moe": (QWEN3_MOE, "Qwen3MoeForCausalLM", 0),
    "glm": ((*EXPERTS, "model.rotary_percent=0.5"), "Glm4MoeForCausalLM", 1),
    "glm, two depths": ((*EXPERTS, "mtp.num_layers=2"), "Glm4MoeForCausalLM", 1),
    "deepseek": (DEEPSEEK, "DeepseekV3ForCausalLM", 1),
    "kimi": ((*DEEPSEEK, *NO_HEAD), "DeepseekV3ForCausalLM", 0),
}


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("name", SERVABLE)
def test_families_that_servers_have(name, engine):
    given, expected, depths = SERVABLE[name]
    overrides = (URL, *given, f"rl.rollout.engine={engine}")
    assert problems(*overrides) == []
    config = load_config([TINY], [*SERVED, *overrides])
    assert (architecture(config), served_depths(config)) == (expected, depths)
    told = [line for line in rl_warnings(config) if line.startswith("mtp.num_layers=")]
    assert len(told) == (depths != config.mtp.num_layers)
    embedded = load_config([TINY], [*given])
    assert not [line for line in rl_warnings(embedded) if "mtp.num_layers=" in line]


def test_what_becomes_of_a_head_that_servers_do_not_get():
    (told,) = served_warnings(load_config([TINY], [*SERVED, "model.qk_layernorm=true"]))
    assert told == (
        "mtp.num_layers=1: rl.rollout.engine=vllm gets the weights as Qwen3ForCausalLM, which has "
        "no MTP layers: servers sample from the trunk without drafts of the head, which is trained "
        "all the same. Start them without speculative decoding"
    )
    (told,) = served_warnings(load_config([TINY], [*SERVED, "mtp.num_layers=3"]))
    assert told.startswith("mtp.num_layers=3: rl.rollout.engine=vllm gets the first depth alone")


@pytest.mark.parametrize(
    ("key", "value", "others", "said"),
    [
        ("model.rotary_percent", "0.5", (), "MiMoForCausalLM, which has no part of a head"),
        ("model.rotary_percent", "0.5", QWEN3_MOE, "no part of a head left unturned"),
        ("model.kv_channels", "6", (*NO_HEAD, "model.qkv_bias=true"), "no heads of another width"),
        ("model.qkv_bias", "true", ("model.qk_layernorm=true",), "no bias of queries"),
        ("model.qkv_bias", "true", QWEN3_MOE, "no bias of queries"),
        ("model.qk_layernorm", "false", QWEN3_MOE[:1], "Give model.qk_layernorm=true, or"),
        ("model.moe.shared_ffn_hidden_size", "8", QWEN3_MOE, "no shared experts. Give model.moe."),
        ("model.moe.scaling_factor", "2.0", QWEN3_MOE, "no factor of experts' output"),
        ("model.moe.groups", "2", (*QWEN3_MOE, "model.moe.top_groups=1"), "no groups of experts"),
        ("model.moe.expert_bias", "false", SIGMOID, "Give model.moe.expert_bias=true, or"),
        ("model.moe.top_k", "1", EXPERTS, "the weight of a single expert is 1"),
        (
            "model.moe.shared_ffn_hidden_size",
            "5",
            EXPERTS,
            "Give model.moe.shared_ffn_hidden_size=",
        ),
        (
            "model.moe.top_k",
            "3",
            (*EXPERTS, "model.moe.groups=1", "model.moe.top_groups=1"),
            None,
        ),
        (
            "model.moe.top_k",
            "1",
            (*EXPERTS, "model.moe.groups=2", "model.moe.top_groups=1"),
            "the weight of a single expert is 1",
        ),
        (
            "model.moe.top_k",
            "4",
            (*EXPERTS, "model.moe.num_experts=8", "model.moe.groups=2", "model.moe.top_groups=1"),
            "their best two experts. Give model.moe.top_k=2, or",
        ),
        ("model.mtp_reads", "before", EXPERTS, "after the final norm. Give model.mtp_reads=after"),
        ("model.mtp_reads", "before", (*EXPERTS, *NO_HEAD), None),
        ("model.mla.enabled", "true", LATENT, "no latent attention without experts"),
        ("model.moe.score_function", "softmax", (*LATENT, EXPERTS[0]), "no softmax scores"),
        ("model.qk_layernorm", "false", DEEPSEEK, "whose latents have norms"),
        ("model.mla.norm_epsilon", "1e-5", DEEPSEEK, "Give model.mla.norm_epsilon=1e-06, or"),
        ("model.mla.norm_epsilon", "1e-6", (*DEEPSEEK, "model.norm_epsilon=1e-5"), None),
        ("model.mla.yarn.mscale", "0", (*DEEPSEEK, "model.mla.yarn.factor=2"), "no scaling"),
    ],
)
def test_what_servers_have_no_place_for_is_refused_with_the_reason(key, value, others, said):
    given = [other for other in others if not other.startswith(f"{key}=")]
    found = problems(URL, *given, f"{key}={value}")
    if said is None:
        assert found == []
        return
    (message,) = found
    assert message.startswith(f"{key}=") and said in message
    assert message.endswith("or rl.rollout.engine=megatron")


def test_a_resumed_run_may_go_on_with_other_servers_but_not_without():
    before = load_config([TINY], [*SERVED, URL])
    after = load_config([TINY], [*SERVED, "rl.rollout.server.urls=['http://b:1']"])
    (change,) = check_resumed(before, after)
    assert "http://a:1" in change and "http://b:1" in change
    with pytest.raises(ConfigError, match=r"rl\.rollout\.engine was 'vllm'"):
        check_resumed(before, load_config([TINY], []))


@pytest.mark.parametrize("way", ["memory", "network"])
def test_weights_out_of_memory_are_refused_where_nobody_fetches_them(way):
    transfer = f"rl.rollout.server.transfer={way}"
    assert problems(URL, transfer) == []
    (message,) = problems(URL, transfer, "rl.rollout.engine=sglang")
    assert message == (
        f"{transfer}: SGLang reads weights from folders alone. Give "
        "rl.rollout.server.transfer=folder, or rl.rollout.engine=vllm"
    )
