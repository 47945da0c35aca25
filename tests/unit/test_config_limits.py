"""Absurd numbers: each key has an upper limit, and so have products of two."""

from __future__ import annotations

import json
import math

import pytest

from megatron_occ.config import ConfigError, derive, limits, load_config, validate
from megatron_occ.config.keys import leaves
from megatron_occ.config.pipeline import parse_layout
from megatron_occ.config.warnings import rl_warnings

NUMBERS = [leaf for leaf in leaves().values() if (leaf.item or leaf.kind) in (int, float)]
BY_KEY = pytest.mark.parametrize("leaf", NUMBERS, ids=lambda leaf: leaf.key)
# what a key needs beside it to act at all
NEEDS = {"model.moe": ["model.moe.num_experts=8"], "model.mla": ["model.mla.enabled=true"]}


def override(leaf, number):
    return f"{leaf.key}={json.dumps([number] if leaf.kind is list else number)}"


def largest(leaf):
    if "max" in leaf.limits:
        return leaf.limits["max"]
    return math.nextafter(leaf.limits["below"], 0)


def problems(*overrides, command="rl", world_size=1):
    try:
        validate(load_config([], list(overrides)), command=command, world_size=world_size)
    except ConfigError as error:
        return error.problems
    return []


@BY_KEY
def test_a_number_of_no_use_is_refused_with_the_range(leaf):
    numbers = [10**20, -(10**20), 1e300, 10**4000]
    if (leaf.item or leaf.kind) is int:
        numbers.append(largest(leaf) + 1)
    for number in numbers:
        with pytest.raises(ConfigError) as error:
            load_config([], [override(leaf, number)])
        (message,) = error.value.problems
        assert f": {leaf.key} = " in message and f"must be {leaf.allowed()}" in message
    beyond = math.nextafter(largest(leaf), math.inf) if leaf.kind is float else largest(leaf) + 1
    with pytest.raises(ConfigError, match="must be"):
        load_config([], [override(leaf, beyond)])


@BY_KEY
def test_the_largest_number_is_taken_or_refused_in_words(leaf):
    beside = [
        word for prefix, words in NEEDS.items() if leaf.key.startswith(prefix) for word in words
    ]
    given = [word for word in beside if not word.startswith(f"{leaf.key}=")]
    given.append(override(leaf, largest(leaf)))
    for command in ("pretrain", "rl", "eval", "audit"):
        found = problems(*given, command=command)
        assert all(len(problem) < 400 for problem in found)
        if not found:
            assert derive(load_config([], given)).rl_updates < 2**63


def test_an_hour_of_slips():
    for slip, told in {
        "rl.optimizer.lr=1000": "must be a number > 0 and <= 1",
        "rl.steps=100000000000000000000": "must be an integer >= 1 and <= 1,000,000,000",
        "model.num_layers=100000": "must be an integer >= 1 and <= 1,000",
        "model.hidden_size=1000000000": "must be an integer >= 1 and <= 1,000,000",
        "model.max_position_embeddings=1000000000000": "<= 100,000,000",
        "rl.rollout.stop_ids=[-1]": "must be a list of integers >= 0 and <= 10,000,000",
        "mtp.trunk.clamp=[1e7, null]": ">= -1,000,000 and <= 1,000,000 or null",
    }.items():
        with pytest.raises(ConfigError) as error:
            load_config([], [slip])
        assert told in str(error.value)


def test_a_high_learning_rate_is_warned_about():
    def warnings(rate):
        return rl_warnings(load_config([], [f"rl.optimizer.lr={rate}"]))

    (told,) = warnings(0.05)
    assert told.startswith("rl.optimizer.lr=0.05: Adam moves every weight by about this much")
    assert warnings(0.049) == []
    assert len(warnings(1)) == 1


def test_timers_of_the_system_can_hold_the_longest_time():
    # milliseconds in a signed 32-bit integer, as poll(2) takes them
    assert limits.SECONDS * 1000 < 2**31


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            ["rl.prompts_per_step=1001", "rl.samples_per_prompt=1000"],
            "rl.prompts_per_step=1001: makes 1,001,000 responses a step with "
            "rl.samples_per_prompt=1000, and at most 1,000,000 are held at once",
        ),
        (
            ["model.kv_channels=250002", "model.num_attention_heads=4"],
            "model.kv_channels=250002: makes attention 1,000,008 wide with "
            "model.num_attention_heads=4",
        ),
        (
            ["model.mla.enabled=true", "model.mla.v_head_dim=250002"],
            "model.mla.v_head_dim=250002: makes attention 1,000,008 wide",
        ),
        (
            ["model.moe.num_experts=10000", "model.num_layers=4", "mtp.num_layers=1"],
            "model.moe.num_experts=10000: makes about 50,000 experts on a rank, with those of all "
            "its layers, and a rank holds at most 30,000",
        ),
    ],
)
def test_products_that_no_machine_holds_are_refused(given, told):
    assert any(told in problem for problem in problems(*given))


def test_products_at_the_limit_are_taken():
    at = ["rl.prompts_per_step=1000", "rl.samples_per_prompt=1000", "model.kv_channels=250000"]
    at.append("rl.micro_batch_size=1")
    assert problems(*at) == []
    experts = ["model.moe.num_experts=10000", "model.num_layers=2", "mtp.num_layers=1"]
    assert problems(*experts) == []


def test_a_temperature_between_greedy_and_cold_is_refused():
    for key in ("rl.validation.temperature", "eval.temperature"):
        (told,) = problems(f"{key}=1e-4", *(["eval.after_rl=true"] if key[0] == "e" else []))
        assert told.startswith(f"{key}=0.0001: logits divided by it overflow. Give 0, which is")
        assert problems(f"{key}=0", *(["eval.after_rl=true"] if key[0] == "e" else [])) == []
    with pytest.raises(ConfigError, match=r"must be a number >= 0\.001 and <= 1,000,000"):
        load_config([], ["rl.rollout.temperature=1e-4"])


def test_ranks_that_no_cluster_has_are_refused():
    ranks = 2**19
    batches = [f"rl.prompts_per_step={ranks}", f"pretrain.batch_size={ranks}"]
    (told,) = problems(*batches, "rl.samples_per_prompt=1", command="eval", world_size=ranks)
    assert told == "524288 ranks: at most 262,144 are counted with. Give fewer"


@pytest.mark.parametrize(
    "layout", ["Et*10000000000|L", "(t*999)*9999|L", f"Et*{'9' * 5000}|L", "Et*10001|L"]
)
def test_a_layout_that_repeats_for_ever_is_refused(layout):
    with pytest.raises(ValueError, match="repeats more than the 1,000 layers"):
        parse_layout(layout)
    assert len(parse_layout("Et*999|tmL")[0]) == 1000
