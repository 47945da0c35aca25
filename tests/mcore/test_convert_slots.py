"""The list of a model's tensors against the sharded state of the model itself."""

from __future__ import annotations

import math

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_occ.config import load_config
from megatron_occ.convert.slots import model_slots
from megatron_occ.mcore.provider import build_chunks
from tests.mcore.conftest import VOCABULARY

SIZES = "model={num_layers: 3, hidden_size: 32, ffn_hidden_size: 48, num_attention_heads: 4}"
MOE = (
    "model.moe={num_experts: 4, top_k: 2, ffn_hidden_size: 16, shared_ffn_hidden_size: 24, "
    "first_dense_layers: 1, score_function: sigmoid, expert_bias: true}"
)
MLA = (
    "model.mla={enabled: true, kv_lora_rank: 12, qk_head_dim: 8, qk_rope_head_dim: 4, "
    "v_head_dim: 6}"
)
KINDS = {
    "dense": (),
    "two depths, untied": ("mtp.num_layers=2", "model.tie_embeddings=false"),
    "no depth, bias": ("mtp.num_layers=0", "model.qkv_bias=true", "model.num_query_groups=2"),
    "norms of queries and keys": ("model.qk_layernorm=true", "model.kv_channels=16"),
    "experts": (MOE,),
    "latent attention": (MLA, "model.qk_layernorm=true"),
    "latent attention with experts": (
        MLA,
        MOE,
        "model.mla.q_lora_rank=10",
        "model.qk_layernorm=true",
    ),
}


def tensors_of(state):
    """(key, global shape): its entries that the model's shards cover."""
    covered = {}
    for value in nested_values(state):
        shards = nested_values(value.build()) if hasattr(value, "build") else [value]
        for shard in shards:
            if isinstance(shard, ShardedTensor):
                size = covered.setdefault((shard.key, tuple(shard.global_shape), shard.dtype), [0])
                size[0] += shard.data.numel()
    return {key: size for key, (size,) in covered.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_slots_are_the_tensors_of_the_model(layout, kind):
    config = load_config([], [SIZES, "precision=bf16", *KINDS[kind]])
    (model,) = build_chunks(config, VOCABULARY, layout.device)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    expected = tensors_of(model.sharded_state_dict(metadata={"dp_cp_group": group}))
    found = {}
    for slot in model_slots(config.model, config.mtp.num_layers, VOCABULARY).values():
        dtype = torch.float32 if slot.single else torch.bfloat16
        place = slot.key, slot.whole, dtype
        found[place] = found.get(place, 0) + math.prod(slot.shape)
    assert found == expected
