"""Responses with kept states, dealt to updates and cut into micro-batches."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_occ.config.schema import Config, RLConfig
from megatron_occ.rl.head_rows import HeadRows
from megatron_occ.rl.sampler import Samples

WIDTH = 3
PROMPTS = [[1, 2], [1, 2], [3], [3], [4, 5, 6], [4, 5, 6]]
TOKENS = [[7], [7, 8], [9, 9, 9], [8], [7], [8, 9]]


def samples(rows=range(6)):
    """Three groups of two; state t of row i is 10 i + t + 1."""
    states = [
        (10.0 * i + torch.arange(1, len(PROMPTS[i]) + len(TOKENS[i])))
        .unsqueeze(1)
        .expand(-1, WIDTH)
        for i in rows
    ]
    found = Samples(prompts=[PROMPTS[i] for i in rows], tokens=[TOKENS[i] for i in rows])
    found.records, found.states = [None] * len(found.prompts), states
    return found


def rank(number, of):
    return SimpleNamespace(data_parallel_rank=number, data_parallel_size=of)


def batches(rows, depths=1, **sizes):
    return list(rows.batches(RLConfig(**sizes), depths, torch.device("cpu")))


def counted(rows):
    """Sequences with a token that counts."""
    pairs = zip(rows.ids, rows.starts, strict=True)
    return [ids for ids, start in pairs if start < len(ids)]


def test_a_micro_batch_by_hand():
    rows = HeadRows.of(samples([1, 2]), 2, rank(0, 1))
    (batch,) = batches(rows, depths=2)
    assert batch.ids.tolist() == [[1, 2, 7, 8], [3, 9, 9, 9]]
    assert batch.states[..., 0].tolist() == [[11, 12, 13, 0], [21, 22, 23, 0]]
    # source frame: depth d at position t is about token t + 1 + d
    assert batch.targets.mask.tolist() == [
        [[0, 1, 1, 0], [1, 1, 1, 0]],
        [[1, 1, 0, 0], [1, 1, 0, 0]],
        [[1, 0, 0, 0], [1, 0, 0, 0]],
    ]


def asked(rows, depths=1):
    """What the actor is asked for the first micro-batch of these rows."""
    (batch,) = batches(rows, depths)
    actor = SimpleNamespace(micro_batch=lambda ids, targets, **named: named)
    return batch.for_actor(actor, Config())


def test_the_actor_is_told_where_each_sequence_ends():
    rows = HeadRows.of(samples([0, 1, 4, 5]), 2, rank(0, 1))
    by_length = sorted((len(ids) for ids in rows.ids), reverse=True)
    assert asked(rows)["ends"].tolist() == by_length
    # of one without a token that counts nothing has a part
    assert asked(HeadRows.of(samples([0, 1]), 2, rank(0, 3)).share(2, 6))["ends"].tolist() == [0]


def test_every_sequence_trains_in_one_update_the_same_on_any_number_of_ranks():
    one = HeadRows.of(samples(), 2, rank(0, 1))
    # of two ranks the first drew prompts 0 and 2
    two = [
        HeadRows.of(samples(rows), 2, rank(r, 2)) for r, rows in ((0, [0, 1, 4, 5]), (1, [2, 3]))
    ]
    for number in range(3):
        alone = one.share(number, 3)
        assert alone.numbers == [number, number + 3]
        shares = [rows.share(number, 3) for rows in two]
        assert sorted(ids for share in shares for ids in counted(share)) == sorted(counted(alone))
    assert counted(one.share(1, 3)) == [PROMPTS[i] + TOKENS[i] for i in (1, 4)]


def test_a_rank_without_a_share_takes_part_without_a_token():
    rows = HeadRows.of(samples([0, 1]), 2, rank(0, 3))
    (batch,) = batches(rows.share(2, 6))
    assert batch.ids.tolist() == [[1, 2, 7]]
    assert not batch.targets.mask.any()


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"micro_batch_size": 4}, [[4, 5], [2, 3]]),
        ({"micro_batch_tokens": 10}, [[2, 5], [2, 4], [2, 3]]),
        ({"micro_batch_tokens": 2}, [[1, n] for n in (5, 4, 4, 4, 3, 2)]),
    ],
)
def test_micro_batches_keep_to_their_size_and_lose_nothing(sizes, expected):
    found = batches(HeadRows.of(samples(), 2, rank(0, 1)), **sizes)
    assert [list(batch.ids.shape) for batch in found] == expected
    tokens = sum(int(batch.targets.mask[0].sum()) for batch in found)
    assert tokens == sum(map(len, TOKENS))
