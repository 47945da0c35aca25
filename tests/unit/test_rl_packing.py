"""Plans of packed micro-batches: by hand, their invariants, and how well they are balanced."""

from __future__ import annotations

import itertools
import random

import pytest

from megatron_occ.config import load_config
from megatron_occ.config.sizes import most_micro_batches
from megatron_occ.rl.packing import plan_micro_batches


def random_case(seed):
    """Lengths, ranks, multiple and count multiple of which a cut always exists."""
    draw = random.Random(seed)
    ranks, multiple, count_multiple = (
        draw.choice((1, 2, 3)),
        draw.choice((1, 4)),
        draw.choice((1, 2)),
    )
    rows = ranks * count_multiple * draw.randint(1, 8)
    lengths = [draw.choice((draw.randint(1, 100), 40)) for _ in range(rows)]
    budget = draw.randint(100, 300)
    return lengths, {
        "ranks": ranks,
        "budget": budget,
        "multiple": multiple,
        "count_multiple": count_multiple,
    }


def loads(plan, lengths, multiple=1):
    """Tokens of each micro-batch, [rank][micro-batch]."""
    aligned = [-(-length // multiple) * multiple for length in lengths]
    return [[sum(aligned[row] for row in part) for part in parts] for parts in plan]


def test_a_plan_by_hand():
    """26 tokens under a budget of 8 for 2 ranks: 4 micro-batches, longest first, least loaded."""
    lengths = [3, 8, 2, 5, 2, 6]
    # 8 | 6 | 5 | 3, then 2 to the fourth, and the last 2 to the third: both have 5, it comes first
    plan = plan_micro_batches(lengths, ranks=2, budget=8)
    # rounds: 8 to rank 0, 7 to rank 1; rank 1 has fewer tokens and takes 6, rank 0 takes 5
    assert plan == [[[1], [0, 2]], [[3, 4], [5]]]
    assert loads(plan, lengths) == [[8, 5], [7, 6]]


@pytest.mark.parametrize("seed", range(200))
def test_every_plan_holds_each_row_once_within_the_budget_in_equal_counts(seed):
    lengths, settings = random_case(seed)
    plan = plan_micro_batches(lengths, **settings)
    assert len(plan) == settings["ranks"]
    rows = [row for parts in plan for part in parts for row in part]
    assert sorted(rows) == list(range(len(lengths)))
    tokens = [load for own in loads(plan, lengths, settings["multiple"]) for load in own]
    assert min(tokens) > 0
    assert max(tokens) <= settings["budget"]
    (count,) = {len(parts) for parts in plan}
    assert count % settings["count_multiple"] == 0


@pytest.mark.parametrize("seed", range(100))
def test_ranks_differ_by_no_more_than_two_micro_batches_do(seed):
    lengths, settings = random_case(seed)
    own = loads(plan_micro_batches(lengths, **settings), lengths, settings["multiple"])
    tokens = [load for parts in own for load in parts]
    totals = [sum(parts) for parts in own]
    assert max(totals) - min(totals) <= max(tokens) - min(tokens)


@pytest.mark.parametrize("seed", range(40))
def test_the_fullest_micro_batch_is_within_a_third_of_the_best(seed):
    """Graham's bound for longest-processing-time, against all ways of cutting 7 sequences."""
    draw = random.Random(seed)
    lengths = [draw.randint(1, 20) for _ in range(7)]
    plan = plan_micro_batches(lengths, ranks=3, budget=10**6)
    best = min(
        max(
            sum(n for n, to in zip(lengths, chosen, strict=True) if to == part) for part in range(3)
        )
        for chosen in itertools.product(range(3), repeat=7)
    )
    assert max(load for own in loads(plan, lengths) for load in own) <= (4 / 3 - 1 / 9) * best


def test_many_sequences_are_balanced_to_a_percent():
    draw = random.Random(0)
    lengths = [draw.randint(50, 4000) for _ in range(512)]
    plan = plan_micro_batches(lengths, ranks=8, budget=16384)
    totals = [sum(own) for own in loads(plan, lengths)]
    assert max(totals) / min(totals) < 1.01
    # and hardly more micro-batches than full ones would be
    assert len(plan[0]) == -(-sum(lengths) // (8 * 16384))


def test_the_order_of_the_sequences_does_not_matter():
    draw = random.Random(3)
    lengths = [draw.choice((7, 7, 20, 33)) for _ in range(24)]
    expected = plan_micro_batches(lengths, ranks=2, budget=80)
    for _ in range(10):
        order = draw.sample(range(24), 24)
        plan = plan_micro_batches([lengths[row] for row in order], ranks=2, budget=80)
        named = [[sorted(lengths[order[row]] for row in part) for part in parts] for parts in plan]
        assert named == [[sorted(lengths[row] for row in part) for part in p] for p in expected]


def test_padding_counts_against_the_budget():
    """Two of 9 tokens fit into 18, but not padded to 16 each."""
    assert plan_micro_batches([9, 9], ranks=1, budget=18) == [[[0, 1]]]
    assert plan_micro_batches([9, 9], ranks=1, budget=18, multiple=16) == [[[0], [1]]]


def test_a_sequence_longer_than_the_budget_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"rl\.micro_batch_tokens=20: a sequence has 21") as caught:
        plan_micro_batches([5, 21], ranks=1, budget=20)
    assert "at least 21, or lower rl.rollout.max_response_length" in str(caught.value)
    with pytest.raises(ValueError, match=r"17 tokens, 32 with padding\. Give at least 32"):
        plan_micro_batches([17, 3], ranks=1, budget=20, multiple=16)


def test_too_few_sequences_for_equal_counts_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"the 3 sequences .* a multiple of 4 of them"):
        plan_micro_batches([1, 1, 1], ranks=2, budget=20, count_multiple=2)
    # three of 6 do not fit into two micro-batches of 10, and four would leave one empty
    with pytest.raises(ValueError, match=r"Make the sequences of an update a multiple of 2"):
        plan_micro_batches([6, 6, 6], ranks=2, budget=10)


@pytest.mark.parametrize("seed", range(60))
def test_there_are_never_more_micro_batches_than_the_sizes_say(seed):
    """Also with sequences just over a half of the budget, which fill a micro-batch each."""
    draw = random.Random(seed)
    data, stages = draw.choice((1, 2, 3)), draw.choice((1, 2))
    prompts = data * stages * draw.randint(1, 12)
    longest, budget = draw.randint(34, 60), draw.randint(100, 300)
    given = {"model.max_position_embeddings": longest, "rl.micro_batch_tokens": budget}
    given |= {"rl.prompts_per_step": prompts, "rl.samples_per_prompt": 2, "rl.mini_batches": 1}
    given |= {"parallel.pipeline": stages, "parallel.virtual_pipeline": stages}
    config = load_config([], [f"{key}={value}" for key, value in given.items()])
    most = most_micro_batches(config, data * stages)
    settings = {"ranks": data, "budget": budget, "count_multiple": stages}
    shapes = [[longest] * 2 * prompts, [draw.randint(1, longest) for _ in range(2 * prompts)]]
    shapes.append([min(longest, budget // draw.choice((2, 3, 4)) + 1) for _ in range(2 * prompts)])
    counts = [len(plan_micro_batches(lengths, **settings)[0]) for lengths in shapes]
    assert counts[0] == most
    assert max(counts) == most
