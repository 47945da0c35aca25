"""One process, one Megatron: start-up for the tests that build models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_occ.config.schema import Config
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.checkpoint_folder import Keep
from megatron_occ.mcore.checkpoint_writer import CheckpointWriter
from megatron_occ.mcore.model import OCCGPTModel
from megatron_occ.mcore.provider import build_chunks
from megatron_occ.mcore.startup import Layout, initialize, shutdown
from megatron_occ.mcore.vocabulary import fused, logprobs

VOCABULARY = 23


@pytest.fixture
def layout():
    layout = initialize(Config())
    yield layout
    shutdown()


@pytest.fixture
def config() -> Config:
    return small_config()


@pytest.fixture(params=[False, True], ids=["operations", "kernels"])
def cut(request, monkeypatch):
    """Sets the size of tiles, worked on as a CPU does or as a GPU, but uncompiled."""
    monkeypatch.setattr(fused, "kernel", lambda function: function)
    monkeypatch.setattr(logprobs, "is_fused", lambda device: request.param)
    name = "FUSED_LOGITS" if request.param else "CHUNK_LOGITS"
    return lambda size: monkeypatch.setattr(logprobs, name, size)


def small_config(depths: int = 2) -> Config:
    config = Config()
    config.model.num_layers = 2
    config.model.hidden_size = 32
    config.model.ffn_hidden_size = 48
    config.model.num_attention_heads = 4
    config.model.num_query_groups = 2
    # large enough that attention, and so every position, matters
    config.model.init_std = 0.2
    config.mtp.num_layers = depths
    return config


def build_model(config: Config, vocab_size: int, device: torch.device) -> OCCGPTModel:
    """The only chunk of a model on one process."""
    (model,) = build_chunks(config, vocab_size, device)
    return model


def random_ids(rows: int = 4, length: int = 12, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (rows, length), generator=generator)


def positions(ids: torch.Tensor) -> torch.Tensor:
    return torch.arange(ids.size(1)).expand_as(ids)


def assert_same_up_to_rounding(found: torch.Tensor, expected: torch.Tensor, units: int = 8) -> None:
    """float32 sums in another order: equal to ``units`` machine epsilons of the largest value.

    Which order it is depends on the CPU: the matrix library has code for each kind. A sum rounds in
    proportion to its terms, so a value near 0 gets no smaller bound than the largest.
    """
    bound = units * torch.finfo(torch.float32).eps * float(expected.abs().max())
    torch.testing.assert_close(found, expected, atol=bound, rtol=0)


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    grads = {name: p.grad for name, p in module.named_parameters()}
    return {name: g.clone() for name, g in grads.items() if g is not None}


__all__ = [
    "VOCABULARY",
    "Layout",
    "assert_same_up_to_rounding",
    "build_model",
    "gradients",
    "positions",
    "random_ids",
    "small_config",
]


def write_checkpoint(
    folder: Path, step: int, actor: MegatronGPTActor, state: dict[str, Any], meta: dict[str, Any]
) -> Path:
    """The checkpoint of a step, written."""
    writer = CheckpointWriter(folder, actor, meta, keep=Keep(1), background=False)
    return writer.save(step, state)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests with the marker ``gpu`` are for a machine that has one."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
