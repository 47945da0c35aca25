"""Paired differences: intervals and p-values against numbers derived by hand or another way."""

from __future__ import annotations

import math
import random

import pytest

from megatron_occ.compare.statistics import (
    bootstrap_interval,
    joint_sign_flip_p,
    mean,
    sign_flip_p,
    standard_error,
)


def test_mean_and_its_standard_error():
    # squares of deviations from 3: 4, 1, 0, 1, 4; variance 10/4; error sqrt(2.5/5)
    assert mean([1, 2, 3, 4, 5]) == 3
    assert standard_error([1, 2, 3, 4, 5]) == pytest.approx(math.sqrt(0.5))
    assert math.isnan(standard_error([1.0])) and math.isnan(mean([]))


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        # |sums| of the patterns: 6 (twice), 4, 2, 0 (each twice); 6 is reached by two of eight
        ([1, 2, 3], 2 / 8),
        # the data's sum 0 is reached by all
        ([1, 2, -3], 1.0),
        # 4 or more in size: the twos of one sign (8 patterns), less the 2 with both ones against it
        ([2, 2, -1, 1], 6 / 16),
        # all alike: only the two patterns of one sign
        ([0.5] * 8, 2 / 256),
        ([0.0, 0.0], 1.0),
    ],
)
def test_p_is_the_share_of_sign_patterns_that_reach_the_mean(differences, p):
    assert sign_flip_p(differences) == pytest.approx(p)


def test_many_seeds_are_sampled_and_agree_with_the_normal_approximation():
    # 40 values, half 1.5 and half -0.5: sum 20, standard deviation of the flipped sum sqrt(50)
    values = [1.5] * 20 + [-0.5] * 20
    expected = math.erfc(20 / math.sqrt(50) / math.sqrt(2))
    assert sign_flip_p(values) == pytest.approx(expected, abs=0.002)


def test_one_arm_alone_has_the_same_p_of_all():
    values = {seed: value for seed, value in enumerate([0.3, 1.0, -0.2, 0.8, 0.4])}
    assert joint_sign_flip_p({"a": values})["a"] == sign_flip_p(list(values.values()))


def test_p_of_all_by_hand_for_two_arms():
    """|t| grows with |sum| / root of the sum of squares, which for two seeds is at most sqrt(2).

    a = (1, 1): 2/sqrt(2) for equal signs, 0 else. b = (1, -3): 2/sqrt(10) for equal signs,
    4/sqrt(10) else. Largest: sqrt(2) for equal signs, 4/sqrt(10) = 1.26 else. a's own sqrt(2) is
    reached by two of four patterns, b's own 0.63 by all.
    """
    found = joint_sign_flip_p({"a": {0: 1.0, 1: 1.0}, "b": {0: 1.0, 1: -3.0}})
    assert found == {"a": 0.5, "b": 1.0}


def test_p_of_all_is_never_below_p_and_a_missing_seed_is_no_zero():
    draw = random.Random(1)
    arms = {name: {seed: draw.gauss(0.4, 1) for seed in range(6)} for name in "abcde"}
    del arms["e"][5]
    joint = joint_sign_flip_p(arms)
    for name, found in arms.items():
        assert joint[name] >= sign_flip_p(list(found.values())) - 1e-12


def test_family_wise_error_is_at_most_the_level():
    """Of 300 studies without any difference at most about 5% have an arm with p of all <= 0.05."""
    draw, hits = random.Random(2), 0
    for _ in range(300):
        base = [draw.gauss(0, 1) for _ in range(6)]
        arms = {a: {s: draw.gauss(0, 1) - base[s] for s in range(6)} for a in range(8)}
        hits += min(joint_sign_flip_p(arms).values()) <= 0.05
    # standard deviation of a share of 5%: 1.3%
    assert hits / 300 < 0.09


def test_too_few_seeds_give_no_interval():
    assert bootstrap_interval([1.0, 2.0, 3.0, 4.0]) is None
    assert bootstrap_interval([1.0, 2.0, 3.0, 4.0, 5.0]) is not None


def test_equal_differences_give_a_point():
    # alike in all seeds, which says nothing of chance
    assert bootstrap_interval([0.25] * 6) is None
    assert bootstrap_interval([0.0] * 6) == (0.0, 0.0)


def test_interval_moves_and_scales_with_the_differences():
    values = [0.1, -0.4, 0.9, 0.3, 0.2, 1.1, -0.1, 0.6]
    low, high = bootstrap_interval(values)
    assert low < mean(values) < high
    moved = bootstrap_interval([10 + 3 * value for value in values])
    assert moved == pytest.approx((10 + 3 * low, 10 + 3 * high))
    mirrored = bootstrap_interval([-value for value in values])
    assert mirrored == pytest.approx((-high, -low), abs=0.05)


def test_interval_of_many_normal_differences_is_that_of_student():
    draw = random.Random(3)
    values = [draw.gauss(1, 2) for _ in range(60)]
    low, high = bootstrap_interval(values)
    # Student's 97.5% quantile with 59 degrees of freedom: 2.001
    half = 2.001 * standard_error(values)
    assert low == pytest.approx(mean(values) - half, abs=0.15 * half)
    assert high == pytest.approx(mean(values) + half, abs=0.15 * half)


def test_interval_covers_the_truth_about_as_often_as_it_says(monkeypatch):
    """The percentile interval of 8 seeds covers 87%: this one must do better."""
    monkeypatch.setattr("megatron_occ.compare.statistics._RESAMPLES", 800)
    draw, hits = random.Random(4), 0
    for _ in range(250):
        low, high = bootstrap_interval([draw.gauss(0, 1) for _ in range(8)])
        hits += low <= 0 <= high
    # standard deviation of a share of 95%: 1.4%
    assert hits / 250 > 0.91
