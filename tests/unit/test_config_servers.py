"""Rollouts by servers: what is refused before a server is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_occ.config import ConfigError, check_resumed, load_config, validate

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


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("model.moe.num_experts=4",), "MiMoForCausalLM, which has no experts. Give"),
        (("model.mla.enabled=true", "model.num_query_groups=null"), "no latent attention"),
        (("model.qk_layernorm=true",), "no norm of queries and keys"),
        (("model.rotary_percent=0.5",), "no part of a head left unturned"),
        (("mtp.num_layers=2",), "no second MTP layer. Give mtp.num_layers=1 or 0, or"),
        (("model.kv_channels=6",), "no heads of another width"),
        (
            ("mtp.num_layers=0", "mtp.preset=none", "model.kv_channels=6", "model.qkv_bias=true"),
            "Qwen2ForCausalLM, which has no heads of another width",
        ),
    ],
)
def test_what_servers_have_no_place_for_is_refused_with_the_reason(given, said):
    (message,) = problems(URL, *given)
    key = given[0] if "num_layers=0" not in given[0] else given[2]
    assert message.startswith(key.partition("=")[0] + "=") and said in message
    assert message.endswith("or rl.rollout.engine=megatron")


def test_llama_has_heads_of_any_width():
    none = ("mtp.num_layers=0", "mtp.preset=none")
    assert problems(URL, *none, "model.kv_channels=6") == []


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
