"""Where initial weights come from: drawn, or left to a checkpoint that brings every one of them."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_occ.config import load_config
from megatron_occ.config.identity import describe
from megatron_occ.mcore import provider
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.checkpoint import DamagedCheckpointError, load_checkpoint, load_weights
from megatron_occ.mcore.optimizer_state import main_parameters, state_tensors
from megatron_occ.mcore.provider import build_chunks
from megatron_occ.mcore.transformer_config import transformer_config
from tests.mcore.conftest import VOCABULARY, write_checkpoint

SMALL = ("model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=48")
DENSE = (*SMALL, "model.qk_layernorm=true", "model.qkv_bias=true", "mtp.num_layers=2")
KINDS = {
    "dense": DENSE,
    "untied, grouped, scaled rotation": (
        *DENSE,
        *("model.tie_embeddings=false", "model.num_query_groups=2", "model.mtp_reads=before"),
        *("model.rotary_scaling.factor=2", "model.rotary_percent=0.5"),
    ),
    "experts": (
        *(*SMALL, "model.moe.num_experts=4", "model.moe.ffn_hidden_size=16"),
        *("model.moe.shared_ffn_hidden_size=16", "model.moe.first_dense_layers=1"),
        *("model.moe.score_function=sigmoid", "model.moe.expert_bias=true"),
    ),
    "latent attention": (*SMALL, "model.mla.enabled=true", "model.mla.q_lora_rank=16"),
}
# Megatron tells by these which ranks a parameter is split over, and which share it
MARKS = ("tensor_model_parallel", "partition_dim", "allreduce", "sequence_parallel", "shared")
PRECISIONS = ((), ("precision=bf16",), ("precision=bf16", "parallel.distributed_optimizer=true"))


@pytest.fixture
def fresh_memory_is_nan():
    """torch's own way to show who reads memory that nobody has written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def make(layout, config, **options) -> MegatronGPTActor:
    return MegatronGPTActor(
        config, VOCABULARY, layout, optimizer=config.rl.optimizer, total_updates=3, **options
    )


def tensors(actor) -> dict[str, torch.Tensor]:
    """All that a model or its optimizer holds, and what its rotation turns by."""
    (chunk,) = actor.chunks
    found = dict(chunk.named_parameters()) | dict(chunk.named_buffers())
    for number, part in enumerate(actor.optimizer.megatron.chained_optimizers):
        pairs = enumerate(main_parameters(part))
        found |= {f"main {number} {place}": main for place, (_, main) in pairs}
    moments = state_tensors(actor.optimizer.megatron)
    found |= {f"moment {number}": value for number, value in enumerate(moments)}
    if hasattr(chunk, "rotary_pos_emb"):
        found["rotary"] = chunk.rotary_pos_emb.inv_freq
    return found


def meta(config):
    return describe(config, {"kind": "char"}, {"corpus": "a1"})


@pytest.mark.parametrize("precision", PRECISIONS, ids=["fp32", "bf16", "distributed"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("load", [load_weights, load_checkpoint])
def test_a_checkpoint_leaves_nothing_undrawn(
    layout, tmp_path, fresh_memory_is_nan, kind, precision, load
):
    config = load_config([], [*KINDS[kind], *precision])
    drawn = make(layout, config)
    expected = {name: value.clone() for name, value in tensors(drawn).items()}
    path = write_checkpoint(tmp_path, 1, drawn, {}, meta(config))
    torch.manual_seed(7)
    left = make(layout, config, draws=False)
    matrices = {n: p for n, p in left.chunks[0].named_parameters() if p.dim() > 1}
    assert matrices
    assert all(p.isnan().all() for p in matrices.values())
    assert not left.has_weights
    load(path, left, meta(config))
    assert left.has_weights
    found = tensors(left)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_marked_as_if_they_were_drawn(layout, kind):
    config = load_config([], list(KINDS[kind]))
    (drawn,) = build_chunks(config, VOCABULARY, layout.device)
    (left,) = build_chunks(config, VOCABULARY, layout.device, draws=False)
    marks = [
        {name: [getattr(p, mark, None) for mark in MARKS] for name, p in chunk.named_parameters()}
        for chunk in (drawn, left)
    ]
    assert marks[0] == marks[1]
    assert any(each[0] for each in marks[0].values())


def test_a_parameter_that_the_checkpoint_lacks_is_an_error(layout, tmp_path):
    config, deeper = (load_config([], [*SMALL, f"mtp.num_layers={depths}"]) for depths in (1, 2))
    path = write_checkpoint(tmp_path, 1, make(layout, config), {}, meta(config))
    file = path / "meta.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "mtp_layers": 2}))
    with pytest.raises(DamagedCheckpointError, match=r"mtp\.layers\.1"):
        load_weights(path, make(layout, deeper, draws=False), meta(deeper))


@pytest.mark.parametrize(("device", "on_cpu"), [("cpu", True), ("cuda", False)])
def test_initial_weights_are_drawn_where_the_key_says(layout, monkeypatch, device, on_cpu):
    config = load_config([], [*SMALL, f"model.init_device={device}"])
    assert transformer_config(config).use_cpu_initialization
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert transformer_config(config).use_cpu_initialization is on_cpu
    assert transformer_config(config).init_method_std == config.model.init_std


def test_without_a_device_weights_are_not_drawn_on_it(layout):
    config = load_config([], [*SMALL, "model.init_device=cuda"])
    with pytest.raises(ValueError, match="no CUDA device here: use"):
        build_chunks(config, VOCABULARY, layout.device)


def test_the_copy_for_rollouts_takes_no_memory_in_layers_of_transformer_engine(layout, monkeypatch):
    """Its layers ask their configuration for a device, and not torch."""
    megatron = transformer_config(load_config([], list(SMALL)))
    assert provider._quiet(megatron).use_cpu_initialization
    monkeypatch.setattr(provider, "uses_transformer_engine", lambda: True)
    assert not provider._quiet(megatron).use_cpu_initialization
