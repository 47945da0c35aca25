"""Process groups of a run."""

from __future__ import annotations

import inspect
import logging
import os

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import random as megatron_random

from megatron_occ.config.schema import Config
from megatron_occ.mcore.layout import PATIENCE
from megatron_occ.mcore.startup import _is_unexpected, initialize, shutdown
from tests.mcore.distributed import free_port

GROUPS = {
    "all": lambda: torch.distributed.group.WORLD,
    "data": parallel_state.get_data_parallel_group,
    "tensor": parallel_state.get_tensor_model_parallel_group,
    "pipeline": parallel_state.get_pipeline_model_parallel_group,
    "context": parallel_state.get_context_parallel_group,
    "experts": parallel_state.get_expert_tensor_and_model_parallel_group,
}


@pytest.mark.parametrize("launched", [False, True])
def test_ranks_wait_for_each_other_for_hours(monkeypatch, launched):
    """One may have its responses, or their scores, long before another."""
    if launched:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        for name, value in {"MASTER_PORT": free_port(), "RANK": 0, "WORLD_SIZE": 1}.items():
            monkeypatch.setenv(name, str(value))
    initialize(Config())
    try:
        for name, group in GROUPS.items():
            assert group()._get_backend(torch.device("cpu")).options._timeout == PATIENCE, name
    finally:
        shutdown()


def test_products_of_fp32_are_fp32_unless_the_environment_says_otherwise(monkeypatch):
    """TransformerEngine's are of TF32 otherwise."""
    for given, expected in ((None, "0"), ("1", "1")):
        monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
        if given is not None:
            monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", given)
        initialize(Config())
        shutdown()
        assert os.environ["NVIDIA_TF32_OVERRIDE"] == expected


def test_stages_of_a_pipeline_draw_weights_of_their_own(monkeypatch):
    seeds = []
    for stage in (0, 1, 2):
        monkeypatch.setattr(
            parallel_state, "get_pipeline_model_parallel_rank", lambda stage=stage: stage
        )
        initialize(Config())
        seeds.append(torch.initial_seed())
        shutdown()
    assert seeds[0] == Config().seed
    assert len(set(seeds)) == 3


def test_what_megatron_says_of_weights_drawn_on_the_host_is_not_logged(caplog):
    """In its words, which a new version may change; and nothing else is kept back."""
    expected = "CPU RNG state changed within GPU RNG context"
    assert expected in inspect.getsource(megatron_random)
    log = logging.getLogger("a logger of this test")
    log.addFilter(_is_unexpected)
    with caplog.at_level("WARNING"):
        log.warning(expected)
        log.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]
