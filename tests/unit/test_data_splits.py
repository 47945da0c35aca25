"""The hash, and which operands are drawn for which split."""

from __future__ import annotations

import contextlib

import pytest

from megatron_occ.data.splits import OperandSplits, first_problem, is_held_out, mix64

GAMMA = 0x9E3779B97F4A7C15


def test_mix64_gives_the_published_outputs_of_splitmix64():
    # The reference generator's first outputs for the seeds 0 and 1234567.
    assert [mix64(k * GAMMA) for k in range(3)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]
    assert [mix64(1234567 + k * GAMMA) for k in range(2)] == [
        6457827717110365317,
        3203168211198807973,
    ]


def test_a_draw_does_not_depend_on_earlier_draws():
    one, other = OperandSplits((3, 2), seed=5), OperandSplits((3, 2), seed=5)
    for split in ("train", "validation"):
        forward = [one.values(split, index) for index in range(50)]
        backward = [other.values(split, index) for index in reversed(range(50))]
        assert forward == backward[::-1]


def test_operands_have_exactly_the_configured_digits_and_cover_them():
    drawn = [OperandSplits((3, 1), seed=0).values("train", index) for index in range(4000)]
    assert all(100 <= a <= 999 and 1 <= b <= 9 for a, b in drawn)
    # 4000 draws of 9 values: each expected 444 times (about 10 % held out), deviation 20.
    for value in range(1, 10):
        assert 340 < sum(b == value for _, b in drawn) < 550
    assert 530 < sum(a for a, _ in drawn) / 4000 < 570


@pytest.mark.parametrize("digits", [(2, 2), (3, 2), (1, 1), (1, 1, 1)])
def test_validation_never_occurs_in_train_for_any_seed_or_order(digits):
    whole = OperandSplits(digits, seed=0)
    validation = set()
    with contextlib.suppress(ValueError):  # past its end
        for index in range(10**6):
            validation.add(tuple(sorted(whole.values("validation", index))))
    assert validation
    for seed in (0, 1, 77):
        splits = OperandSplits(digits, seed)
        train = {tuple(sorted(splits.values("train", index))) for index in range(3000)}
        assert validation.isdisjoint(train)


def test_validation_is_every_held_out_pair_once_and_about_a_tenth():
    # All unordered pairs of two-digit numbers, counted without the class: 90 * 91 / 2 = 4095.
    expected = {(a, b) for a in range(10, 100) for b in range(a, 100) if is_held_out((a, b))}
    splits = OperandSplits((2, 2), seed=3)
    listed = [tuple(sorted(splits.values("validation", i))) for i in range(len(expected))]
    assert len(set(listed)) == len(listed)
    assert set(listed) == expected
    assert 0.08 < len(expected) / 4095 < 0.12
    with pytest.raises(ValueError, match=f"only {len(expected)} held-out"):
        splits.values("validation", len(expected))


def test_seed_changes_train_and_not_validation():
    one, other = OperandSplits((3, 2), seed=0), OperandSplits((3, 2), seed=1)
    train = [(one.values("train", i), other.values("train", i)) for i in range(100)]
    assert sum(a == b for a, b in train) <= 1
    assert all(one.values("validation", i) == other.values("validation", i) for i in range(100))


def test_streams_of_two_seeds_do_not_share_train_problems():
    assert first_problem("train", 0) == 0
    assert first_problem("train", 3) - first_problem("train", 2) >= 10**12
    assert first_problem("validation", 3) == 0


@pytest.mark.parametrize(("split", "index"), [("test", 0), ("train", -1)])
def test_bad_split_or_index_is_refused(split, index):
    with pytest.raises(ValueError, match=f"{split}|{index}"):
        OperandSplits((2, 2), seed=0).values(split, index)
