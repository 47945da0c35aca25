"""The draft length follows acceptance and measured cost."""

from __future__ import annotations

import pytest

from megatron_occ.rollout import DraftStatistics, Generation
from megatron_occ.rollout.draft_length import DraftLength
from megatron_occ.rollout.engine import merge_shares


def run(chooser, cycles, *, sequences=64, price, survival):
    """Lengths chosen when k drafts take price(k) seconds and a share survival[j] is accepted."""
    chosen = []
    for _ in range(cycles):
        length = chooser.choose(sequences)
        counts = DraftStatistics(
            [1000] * length, [int(1000 * survival[j]) for j in range(length)], 1000, 1000
        )
        chooser.observe(sequences, length, price(length), counts)
        chosen.append(length)
    return chosen


def settled(limit, price, survival, **arguments):
    """The length chosen most of the time, after it has been learned."""
    chooser = DraftLength(limit, adaptive=True)
    chosen = run(chooser, 60, price=price, survival=survival, **arguments)[30:]
    assert len(set(chosen)) == 1
    return chosen[0]


@pytest.mark.parametrize(
    ("price", "survival", "best"),
    [
        # tokens a second: 1/1, 1.9/1.3, 2.7/1.6, 3.4/1.9
        (lambda k: 1 + 0.3 * k, (0.9, 0.8, 0.7), 3),
        # 1, 1.46, 1.5, 1.37
        (lambda k: 1 + 0.3 * k, (0.9, 0.5, 0.2), 2),
        # drafts cost as much as they bring: 1, 0.95
        (lambda k: 1 + k, (0.9, 0.8, 0.7), 0),
        # nothing is accepted
        (lambda k: 1 + 0.01 * k, (0.0, 0.0, 0.0), 0),
        (lambda k: 1 + 0.3 * k, (0.5, 0.1, 0.1), 1),
    ],
)
def test_the_length_with_the_most_tokens_a_second_is_chosen(price, survival, best):
    assert settled(3, price, survival) == best


def test_a_hopeless_length_is_not_tried():
    chooser = DraftLength(4, adaptive=True)
    chosen = run(chooser, 40, price=lambda k: 1 + 0.5 * k, survival=(0.1, 0.01, 0.0, 0.0))
    assert set(chosen) == {0, 1}
    assert chosen.count(1) == 3


def test_the_number_of_sequences_has_prices_of_its_own():
    """Drafts are nearly free for few sequences, and dear for many."""
    chooser = DraftLength(2, adaptive=True)
    dear = dict(price=lambda k: 1 + 2 * k, survival=(0.8, 0.6))
    cheap = dict(price=lambda k: 1 + 0.1 * k, survival=(0.8, 0.6))
    assert set(run(chooser, 30, sequences=64, **dear)[15:]) == {0}
    assert set(run(chooser, 30, sequences=1, **cheap)[15:]) == {2}
    assert set(run(chooser, 10, sequences=64, **dear)) == {0}


def test_acceptance_is_measured_again_in_every_call():
    """Drafts that were not worth it become so when the head has learned."""
    chooser = DraftLength(1, adaptive=True)
    bad = dict(price=lambda k: 1 + 0.3 * k, survival=(0.1,))
    good = dict(price=lambda k: 1 + 0.3 * k, survival=(0.9,))
    assert set(run(chooser, 20, **bad)[10:]) == {0}
    assert set(run(chooser, 20, **good)) == {0}, "without a new call nothing is tried"
    chooser.begin()
    assert set(run(chooser, 20, **good)) == {1}
    chooser.begin()
    assert run(chooser, 60, **bad)[-20:] == [0] * 20


def test_one_slow_cycle_changes_nothing():
    chooser = DraftLength(1, adaptive=True)
    good = dict(price=lambda k: 1 + 0.3 * k, survival=(0.9,))
    run(chooser, 20, **good)
    chooser.observe(64, 1, 100.0, DraftStatistics([1000], [900], 1000, 1900))
    assert set(run(chooser, 20, **good)) == {1}


def test_a_fixed_length_stays():
    chooser = DraftLength(2, adaptive=False)
    chooser.begin()
    assert set(run(chooser, 10, price=lambda k: 1 + 10 * k, survival=(0.0, 0.0))) == {2}
    assert DraftLength(0, adaptive=True).choose(5) == 0


def test_statistics_add_up():
    total = DraftStatistics()
    assert total.acceptance_length == 1.0
    total.add(DraftStatistics([10], [7], passes=10, tokens=17))
    total.add(DraftStatistics([4, 4], [4, 2], passes=4, tokens=10))
    assert total == DraftStatistics([14, 4], [11, 2], passes=14, tokens=27)
    assert total.acceptance_length == 27 / 14


def test_shares_of_context_parallel_ranks_are_put_back_in_order():
    shares = [
        Generation(
            [[1], [3]], [[-1.0], [-3.0]], ["stop", "length"], DraftStatistics([2], [1], 2, 3)
        ),
        Generation([[2]], [[-2.0]], ["stop"], DraftStatistics([1], [1], 1, 2)),
    ]
    merged = merge_shares(shares, 3)
    assert merged.tokens == [[1], [2], [3]]
    assert merged.logprobs == [[-1.0], [-2.0], [-3.0]]
    assert merged.finish_reasons == ["stop", "stop", "length"]
    assert merged.drafts == DraftStatistics([3], [2], 3, 5)
    assert merge_shares([Generation()], 0) == Generation()
