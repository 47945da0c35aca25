"""Counts that speeds are compared with, against numbers counted by hand."""

from __future__ import annotations

from megatron_occ.config import load_config
from tools.gpu.operations import cache_bytes, cycle_bytes, update_operations
from tools.gpu.scales import ROLLOUTS, TOY_TRAINING, TRAINING

SIZES = (
    "model.num_layers=2",
    "model.hidden_size=8",
    "model.num_attention_heads=2",
    "model.num_query_groups=1",
    "mtp.num_layers=1",
)
PARTS = {"embedding": 40, "trunk": 1000, "MTP": 300}


def test_operations_of_an_update():
    config = load_config([], list(SIZES))
    # two sequences of 4 and 2 tokens: 8 + 2 pairs, width of all heads 8, 4 operations a pair
    attention = 10 * 4 * 8
    alone = 6 * (1000 + 40) * 6 + 3 * 2 * attention
    assert update_operations(config, PARTS, [4, 2], trains_head=False) == alone
    both = 6 * (1000 + 300 + 2 * 40) * 6 + 3 * 3 * attention
    assert update_operations(config, PARTS, [4, 2], trains_head=True) == both


def test_a_token_works_with_some_experts():
    experts = ("model.moe.num_experts=4", "model.moe.top_k=1")
    config = load_config([], [*SIZES, *experts])
    parts = {**PARTS, "trunk experts": 800, "MTP experts": 400}
    dense = update_operations(load_config([], list(SIZES)), PARTS, [1], trains_head=True)
    assert update_operations(config, parts, [1], trains_head=True) == dense + 6 * (200 + 100)


def test_bytes_of_a_decode_cycle():
    config = load_config([], list(SIZES))
    # 2 layers, keys and values of one group of 4 channels, 2 bytes
    assert cache_bytes(config.model) == 2 * 2 * 4 * 2
    assert cycle_bytes(config, PARTS, 3, 10.0) == 1040 * 2 + 3 * 10 * 32


def test_both_lists_of_lengths_fill_the_micro_batches():
    for scale in (TRAINING, TOY_TRAINING):
        tokens = scale.micro_batch * scale.micro_batches
        for lengths in (scale.mixed_lengths(), scale.full_lengths()):
            assert sum(lengths) == tokens
            assert max(lengths) == scale.length
        # FP8 by blocks pads to multiples of 128
        assert scale is TOY_TRAINING or all(length % 128 == 0 for length in scale.mixed_lengths())


def test_rollouts_fit_into_the_positions():
    positions = load_config([], list(ROLLOUTS.model)).model.max_position_embeddings
    assert ROLLOUTS.prompt + ROLLOUTS.response <= positions
