"""A policy that is no longer used leaves the memory, with its gradients and process groups.

Pretraining and RL are one process: RL would pay for both models.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from pathlib import Path

import pytest

from megatron_occ.config import Config, load_config
from megatron_occ.mcore.startup import initialize, shutdown
from tests.mcore.test_training import actor_and_updater, mini_batch, rl_config

EXPERTS = "model.moe={num_experts: 4, top_k: 2, ffn_hidden_size: 16, first_dense_layers: 1}"


def gloo_loops():
    """Threads of this process that poll for messages, a hundred times a second each."""
    found = 0
    for task in Path("/proc/self/task").glob("*"):
        with contextlib.suppress(OSError):  # it has ended
            found += (task / "comm").read_text().strip() == "gloo_tcp_loop"
    return found


def a_policy_after_an_update(chosen):
    config = rl_config("ce", 2)
    config.model.moe, config.recompute = chosen.model.moe, chosen.recompute
    layout = initialize(config)
    actor, updater = actor_and_updater(layout, config)
    updater.run_update(mini_batch(updater))
    return weakref.ref(actor.chunks[0])


@pytest.mark.parametrize("overrides", [(), (EXPERTS,), (EXPERTS, "recompute=full")])
def test_a_model_goes_when_its_actor_goes(overrides):
    # Megatron keeps one group for good: not counted
    initialize(Config())
    shutdown()
    gc.collect()
    before = gloo_loops()
    try:
        model = a_policy_after_an_update(load_config([], list(overrides)))
        gc.collect()
        assert model() is None
    finally:
        shutdown()
    gc.collect()
    assert gloo_loops() <= before
