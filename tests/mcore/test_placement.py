"""Where tokens lie: hand-derived places, and nothing lost on the way in and out."""

from __future__ import annotations

import pytest
import torch

from megatron_occ.mcore.placement import ContextRanks, packed_length, place_packed, place_padded
from tests.mcore.distributed import run_ranks

CPU = torch.device("cpu")
# 3 rows of width 7
SIZE, LENGTHS = (3, 7), (7, 2, 5)


def numbered(size):
    """Token t of row i is 100 * (i + 1) + t: 0 is padding alone."""
    rows, width = size
    return 100 * (torch.arange(rows) + 1).unsqueeze(1) + torch.arange(width)


def mask_of(lengths, width):
    return torch.arange(width) < torch.tensor(lengths).unsqueeze(1)


def all_ranks(place, size):
    return [place(ranks=ContextRanks(rank, size)) for rank in range(size)]


def put_from_all(placements, parts):
    """What ``put`` makes of the parts of all ranks, gathered by hand."""
    whole = torch.cat([*parts, torch.zeros_like(parts[0][..., :1])], dim=-1)
    return whole[..., placements[0].origin].unflatten(-1, placements[0].size)


def inputs(placement, ids):
    return placement.as_input(placement.take(ids)).tolist()


def test_padded_rows_are_padded_to_the_multiple():
    ids = numbered((2, 3))
    assert inputs(place_padded((2, 3), CPU), ids) == [[100, 101, 102], [200, 201, 202]]
    placement = place_padded((2, 3), CPU, multiple=4)
    assert (placement.rows, placement.packed) == (2, None)
    assert inputs(placement, ids) == [[100, 101, 102, 0], [200, 201, 202, 0]]
    # as hidden states lie: sequence first
    assert placement.take(ids).tolist() == [100, 200, 101, 201, 102, 202, 0, 0]


def test_packed_rows_follow_each_other_and_each_is_padded_to_the_multiple():
    placement = place_packed(SIZE, LENGTHS, CPU, multiple=4)
    one, two = list(range(100, 107)), [200, 201]
    three = list(range(300, 305))
    assert inputs(placement, numbered(SIZE)) == [[*one, 0, *two, 0, 0, *three, 0, 0, 0]]
    assert placement.rows == 1
    packed = placement.packed
    assert packed.qkv_format == "thd"
    for bounds in (packed.cu_seqlens_q, packed.cu_seqlens_kv):
        assert bounds.dtype == torch.int32
        assert bounds.tolist() == [0, 8, 12, 20]
    assert (packed.max_seqlen_q, packed.max_seqlen_kv) == (8, 8)
    assert packed_length(LENGTHS, 4) == 20


def test_a_given_total_adds_a_sequence_of_padding():
    placement = place_packed(SIZE, LENGTHS, CPU, multiple=4, total=28)
    assert placement.packed.cu_seqlens_q.tolist() == [0, 8, 12, 20, 28]
    assert inputs(placement, numbered(SIZE))[0][20:] == [0] * 8
    exact = place_packed(SIZE, LENGTHS, CPU, multiple=4, total=20)
    assert exact.packed.cu_seqlens_q.tolist() == [0, 8, 12, 20]
    with pytest.raises(AssertionError, match="3 sequences do not fit into 16"):
        place_packed(SIZE, LENGTHS, CPU, multiple=4, total=16)


def test_two_context_ranks_hold_the_outer_and_the_inner_quarters():
    first, second = all_ranks(lambda **kw: place_padded((1, 7), CPU, multiple=4, **kw), 2)
    ids = numbered((1, 7))
    # 8 places in 4 chunks of 2: rank 0 has the first and the last, rank 1 those between
    assert inputs(first, ids) == [[100, 101, 106, 0]]
    assert inputs(second, ids) == [[102, 103, 104, 105]]


def test_context_ranks_cut_every_packed_sequence():
    def place(**kw):
        return place_packed((2, 7), (7, 3), CPU, multiple=4, total=16, **kw)

    first, second = all_ranks(place, 2)
    ids = numbered((2, 7))
    assert inputs(first, ids) == [[100, 101, 106, 0, 200, 0, 0, 0]]
    assert inputs(second, ids) == [[102, 103, 104, 105, 201, 202, 0, 0]]
    for placement in (first, second):  # Megatron is told of whole sequences
        assert placement.packed.cu_seqlens_q.tolist() == [0, 8, 12, 16]


def test_four_context_ranks_mirror_eight_chunks():
    placements = all_ranks(lambda **kw: place_padded((1, 8), CPU, multiple=8, **kw), 4)
    held = [inputs(placement, numbered((1, 8)))[0] for placement in placements]
    assert held == [[100, 107], [101, 106], [102, 105], [103, 104]]


PLACES = {
    "padded": lambda **kw: place_padded(SIZE, CPU, multiple=8, **kw),
    "packed": lambda **kw: place_packed(SIZE, LENGTHS, CPU, multiple=8, **kw),
    "packed, total": lambda **kw: place_packed(SIZE, LENGTHS, CPU, multiple=8, total=48, **kw),
}
every_place = pytest.mark.parametrize("name", PLACES)
every_size = pytest.mark.parametrize("size", [1, 2, 4])


def lengths_of(name):
    return (7, 7, 7) if name == "padded" else LENGTHS


@every_place
@every_size
def test_every_token_comes_back_and_padding_is_zero(name, size):
    placements = all_ranks(PLACES[name], size)
    ids = numbered(SIZE)
    parts = [placement.take(ids) for placement in placements]
    assert len({len(part) for part in parts}) == 1
    real = torch.where(mask_of(lengths_of(name), SIZE[1]), ids, 0)
    assert sorted(value for part in parts for value in part.tolist() if value) == sorted(
        value for value in real.flatten().tolist() if value
    )
    assert torch.equal(put_from_all(placements, parts), real)
    stacked = [torch.stack((part, -part)) for part in parts]  # leading dimensions stay
    assert torch.equal(put_from_all(placements, stacked), torch.stack((real, -real)))


@every_place
def test_put_of_take_is_the_identity_on_tokens(name):
    placement = PLACES[name]()
    values = torch.randn(2, *SIZE)
    real = mask_of(lengths_of(name), SIZE[1])
    assert torch.equal(placement.put(placement.take(values)), torch.where(real, values, 0.0))


def check_ahead(name, pairs, steps):
    """``pairs`` of tokens and what is found ahead of them, on all ranks."""
    lengths = lengths_of(name)
    checked = 0
    for token, found in pairs:
        row, position = int(token) // 100 - 1, int(token) % 100
        if token and position + steps < lengths[row]:
            assert found == token + steps
            checked += 1
    assert checked == sum(max(0, length - steps) for length in lengths)


@every_place
@every_size
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_ahead_gives_the_token_so_many_steps_on(name, size, steps):
    placements = all_ranks(PLACES[name], size)
    whole = torch.cat([placement.take(numbered(SIZE)) for placement in placements])
    pairs = []
    for placement in placements:
        found = placement.ahead(whole.unsqueeze(1), steps).squeeze(1)
        pairs += zip(placement.take(numbered(SIZE)).tolist(), found.tolist(), strict=True)
    check_ahead(name, pairs, steps)


@every_place
def test_gradient_of_put_goes_back_to_each_tokens_place(name):
    placement = PLACES[name]()
    values = torch.randn(placement.local.numel(), dtype=torch.double, requires_grad=True)
    upstream = torch.randn(SIZE, dtype=torch.double)
    (placement.put(values) * upstream).sum().backward()
    # transposed: each place gets the factor of its token, padding nothing
    assert torch.equal(values.grad, placement.take(upstream))
    assert torch.autograd.gradcheck(placement.put, (values.detach().requires_grad_(),))


def context_rank():
    """put, its gradient, and ahead on this rank, with messages."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    ranks = ContextRanks(rank, size, torch.distributed.group.WORLD)
    found = {}
    for name, place in PLACES.items():
        placement = place(ranks=ranks)
        taken = placement.take(numbered(SIZE)).double().requires_grad_()
        whole = placement.put(taken)
        upstream = torch.arange(whole.numel(), dtype=torch.double).view(SIZE) + 1
        (whole * upstream).sum().backward()
        ahead = placement.ahead(placement.everywhere(taken.detach()), 2)
        found[name] = (taken.detach(), whole.detach(), taken.grad, placement.take(upstream), ahead)
    return found


def test_context_ranks_exchange_values_and_keep_their_own_gradient():
    results = run_ranks(context_rank, 2)
    for name in PLACES:
        real = torch.where(mask_of(lengths_of(name), SIZE[1]), numbered(SIZE), 0)
        pairs = []
        for here, whole, gradient, own_upstream, ahead in (result[name] for result in results):
            assert torch.equal(whole.long(), real)
            # the ranks' losses are the same: a sum over ranks would count it twice
            assert torch.equal(gradient, own_upstream)
            pairs += zip(here.tolist(), ahead.tolist(), strict=True)
        check_ahead(name, pairs, 2)
