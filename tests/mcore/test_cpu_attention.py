"""Core attention on the CPU against plain full attention, whole and split over ranks."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType

from megatron_occ.mcore.cpu.attention import CoreAttention
from tests.mcore.conftest import assert_same_up_to_rounding
from tests.mcore.distributed import run_ranks

HEADS, WIDTH = 4, 6
# softmax over 24 tokens, and gradients that add up heads and queries: more terms than in a log-prob
UNITS = 16
SHAPES = {"gqa": (2, WIDTH, WIDTH), "mha": (HEADS, WIDTH, WIDTH), "mla": (HEADS, 10, WIDTH)}


def attention(shape, cp=1, group=None):
    groups, keys, values = SHAPES[shape]
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * WIDTH,
        num_attention_heads=HEADS,
        num_query_groups=groups,
        attention_dropout=0.0,
        context_parallel_size=cp,
    )
    channels = {"k_channels": keys, "v_channels": values} if shape == "mla" else {}
    return CoreAttention(
        config, 1, AttnMaskType.causal, "self", pg_collection=SimpleNamespace(cp=group), **channels
    )


def inputs(shape, tokens, batch):
    """Query, key, value [s, b, n, d] and the gradient of the output [s, b, heads * dv]."""
    groups, keys, values = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    sizes = ((HEADS, keys), (groups, keys), (groups, values))
    tensors = [torch.randn(tokens, batch, *size, generator=generator) for size in sizes]
    return tensors, torch.randn(tokens, batch, HEADS * values, generator=generator)


def full_attention(query, key, value, lengths):
    """Softmax over an explicit mask, in fp64; one sequence after the other in the tokens."""
    query, key, value = (x.double() for x in (query, key, value))
    key, value = (x.repeat_interleave(HEADS // x.size(2), dim=2) for x in (key, value))
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.arange(len(sequence))
    allowed = (sequence[:, None] == sequence) & (position[:, None] >= position)
    scores = torch.einsum("qbnd,kbnd->bnqk", query, key) / math.sqrt(query.size(-1))
    weights = scores.masked_fill(~allowed, -math.inf).softmax(-1)
    return torch.einsum("bnqk,kbnd->qbnd", weights, value).flatten(2).float()


def run(forward, tensors, upstream):
    """Output and the gradients of query, key and value."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    output = forward(*leaves)
    return [output.detach(), *torch.autograd.grad((output * upstream).sum(), leaves)]


def packed(lengths):
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    longest = max(lengths)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def ours(module, tensors, upstream, lengths):
    """``lengths`` None: padded."""
    if lengths is None:
        return run(lambda q, k, v: module(q, k, v, None), tensors, upstream)
    parameters = packed(lengths)

    def forward(*qkv):
        squeezed = (x.squeeze(1) for x in qkv)  # as Megatron's attention does
        return module(*squeezed, None, packed_seq_params=parameters).unsqueeze(1)

    return run(forward, tensors, upstream)


def reference(shape, tokens, batch, lengths):
    tensors, upstream = inputs(shape, tokens, batch)
    return run(lambda *qkv: full_attention(*qkv, lengths or [tokens]), tensors, upstream)


def zigzag_positions(lengths, cp, rank):
    """Token indices that a rank holds."""
    kept, start = [], 0
    for length in lengths:
        chunk = length // (2 * cp)
        for part in (rank, 2 * cp - 1 - rank):
            kept += range(start + part * chunk, start + (part + 1) * chunk)
        start += length
    return torch.tensor(kept)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", [None, [7, 1, 4], [12]])
def test_one_rank_equals_full_attention(shape, lengths):
    batch = 3 if lengths is None else 1
    got = ours(attention(shape), *inputs(shape, 12, batch), lengths)
    for found, expected in zip(got, reference(shape, 12, batch, lengths), strict=True):
        assert expected.abs().max() > 0.1
        assert_same_up_to_rounding(found, expected, UNITS)


def test_alignment_padding_counts_as_part_of_its_sequence():
    """Lengths 3 and 6 in room for 4 and 8: real tokens attend as if alone."""
    tensors, _ = inputs("gqa", 12, 1)
    parameters = packed([3, 6])
    parameters.cu_seqlens_q_padded = torch.tensor([0, 4, 12])
    module = attention("gqa")
    output = module(*(x.squeeze(1) for x in tensors), None, packed_seq_params=parameters)
    for rows in (slice(0, 3), slice(4, 10)):
        alone = module(*(x[rows] for x in tensors), None)
        assert_same_up_to_rounding(output[rows], alone.squeeze(1), UNITS)


@pytest.mark.parametrize("new", [1, 3])
def test_a_short_query_is_the_end_of_the_sequence(new):
    (query, key, value), _ = inputs("gqa", 12, 2)
    module = attention("gqa")
    whole = module(query, key, value, None)
    assert_same_up_to_rounding(module(query[-new:], key, value, None), whole[-new:], UNITS)


def test_scale_is_taken_as_given():
    (query, key, value), _ = inputs("mla", 5, 1)
    module = attention("mla")
    module.softmax_scale = 0.0
    mean = value.cumsum(0) / torch.arange(1, 6)[:, None, None, None]
    assert_same_up_to_rounding(module(query, key, value, None), mean.flatten(2), UNITS)


def split_attention(shape, tokens, batch, lengths, cp, data_parallel):
    if data_parallel:  # the group's ranks are not the global ones
        parallel_state.initialize_model_parallel(context_parallel_size=cp)
        group, rank = None, parallel_state.get_context_parallel_rank()
    else:
        group, rank = torch.distributed.group.WORLD, torch.distributed.get_rank()
    tensors, upstream = inputs(shape, tokens, batch)
    kept = zigzag_positions(lengths or [tokens], cp, rank)
    module = attention(shape, cp, group)
    return kept, ours(module, [x[kept] for x in tensors], upstream[kept], lengths)


@pytest.mark.parametrize(
    ("shape", "lengths", "cp", "copies"),
    [
        ("gqa", None, 2, 1),
        ("gqa", [8, 4, 12], 2, 1),
        ("mla", None, 2, 1),
        ("mla", [8, 4, 12], 2, 1),
        ("gqa", None, 4, 1),
        ("mha", [8, 16], 4, 1),
        ("gqa", [8, 4, 12], 2, 2),
    ],
)
def test_split_context_equals_full_attention(shape, lengths, cp, copies):
    """Every rank's share of output and gradients, with ``copies`` data-parallel replicas."""
    batch = 2 if lengths is None else 1
    results = run_ranks(split_attention, cp * copies, shape, 24, batch, lengths, cp, copies > 1)
    expected = reference(shape, 24, batch, lengths)
    for copy in range(copies):
        shares = results[copy * cp : copy * cp + cp]
        assert sorted(torch.cat([kept for kept, _ in shares]).tolist()) == list(range(24))
        for kept, got in shares:
            for found, whole in zip(got, expected, strict=True):
                assert_same_up_to_rounding(found, whole[kept], UNITS)
