"""Group advantages, spread of a group, overlong penalty."""

from __future__ import annotations

import statistics

import pytest
import torch

from megatron_occ.losses import (
    advantage_sums,
    group_advantages,
    group_has_spread,
    overlong_penalty,
    step_advantages,
)


def test_mean_baseline_by_hand() -> None:
    # mean 0.5, squared deviations 4 * 0.25, sample std sqrt(1 / 3)
    advantages = group_advantages(torch.tensor([1.0, 0.0, 1.0, 0.0]), 4, eps=0.0)
    expected = torch.tensor([1.0, -1.0, 1.0, -1.0]) * 0.5 * 3**0.5
    torch.testing.assert_close(advantages, expected, rtol=1e-6, atol=0)


def test_matches_python_statistics_per_group() -> None:
    rewards = torch.rand(24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result = group_advantages(rewards, 6).tolist()
    for start in range(0, 24, 6):
        group = rewards[start : start + 6].tolist()
        mean, std = statistics.mean(group), statistics.stdev(group)
        expected = [(r - mean) / (std + 1e-6) for r in group]
        assert result[start : start + 6] == pytest.approx(expected, rel=1e-12)


def test_unnormalised_and_leave_one_out_by_hand() -> None:
    rewards = torch.tensor([3.0, 0.0, 0.0])
    centred = group_advantages(rewards, 3, normalize=False)
    assert centred.tolist() == [2.0, -1.0, -1.0]
    others = group_advantages(rewards, 3, baseline="leave_one_out", normalize=False)
    assert others.tolist() == [3.0, -1.5, -1.5]  # 3 - 0, 0 - 1.5
    std = 3**0.5  # squared deviations 4 + 1 + 1 over 2
    both = group_advantages(rewards, 3, baseline="leave_one_out", eps=0.0)
    torch.testing.assert_close(both, others / std)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [2, 3, 7, 8, 10])
def test_equal_rewards_give_exactly_zero(dtype: torch.dtype, size: int) -> None:
    for value in (0.3, -0.1, 1 / 3, 1e4 / 7, 0.0):
        rewards = torch.full((size,), value).to(dtype)
        for baseline in ("mean", "leave_one_out"):
            for normalize in (True, False):
                result = group_advantages(
                    rewards, size, baseline=baseline, normalize=normalize, eps=0.0
                )
                assert result.dtype == dtype
                assert result.tolist() == [0.0] * size
        assert group_has_spread(rewards, size).tolist() == [False]


def test_rounding_noise_is_no_spread_but_a_small_real_difference_is() -> None:
    noise = torch.tensor([0.1 + 0.2, 0.3, 0.3, 0.3], dtype=torch.float64)
    assert noise[0] != noise[1]
    assert group_advantages(noise, 4, eps=0.0).tolist() == [0.0] * 4
    small = torch.tensor([1000.0, 1000.0, 1000.0, 1000.01])
    assert group_has_spread(small, 4).tolist() == [True]
    assert group_advantages(small, 4)[3].item() == pytest.approx(1.5, rel=1e-3)


def test_one_real_difference_is_exact() -> None:
    rewards = torch.tensor([0.3] * 7 + [0.0])
    # mean 7r/8; deviations r/8 (7 times) and -7r/8; variance (7/64 + 49/64) r^2 / 7 = r^2 / 8
    expected = torch.tensor([0.125] * 7 + [-0.875]) * 8**0.5
    torch.testing.assert_close(group_advantages(rewards, 8, eps=0.0), expected, rtol=2e-7, atol=0)


def test_large_offset_keeps_precision() -> None:
    # the naive E[r^2] - E[r]^2 in float32 has no correct digit here
    rewards = torch.tensor([10000.0, 10001.0, 10002.0, 10003.0])
    expected = torch.tensor([-1.5, -0.5, 0.5, 1.5]) / (5 / 3) ** 0.5
    torch.testing.assert_close(group_advantages(rewards, 4, eps=0.0), expected)


def test_groups_are_independent_and_spread_is_per_group() -> None:
    rewards = torch.tensor([1.0, 1.0, 0.0, 2.0, 5.0, 5.0])
    assert group_has_spread(rewards, 2).tolist() == [False, True, False]
    assert group_advantages(rewards, 2, normalize=False).tolist() == [0, 0, -1, 1, 0, 0]


def test_integer_and_bool_rewards_become_float32() -> None:
    for rewards in (torch.tensor([1, 0]), torch.tensor([True, False])):
        result = group_advantages(rewards, 2, normalize=False)
        assert result.dtype == torch.float32
        assert result.tolist() == [0.5, -0.5]


def test_single_response_per_prompt() -> None:
    assert group_advantages(torch.tensor([3.0, 4.0]), 1, normalize=False).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="group_size is 1"):
        group_advantages(torch.tensor([3.0]), 1)
    with pytest.raises(ValueError, match="leave_one_out"):
        group_advantages(torch.tensor([3.0]), 1, normalize=False, baseline="leave_one_out")


@pytest.mark.parametrize(
    ("rewards", "size", "options", "message"),
    [
        ([1.0, 2.0, 3.0], 2, {}, "3 rewards do not divide into groups of 2"),
        ([1.0, float("nan")], 2, {}, r"rewards\[1\] is nan"),
        ([1.0, 0.0, float("-inf"), 0.0], 2, {}, r"rewards\[2\] is -inf"),
        ([1.0, 2.0], 0, {"normalize": False}, "group_size is 0"),
        ([1.0, 2.0], 2, {"baseline": "median"}, "'median': use one of mean, leave_one_out"),
        ([1.0, 2.0], 2, {"eps": -1.0}, "eps is -1.0"),
        ([1.0, 2.0], 2, {"baseline": "none"}, "standard deviation is around its mean"),
        ([[1.0, 2.0]], 2, {}, r"shape \[1, 2\]"),
    ],
)
def test_bad_input_is_refused(rewards: list, size: int, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_advantages(torch.tensor(rewards), size, **options)


def test_overlong_penalty_by_hand() -> None:
    # DAPO's own setting: at most 20480 tokens, the last 4096 of them punished
    lengths = torch.tensor([0, 16384, 16385, 18432, 20479, 20480, 30000])
    result = overlong_penalty(lengths, 20480, 4096, 1.0)
    assert result.tolist() == [0.0, 0.0, -1 / 4096, -0.5, -4095 / 4096, -1.0, -1.0]
    assert overlong_penalty(lengths, 20480, 4096, 0.5).tolist() == (result * 0.5).tolist()
    assert overlong_penalty(torch.tensor([0, 5, 10]), 10, 10, 2.0).tolist() == [0.0, -1.0, -2.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((10, 11, 1.0), "buffer is 11"), ((10, 0, 1.0), "buffer is 0"), ((10, 5, -1.0), "-1.0")],
)
def test_overlong_penalty_refuses(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        overlong_penalty(torch.tensor([3]), *arguments)


def test_step_advantages_are_those_of_the_whole_step() -> None:
    """REINFORCE++: standardised over all responses, in whatever parts they lie."""
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    plain = group_advantages(rewards, 2, baseline="none", normalize=False)
    assert torch.equal(plain, rewards)
    sums = advantage_sums(plain[:2]) + advantage_sums(plain[2:])
    found = torch.cat([step_advantages(part, sums) for part in (plain[:2], plain[2:])])
    deviation = statistics.stdev(rewards.tolist())
    expected = [(r - 4 / 6) / (deviation + 1e-6) for r in rewards.tolist()]
    assert found.tolist() == pytest.approx(expected)
    # with a baseline: groups without spread stay at 0, and the mean is 0 already
    centred = group_advantages(rewards, 2, normalize=False)
    found = step_advantages(centred, advantage_sums(centred))
    deviation = statistics.stdev([0.5, -0.5, -0.5, 0.5, 0, 0])
    assert found.tolist() == pytest.approx([x / (deviation + 1e-6) for x in centred.tolist()])


@pytest.mark.parametrize("value", [0.1, 0.0, 1e6 + 0.1])
def test_a_step_of_equal_advantages_gives_exactly_zero(value: float) -> None:
    equal = torch.full((7,), value)
    assert not step_advantages(equal, advantage_sums(equal)).any()
    none = equal[:0]
    assert step_advantages(none, advantage_sums(none)).tolist() == []


def test_a_small_spread_over_many_responses_is_one() -> None:
    rewards = torch.tensor([1000.0 + 0.01 * (i % 2) for i in range(4096)])
    assert step_advantages(rewards, advantage_sums(rewards)).abs().min() > 0.5


SOME = torch.tensor([1.0, 9.0, 0.0, 0.0, 2.0, 2.0, 9.0, 9.0, 9.0, 9.0, 9.0, 3.0])
SOME_VALID = torch.tensor([True, False, True, True, True, True] + [False] * 5 + [True])


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_a_group_is_what_is_left_of_it(baseline: str, normalize: bool) -> None:
    """Groups of 4 of which three, two equal ones and one are valid."""
    settings = {"baseline": baseline, "normalize": normalize}
    found = group_advantages(SOME, 4, valid=SOME_VALID, **settings)
    three = group_advantages(torch.tensor([1.0, 0.0, 0.0]), 3, **settings)
    expected = torch.tensor([three[0], 0.0, three[1], three[2]] + [0.0] * 8)
    torch.testing.assert_close(found, expected)
    assert group_has_spread(SOME, 4, valid=SOME_VALID).tolist() == [True, False, False]
    everyone = torch.ones_like(SOME_VALID)
    for given in (None, everyone):
        assert torch.equal(
            group_advantages(SOME, 4, valid=given, **settings),
            group_advantages(SOME, 4, **settings),
        )


def test_what_is_not_valid_is_in_no_mean_of_the_step() -> None:
    raw = group_advantages(SOME, 4, baseline="none", normalize=False, valid=SOME_VALID)
    found = step_advantages(raw, advantage_sums(raw[SOME_VALID]), valid=SOME_VALID)
    left = [1.0, 0.0, 0.0, 2.0, 2.0, 3.0]
    mean, deviation = statistics.mean(left), statistics.stdev(left) + 1e-6
    assert found[SOME_VALID].tolist() == pytest.approx([(r - mean) / deviation for r in left])
    assert not found[~SOME_VALID].any()
