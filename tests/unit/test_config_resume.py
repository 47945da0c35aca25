"""What a resumed run may change."""

from __future__ import annotations

import pytest

from megatron_occ.config import ConfigError, check_resumed, load_config


@pytest.mark.parametrize(
    "override",
    ["rl.steps=7", "rl.validation.every=3", "pretrain.micro_batch_size=1", "parallel.tensor=2"],
)
def test_length_and_speed_may_change_and_are_told(override):
    (change,) = check_resumed(load_config([], []), load_config([], [override]))
    key, value = override.split("=")
    assert change.startswith(f"{key} was ")
    assert change.endswith(f"is {value}")


@pytest.mark.parametrize(
    "override",
    ["seed=1", "model.hidden_size=64", "rl.optimizer.lr=1.0", "rl.mini_batches=2", "mtp.preset=ce"],
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
