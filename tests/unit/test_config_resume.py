"""What a resumed run may change."""

from __future__ import annotations

import pytest

from megatron_occ.config import ConfigError, check_resumed, load_config


@pytest.mark.parametrize(
    "override",
    [
        "rl.steps=7",
        "rl.validation.every=3",
        "pretrain.micro_batch_size=1",
        "rl.micro_batch_tokens=64",
        "parallel.tensor=2",
        "parallel.pipeline_layout=Et|tL",
        "recompute=full",
    ],
)
def test_length_and_speed_may_change_and_are_told(override):
    (change,) = check_resumed(load_config([], []), load_config([], [override]))
    key, value = override.split("=")
    assert change.startswith(f"{key} was ")
    assert change.replace("'", "").endswith(f"is {value}")


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "precision=bf16",
        "fp8.format=e4m3",
        "model.hidden_size=64",
        "model.moe.num_experts=4",
        "rl.optimizer.lr=1.0",
        "rl.mini_batches=2",
        "mtp.preset=ce",
    ],
)
def test_what_a_step_computes_may_not_change(override):
    with pytest.raises(ConfigError, match=rf"--resume .*{override.split('=')[0]}"):
        check_resumed(load_config([], []), load_config([], [override]))


def test_an_equal_configuration_has_nothing_to_tell():
    assert check_resumed(load_config([], ["seed=3"]), load_config([], ["seed=3"])) == []


def test_the_length_of_a_decaying_schedule_may_not_change():
    decaying = ["rl.optimizer.schedule=cosine"]
    with pytest.raises(ConfigError, match=r"rl\.steps was 100, is 200"):
        check_resumed(load_config([], decaying), load_config([], [*decaying, "rl.steps=200"]))


def test_the_length_of_pretraining_may_not_change_once_rl_has_begun():
    saved, now = load_config([], []), load_config([], ["pretrain.steps=900"])
    assert check_resumed(saved, now) == ["pretrain.steps was 750, is 900"]
    with pytest.raises(ConfigError, match=r"pretraining is over.*rl\.init_from"):
        check_resumed(saved, now, done={"rl": 1})
    assert check_resumed(saved, load_config([], ["rl.steps=900"]), done={"rl": 1})


def test_micro_batches_stay_where_lambda_is_taken_from_each():
    released = ["mtp.trunk.estimator=released"]
    with pytest.raises(ConfigError, match=r"rl\.micro_batch_size was .*estimator=released"):
        check_resumed(
            load_config([], released), load_config([], [*released, "rl.micro_batch_size=1"])
        )
    with pytest.raises(ConfigError, match=r"rl\.micro_batch_tokens was .*estimator=released"):
        check_resumed(
            load_config([], released), load_config([], [*released, "rl.micro_batch_tokens=64"])
        )
    assert check_resumed(
        load_config([], released), load_config([], [*released, "pretrain.micro_batch_size=1"])
    )


def test_a_run_does_not_end_before_where_it_is():
    saved, now = load_config([], ["rl.steps=400"]), load_config([], ["rl.steps=40"])
    assert check_resumed(saved, now, done={"pretrain": 50, "rl": 40}) == ["rl.steps was 400, is 40"]
    with pytest.raises(ConfigError, match=r"rl\.steps was 400, is 40 \(42 steps done\)"):
        check_resumed(saved, now, done={"pretrain": 0, "rl": 42})
